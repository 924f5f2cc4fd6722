"""The runs of a sweep in one table: ``sweep.csv``, a line for each, and what :mod:`agents.plot` makes of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agents import plot
from agents.files import write_text
from agents.results import BadRun, Run, read_run
from agents.summary import summarise
from agents.sweep.state import State

NAMES = ("algo", "env", "drift", "method", "tag", "seed")
NUMBERS = ("first_task", "later_tasks", "last_task", "area", "dead", "recycled", "re_died")
"""As :class:`agents.summary.Row` has them; empty where nothing was measured."""
COLUMNS = ("folder", "stage", *NAMES, "steps", *NUMBERS, "attempts", "host", "error")


def gather(states: Sequence[State]) -> list[tuple[State, Run | None]]:
    """Every run as it lies on disk; None for one that cannot be read."""
    return [(state, _read(state)) for state in states]


def _read(state: State) -> Run | None:
    if not (state.job.folder / "config.yaml").exists():
        return None
    try:
        return read_run(state.job.folder)
    except BadRun as error:
        state.error = state.error or str(error)
        return None


def write(path: Path, found: Sequence[tuple[State, Run | None]]) -> None:
    """Write the table, a line for each run."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(_line(state, run) for state, run in found)
    write_text(path, text.getvalue())


def _line(state: State, run: Run | None) -> dict[str, Any]:
    line: dict[str, Any] = {
        "folder": state.job.folder, "stage": state.stage, "steps": state.job.done(),
        "attempts": state.attempts, "host": state.host, "error": state.error,
    }  # fmt: skip
    if run is None:
        return line
    line |= {name: run.config[name] for name in NAMES if run.config.get(name) is not None} | {"drift": run.drift}
    if len(run.episodes):
        (row,) = summarise([run])
        line |= {name: number for name in NUMBERS for number in getattr(row, name) if np.isfinite(number)}
    return line


def show(console: Console, found: Sequence[tuple[State, Run | None]]) -> None:
    """Print the numbers of the finished runs, an arm a line."""
    finished = [run for _, run in found if run is not None and run.finished and len(run.episodes)]
    for heading, table in plot.tables(summarise(finished)):
        console.print(heading, markup=False, highlight=False, style="bold")
        console.print(table)
    if finished:
        console.print(plot.TERMS, markup=False, highlight=False, style="dim")
