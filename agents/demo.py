"""The demonstration: plain and recycling agents on two tasks that keep changing. ``make demo`` runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console

from agents import compare, plot
from agents.checks import at_least, chosen, writable
from agents.command_line import reported
from agents.jobs import Job, brought_to_end
from agents.runs import run_folder

ENV = "DigitsBandit-v1"


class Task(NamedTuple):
    """What one algorithm is trained on."""

    steps: int
    drift: str
    change: int
    """Environment steps from one change to the next."""
    options: str


TASKS: dict[str, Task] = {
    "ppo": Task(
        102_400,
        "permute",
        10_240,
        "--every 1024 --n-envs 8 --num-threads 1 "
        "--hyperparams learning_rate:3e-3 ent_coef:0.01 gamma:0.0 n_steps:128 batch_size:256 n_epochs:10 "
        "--policy-kwargs net_arch:[64,64] activation_fn:relu",
    ),
    "dqn": Task(
        25_000,
        "relabel",
        2500,
        "--every 250 --env-kwargs images:200 --n-envs 8 --num-threads 1 --clear-buffer --restart-exploration "
        "--hyperparams learning_rate:3e-3 gamma:0.0 buffer_size:10000 batch_size:64 train_freq:1 gradient_steps:-1 "
        "learning_starts:300 exploration_initial_eps:0.5 exploration_final_eps:0.05 exploration_fraction:0.1 "
        "--policy-kwargs net_arch:[64,64] activation_fn:relu",
    ),
}
"""The learning rate is ten times SB3's own for PPO, thirty times that for DQN."""


class Arm(NamedTuple):
    """What is done to an agent; ``{change}``, ``{half}`` and ``{after}`` are filled in."""

    method: str
    options: str = ""
    tag: str | None = None
    after: str | None = None
    """The arm that has to be finished first, since this one reads its run, of the same seed."""


ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "monitor": Arm("monitor"),
    "random": Arm("random"),
    "random-moments": Arm("random", "--method-kwargs weights:False", tag="moments"),
    "replay": Arm("replay", "--method-kwargs path:{after}/edits.jsonl", after="redo"),
    "split": Arm("split", "--method-kwargs tau:0.025"),
    "mirror": Arm("mirror", "--method-kwargs tau:0.025"),
    "s2d": Arm("s2d", "--method-kwargs tau:0.025"),
    "revive": Arm("revive"),
    "redo": Arm("redo"),
    "cbp": Arm("cbp", "--method-kwargs rate:1e-3 maturity:100"),
    "snr": Arm("snr"),
    "regrama": Arm("regrama"),
    "gradient_cutoff": Arm("gradient_cutoff"),
    "shrink_perturb": Arm("shrink_perturb", "--every {change}"),
    "layer_reset": Arm("layer_reset", "--every {change}"),
    "plasticity_injection": Arm("plasticity_injection", "--warmup {half}"),
    "l2_init": Arm("l2_init"),
    "redo+l2_init": Arm("redo+l2_init"),
    "monitor-weight-decay": Arm("monitor", "--weight-decay 1e-4", tag="weight-decay"),
    "monitor-layer-norm": Arm("monitor", "--layer-norm", tag="layer-norm"),
    "monitor-crelu": Arm("monitor", "--crelu", tag="crelu"),
}
"""``none`` and ``monitor`` (watched) are plain agents. ``random`` resets as many units as are dead, any units;
``random-moments`` only what the optimizer knows of them; ``replay`` as many as ``redo`` did. What is dormant by ReDo's
measure is recycled by ``split``, ``mirror`` and ``s2d`` too. ``cbp``'s published rate and maturity are made for longer
runs. ``shrink_perturb`` and ``layer_reset`` act when the task changes, and so know more than the others."""


@dataclass(frozen=True)
class Args:
    """Train plain and recycling agents on two drifting tasks, print a table and draw the curves.

    PPO learns to name digits whose pixels are shuffled again and again; DQN learns which action each of 200
    images wants, which is drawn again and again. Runs that are there already are kept.
    """

    log_folder: str = "runs/demo"
    """Where the runs are kept."""
    seeds: int = 2
    """Agents for each arm."""
    workers: int = 2
    """Runs at a time, one core each."""
    algos: tuple[str, ...] = tuple(TASKS)
    """Which of ppo and dqn to run."""
    arms: tuple[str, ...] = ("monitor", "split", "mirror", "redo")
    """Which arms to run: all, or names such as random, replay, cbp, redo+l2_init, monitor-layer-norm."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then the table and the figure; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.demo")
    return reported(lambda: run(args))


def run(args: Args) -> int:
    """Run what is missing, then the table and the figure; returns the exit code.

    Raises:
        ValueError: an option is out of range, or names what is not there, or a run is there with other options.
    """
    arms = tuple(ARMS) if args.arms == ("all",) else args.arms
    chosen("--algos", args.algos, TASKS)
    chosen("--arms", arms, ARMS)
    at_least(args, seeds=1, workers=1)
    writable(args.log_folder)
    lacking = [arm for arm in arms if ARMS[arm].after not in (None, *arms)]
    if lacking:
        raise ValueError(f"{lacking[0]} reads what {ARMS[lacking[0]].after} writes: name both")
    jobs = list(_jobs(args, arms))
    console = Console()
    if not brought_to_end(jobs, args.workers, console):
        return 1
    code = plot.main([args.log_folder])
    if not code and "monitor" in arms:
        code = compare.main([args.log_folder])
    board = Path(sys.executable).parent / "tensorboard"
    console.print(f"\nTensorBoard: {board} --logdir {args.log_folder}", soft_wrap=True)
    return code


def _jobs(args: Args, arms: Sequence[str]) -> Iterator[Job]:
    """Arms that others wait for come first."""
    ordered = sorted(arms, key=lambda arm: ARMS[arm].after is not None)
    for seed in range(args.seeds):
        for algo in args.algos:
            yield from (_job(args, seed, algo, arm) for arm in ordered)


def _job(args: Args, seed: int, algo: str, arm: str) -> Job:
    task, (method, options, tag, after) = TASKS[algo], ARMS[arm]
    root = args.log_folder
    folder = run_folder(root, env=ENV, drift=[task.drift], algo=algo, method=method, tag=tag, seed=seed)
    source = None if after is None else _job(args, seed, algo, after).folder
    own = options.format(change=task.change, half=task.steps // 2, after=source).split()
    who = ("--algo", algo, "--env", ENV, "--method", method, "--seed", str(seed), *(("--tag", tag) if tag else ()))
    what = ("--drift", task.drift, "--change", f"every:{task.change}", *task.options.split(), *own)
    where = ("-n", str(task.steps), "--log-folder", root, "--overwrite")
    return Job(folder, (*who, *what, *where), task.steps, source)


if __name__ == "__main__":
    sys.exit(main())
