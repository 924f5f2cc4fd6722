"""What a sweep shows while it trains: a line a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agents.sweep.state import State

SHARE = 20
"""Looking at files, perhaps across a network, takes no more than one part in so many of the time."""


class Board:
    """On a terminal: a bar for the whole grid and one for each run that trains. Everywhere: a line as a run ends."""

    def __init__(self, console: Console, states: Sequence[State], root: str | Path) -> None:
        self._states, self._root, self._console = states, root, console
        self._bars: dict[Path, TaskID] = {}
        self._next = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Board:
        self._progress.start()
        self._all = self._progress.add_task("all runs", total=len(self._states))
        begun = sum(state.stage != "finished" and state.job.folder.exists() for state in self._states)
        done = sum(state.stage == "finished" for state in self._states)
        self.say(f"{len(self._states)} runs: {done} finished, {begun} to go on, {len(self._states) - done - begun} new")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        with contextlib.suppress(OSError):  # the terminal is gone; the sweep is not
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def name(self, state: State) -> str:
        """A run as its folder below the log folder."""
        return str(state.job.folder.relative_to(self._root))

    def update(self) -> None:
        """Look how far the runs are."""
        began = time.monotonic()
        if began < self._next:
            return
        for state in self._states:
            if state.look():
                text = f"{self.name(state)} on {state.host}"
                self._bars[state.job.folder] = self._progress.add_task(text, total=state.job.steps)
            if state.stage == "running":
                self._progress.update(self._bars[state.job.folder], completed=state.job.done())
        self._progress.update(self._all, completed=sum(state.stage == "finished" for state in self._states))
        now = time.monotonic()
        self._next = now + SHARE * (now - began)

    def ended(self, state: State, retries: int) -> None:
        """Tell that an attempt has ended."""
        bar = self._bars.pop(state.job.folder, None)
        if bar is not None:
            self._progress.remove_task(bar)
        done = sum(each.stage == "finished" for each in self._states)
        where = f"{self.name(state)} on {state.host}" if state.host else self.name(state)
        if state.stage == "finished":
            self.say(f"done    {where} ({done} of {len(self._states)})")
        elif state.stage == "failed":
            self.say(f"failed  {where}: {state.error}")
        else:
            self.say(f"again   {where}: {state.error} (failure {state.failures}, --retries {retries})")
