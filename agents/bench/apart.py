"""Cases that run in processes of their own, so that what one leaves behind is no other's cost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def measured(module: str, case: str) -> dict[str, Any]:
    """What ``python -m MODULE CASE`` prints as the last of its lines, in JSON.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", module, case]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"the case {case!r} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(field: str, *, reset: bool = False) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak since the latest reset) of this process, in bytes; NaN where none is told."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return next(_fields(field)) * 1024
    except (OSError, StopIteration):
        return float("nan")


def _fields(name: str) -> Iterator[int]:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            yield int(value.split()[0])
