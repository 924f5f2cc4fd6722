"""A PPO agent that starts narrow and grows, against agents of fixed width: `python -m agents.growing`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO

from agents import plot
from agents.checks import at_least, writable
from agents.command_line import pairs, reported
from agents.demo import ENV
from agents.jobs import Job, brought_to_end
from agents.method_names import build_methods
from agents.results import Run, read_run
from agents.runs import run_folder
from agents.statistics import Floats, estimate
from agents.summary import summarise

START = 8
"""Width of each hidden layer at the beginning."""
TASK = (
    "--algo ppo --drift permute --change every:10240 --n-envs 8 --num-threads 1 "
    "--hyperparams learning_rate:3e-3 ent_coef:0.01 gamma:0.0 n_steps:128 batch_size:256 n_epochs:10"
)
"""The PPO task of ``agents.demo``: digits whose pixels are shuffled anew ten times."""
GROWN, NARROW, WIDE = "grown", f"fixed {START}", "fixed, as wide as the grown one"
TERMS = (
    "return: per episode (of at most 20), mean over the tasks after the first, and on the last; grown -: the grown "
    "agent's minus this one's, seed by seed; units: in all hidden layers; dead: fraction before the last event, mean "
    "over layers. IQMs over seeds with 95 % bootstrap intervals."
)


@dataclass(frozen=True)
class Args:
    """Train an agent that starts at width 8 and grows, agents of width 8, and agents as wide as it became.

    Prints a table and draws curves of return, dead units and widths. Runs that are there already are kept.
    """

    log_folder: str = "runs/growing"
    """Where the runs are kept."""
    seeds: int = 3
    """Agents for each arm."""
    workers: int = 2
    """Runs at a time, one core each."""
    steps: int = 102_400
    """Environment steps of each run."""
    method: str = "grow+senn"
    """What grows it: grow, or grow+METHOD; others that add units too."""
    method_kwargs: tuple[str, ...] = ("grow.when:score:0.03,0.001", "grow.most:64", "senn.absolute:0.001")
    """key:value pairs for the method, as agents.train takes them."""
    every: int = 4096
    """Environment steps from event to event: four rollouts."""
    sample_every: int = 20
    """Statistics look at the passes of every so many updates, here at two of the 40 that follow a rollout: the first,
    whose gradient is that of the policy that acted, and one of the sixth epoch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then the tables and the figure; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.growing")
    return reported(lambda: run(args))


def run(args: Args) -> int:
    """Run what is missing, then the tables and the figure; returns the exit code.

    Raises:
        ValueError: an option is out of range, there is no such method, or a run is there with other options.
    """
    at_least(args, seeds=1, workers=1, steps=1, every=1, sample_every=1)
    build_methods(args.method, pairs(args.method_kwargs))
    writable(args.log_folder)
    console = Console(width=max(Console().width, 170))
    seeds = range(args.seeds)
    first = [job for seed in seeds for job in (grown(args, seed), fixed(args, seed, NARROW, [START, START]))]
    if not brought_to_end(first, args.workers, console):
        return 1
    second = [fixed(args, seed, WIDE, final_widths(grown(args, seed).folder)) for seed in seeds]
    if not brought_to_end(second, args.workers, console):
        return 1
    code = plot.main([args.log_folder])
    jobs = {GROWN: first[::2], NARROW: first[1::2], WIDE: second}
    console.print(table({arm: [read_run(job.folder) for job in of_arm] for arm, of_arm in jobs.items()}))
    console.print(TERMS, markup=False, highlight=False, style="dim")
    return code


def grown(args: Args, seed: int) -> Job:
    """The agent that grows."""
    return _job(args, seed, args.method, None, [START, START], ("--method-kwargs", *args.method_kwargs))


def fixed(args: Args, seed: int, arm: str, widths: object) -> Job:
    """An agent that stays as it is, and is watched."""
    return _job(args, seed, "monitor", "narrow" if arm == NARROW else "wide", widths, ())


def final_widths(folder: Path) -> object:
    """The widths that an agent ended with, as stable-baselines3's ``net_arch``."""
    widths: object = PPO.load(folder / "model.zip", device="cpu").policy.net_arch
    return widths


def _job(args: Args, seed: int, method: str, tag: str | None, widths: object, own: Sequence[str]) -> Job:
    root = args.log_folder
    folder = run_folder(root, env=ENV, drift=["permute"], algo="ppo", method=method, tag=tag, seed=seed)
    arch = str(widths).replace(" ", "")
    what = ("--method", method, *own, *(("--tag", tag) if tag else ()), "--env", ENV, "--seed", str(seed))
    events = ("--every", str(args.every), "--sample-every", str(args.sample_every))
    where = ("-n", str(args.steps), "--log-folder", root, "--overwrite")
    policy = ("--policy-kwargs", f"net_arch:{arch}", "activation_fn:relu")
    return Job(folder, (*what, *TASK.split(), *policy, *events, *where), args.steps)


def table(arms: dict[str, list[Run]]) -> Table:
    """One line for each arm; runs of all arms have the same seeds in the same order."""
    found = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    found.add_column("arm", no_wrap=True)
    for column in ("seeds", "units", "return", "grown -", "last task", "grown -", "dead"):
        found.add_column(column, justify="right", no_wrap=True)
    rows = {arm: summarise(runs)[0] for arm, runs in arms.items()}
    own = rows[GROWN]
    for arm, row in rows.items():
        units = [sum(int(curve.values[-1]) for curve in run.width.values()) for run in arms[arm]]
        cells = [str(len(row.seeds)), " ".join(map(str, units))]
        for values, mine in ((row.later_tasks, own.later_tasks), (row.last_task, own.last_task)):
            cells += [_told(values), "" if arm == GROWN else _told(mine - values)]
        found.add_row(arm, *cells, _told(row.dead))
    return found


def _told(values: Floats) -> str:
    """The IQM over seeds with its interval; "-" for what is not known of every seed."""
    return "-" if not np.isfinite(values).all() else str(estimate(values))


if __name__ == "__main__":
    sys.exit(main())
