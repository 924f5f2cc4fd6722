"""Where a sweep stands with each of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agents.jobs import Job


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
