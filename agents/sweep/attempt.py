"""One attempt at a run of a sweep, in a process of its own: ``python -m agents.sweep.attempt FOLDER OPTIONS...``.

It starts the run with these options of ``agents.train``, or goes on from its checkpoint where it has begun. As long as
another process holds the run's lock (one that was cut off from the sweep and is still writing its checkpoint, perhaps
on another machine) it waits. It ends in order, with a checkpoint, when the process that started it is gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from agents.children import end_with_parent
from agents.command_line import reported
from agents.options import Args
from agents.train import resume, train

PATIENCE = 600.0
"""Seconds to wait for a run's lock."""


def attempt(argv: Sequence[str]) -> int:
    """Make the attempt; returns the exit code."""
    folder, *words = argv
    end_with_parent()
    return reported(lambda: print(start_or_resume(Path(folder), words)))


def start_or_resume(folder: Path, words: Sequence[str], patience: float = PATIENCE) -> Path:
    """Bring a run to its end, from wherever it is.

    Raises:
        BlockingIOError: another process has trained it for the whole time of our patience, in seconds.
        ValueError: as :func:`agents.train.train` and :func:`agents.train.resume` say.
    """
    until = time.monotonic() + patience
    waited = False
    while (folder / "config.yaml").exists():
        try:
            return resume(Args(resume=str(folder)))
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            if not waited:
                print(
                    f"{folder} is in use: another process still trains this run; waiting", file=sys.stderr, flush=True
                )
            waited = True
            time.sleep(1)
    half_made = ["--overwrite"] * folder.exists()  # killed before there was anything to go on from
    return train(tyro.cli(Args, args=[*words, *half_made]), words)


if __name__ == "__main__":
    sys.exit(attempt(sys.argv[1:]))
