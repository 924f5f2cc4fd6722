"""A training run that is to be done, and how far it is: what the demonstration and the sweep make lists of."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agents import runs


@dataclass(frozen=True)
class Job:
    """One training run."""

    folder: Path
    command: tuple[str, ...]
    """Of a new run: an interpreter, ``-m``, ``agents.train`` and its options."""
    steps: int
    after: Path | None = None
    """The run that has to be finished first."""

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


@dataclass
class State:
    """Where a sweep stands with a job."""

    job: Job
    stage: Literal["waiting", "running", "finished", "failed"] = "waiting"
    host: str = ""
    attempts: int = 0
    failures: int = 0
    """Attempts in a row that brought no new checkpoint, and the one before them."""
    error: str = ""
    """The last line of the attempt that failed last; "" once one ended well."""

    def __post_init__(self) -> None:
        self.saved = self.job.saved()
        self.stage = "finished" if self.job.finished else "waiting"
        self.queued()

    @property
    def log(self) -> Path:
        """What its attempts wrote, beside its folder."""
        return self.job.folder.with_name(f"{self.job.folder.name}.log")

    def queued(self) -> None:
        """An attempt is asked for."""
        self._read = self._size()

    def look(self) -> bool:
        """Whether its attempt has just begun, as its log tells."""
        if self.stage != "waiting" or self._size() <= self._read:
            return False
        with self.log.open("rb") as file:
            file.seek(self._read)
            self.host = file.readline().decode(errors="replace").partition(" on ")[2].partition(",")[0]
        self.stage = "running"
        return True

    def _size(self) -> int:
        try:
            return self.log.stat().st_size
        except OSError:
            return 0

    def ended(self, code: int, host: str, said: str, retries: int) -> None:
        """An attempt has ended, with an exit code and a last line."""
        self.attempts, self.host, self.error = self.attempts + 1, host or self.host, said if code else ""
        saved = self.job.saved()
        self.failures = self.failures + 1 if saved <= self.saved else 1
        self.saved = max(self.saved, saved)
        over: Literal["waiting", "failed"] = "failed" if self.failures > retries else "waiting"
        self.stage = over if code else "finished"
