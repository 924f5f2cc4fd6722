"""Training runs that are to be done: how far each is, and doing them side by side on this machine."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents import options, runs
from agents.children import Children


@dataclass(frozen=True)
class Job:
    """One training run."""

    folder: Path
    options: tuple[str, ...]
    """Of ``agents.train``, as they are typed for a new run."""
    steps: int
    after: Path | None = None
    """The run that has to be finished first."""

    @property
    def command(self) -> tuple[str, ...]:
        """What starts a new run."""
        return (sys.executable, "-m", "agents.train", *self.options)

    @property
    def finished(self) -> bool:
        """Whether the final model is there."""
        return runs.finished(self.folder)

    def done(self) -> int:
        """Environment steps so far, read off the last finished episode; a line that is being written does not count."""
        if self.finished:
            return self.steps
        try:
            with (self.folder / "episodes.csv").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 1000, 0))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        first = lines[-1].partition(b",")[0] if lines else b""
        return int(first) if first.isdigit() else 0

    def saved(self) -> int:
        """Environment steps at its newest checkpoint; 0 where there is none."""
        steps = (re.fullmatch(r"model_(\d+)_steps\.zip", path.name) for path in self.folder.glob("checkpoints/*.zip"))
        return max((int(found[1]) for found in steps if found), default=0)


def brought_to_end(jobs: Sequence[Job], workers: int, console: Console) -> bool:
    """Run those that have not finished, side by side; whether all went well. What failed is told on the console.

    Raises:
        ValueError: an option is wrong, or a run is there with other options.
        Stopped: a signal asked to end; the runs have written checkpoints.
    """
    for job in jobs:
        asked = tyro.cli(options.Args, args=job.options)
        options.check(asked)
        runs.check_same(job.folder, asked)
    failures = run_jobs([job for job in jobs if not job.finished], workers)
    for job, output in failures:
        console.print(f"failed: {shlex.join(job.command)}\n{output}", markup=False, highlight=False)
    return not failures


def run_jobs(jobs: Sequence[Job], workers: int) -> list[tuple[Job, str]]:
    """Run the jobs side by side with a progress bar; returns those that failed and what they said.

    A run that was interrupted goes on where its last checkpoint stands.

    Raises:
        Stopped: a signal asked to end; the runs have written checkpoints.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns) as progress, ThreadPoolExecutor(workers) as pool, Children() as children:
        bar = progress.add_task(f"training {len(jobs)} agents, steps", total=sum(job.steps for job in jobs))
        results: dict[Path, Future[subprocess.CompletedProcess[str]]] = {}
        for job in jobs:
            source = results.get(job.after) if job.after else None
            results[job.folder] = pool.submit(_train, job, source, children)
        while not all(result.done() for result in results.values()):
            progress.update(bar, completed=sum(job.done() for job in jobs))
            children.rest(1.0)
        children.rest(0.0)  # for a signal that came with the last one's end
        progress.update(bar, completed=sum(job.done() for job in jobs))
    ended = [(job, results[job.folder].result()) for job in jobs]
    return [(job, end.stderr or end.stdout) for job, end in ended if end.returncode]


def _train(
    job: Job, source: Future[subprocess.CompletedProcess[str]] | None, children: Children
) -> subprocess.CompletedProcess[str]:
    if source is not None:
        source.result()
    return children.run(_command(job))


def _command(job: Job) -> tuple[str, ...]:
    """Go on with a run that was begun by the very same command, or begin."""
    started = job.folder / "command.txt"
    same = shlex.join(["python", *job.command[1:]]) + "\n"
    if started.exists() and started.read_text(encoding="utf-8") == same:
        job = dataclasses.replace(job, options=("--resume", str(job.folder)))
    return job.command
