"""The demonstration: plain and recycling agents on two tasks that keep changing. ``make demo`` runs it."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents import plot
from agents.runs import run_folder

ENV = "DigitsBandit-v1"

SETTINGS: dict[str, tuple[int, str]] = {
    "ppo": (
        102_400,
        "--drift permute --change every:10240 --every 1024 --n-envs 8 --num-threads 1 "
        "--hyperparams learning_rate:3e-3 ent_coef:0.01 gamma:0.0 n_steps:128 batch_size:256 n_epochs:10 "
        "--policy-kwargs net_arch:[64,64] activation_fn:relu",
    ),
    "dqn": (
        25_000,
        "--env-kwargs images:200 --drift relabel --change every:2500 --every 250 --n-envs 8 "
        "--num-threads 1 --clear-buffer --restart-exploration "
        "--hyperparams learning_rate:3e-3 gamma:0.0 buffer_size:10000 batch_size:64 train_freq:1 gradient_steps:-1 "
        "learning_starts:300 exploration_initial_eps:0.5 exploration_final_eps:0.05 exploration_fraction:0.1 "
        "--policy-kwargs net_arch:[64,64] activation_fn:relu",
    ),
}
"""Environment steps and options of each algorithm's task; the learning rate is ten times SB3's own for PPO."""

ARMS: dict[str, tuple[str, ...]] = {
    "none": (),
    "monitor": (),
    "random": (),
    "split": ("--method-kwargs", "tau:0.025"),
    "mirror": ("--method-kwargs", "tau:0.025"),
    "redo": (),
    "revive": (),
}
"""``none`` and ``monitor`` (watched) are plain agents, ``random`` resets as many units as are dead, any units;
the others recycle what ReDo calls dormant."""


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
    algos: tuple[str, ...] = tuple(SETTINGS)
    """Which of ppo and dqn to run."""
    arms: tuple[str, ...] = ("monitor", "split", "mirror", "redo")
    """Which arms to run: none, monitor, random, split, mirror, redo, revive."""


@dataclass(frozen=True)
class Job:
    """One training run of the demonstration."""

    folder: Path
    command: tuple[str, ...]
    steps: int

    @property
    def finished(self) -> bool:
        """Whether the final model is there."""
        return (self.folder / "model.zip").exists()

    def done(self) -> int:
        """Environment steps so far, read off the last finished episode."""
        if self.finished:
            return self.steps
        try:
            with (self.folder / "episodes.csv").open(newline="", encoding="utf-8") as file:
                last = deque(csv.reader(file), maxlen=1)
            return int(last[0][0]) if last and last[0] and last[0][0].isdigit() else 0
        except OSError:
            return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then the table and the figure; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.demo")
    for given, known in ((args.algos, SETTINGS), (args.arms, ARMS)):
        wrong = [word for word in given if word not in known]
        if wrong:
            print(f"error: there are {', '.join(known)}, got {', '.join(wrong)}", file=sys.stderr)
            return 2
    jobs = list(_jobs(args))
    console = Console()
    failures = run_jobs([job for job in jobs if not job.finished], args.workers)
    for job, output in failures:
        console.print(f"[red]failed:[/red] {' '.join(job.command)}\n{output}", highlight=False)
    if failures:
        return 1
    code = plot.main([args.log_folder])
    board = Path(sys.executable).parent / "tensorboard"
    console.print(f"\nTensorBoard: {board} --logdir {args.log_folder}", soft_wrap=True)
    return code


def _jobs(args: Args) -> Iterator[Job]:
    for seed in range(args.seeds):
        for algo in args.algos:
            steps, options = SETTINGS[algo]
            for method in args.arms:
                words = options.split()
                drift = words[words.index("--drift") + 1]
                root = args.log_folder
                folder = run_folder(root, env=ENV, drift=[drift], algo=algo, method=method, tag=None, seed=seed)
                who = ("--algo", algo, "--env", ENV, "--method", method, *ARMS[method], "--seed", str(seed))
                where = ("-n", str(steps), "--log-folder", root, "--overwrite")
                command = (sys.executable, "-m", "agents.train", *who, *words, *where)
                yield Job(folder, command, steps)


def run_jobs(jobs: Sequence[Job], workers: int) -> list[tuple[Job, str]]:
    """Run the jobs side by side with a progress bar; returns those that failed and what they said."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress, ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task(f"training {len(jobs)} agents, steps", total=sum(job.steps for job in jobs))
        results = [pool.submit(subprocess.run, job.command, capture_output=True, text=True) for job in jobs]
        while not all(result.done() for result in results):
            progress.update(bar, completed=sum(job.done() for job in jobs))
            time.sleep(1)
        progress.update(bar, completed=sum(job.done() for job in jobs))
    ended = [(job, result.result()) for job, result in zip(jobs, results, strict=True)]
    return [(job, end.stderr or end.stdout) for job, end in ended if end.returncode]


if __name__ == "__main__":
    sys.exit(main())
