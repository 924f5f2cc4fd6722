"""How long others wait for us: time inside the callback and the hooks, by a clock of its own.

Two equal runs differ by several per cent on most machines, so that a ratio of two says little about a cost of two per
cent. This clock says what is spent in our own code; what that does to the caches of others is in the ratio only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from agents.callback import RecycleCallback
from recycle.anchor import Anchor
from recycle.recycler import Recycler
from recycle.rows import Record
from recycle.targets import SoftTargets
from recycle.track import Tracker

_ENTRANCES: dict[type, tuple[str, ...]] = {
    RecycleCallback: ("init_callback", "on_training_start", "on_rollout_start", "on_step", "update_locals",
                      "on_rollout_end", "on_training_end"),
    Recycler: ("_look_again",),
    SoftTargets: ("_keep_batch",),
    Record: ("_watch_gradient",),
    Anchor: ("_before_step", "_after_step"),
    Tracker: tuple(name for name in vars(Tracker) if name.startswith(("_watch_", "_keep_"))),
}  # fmt: skip
"""Where stable-baselines3 and torch call us."""


@dataclass
class Clock:
    """Seconds of wall-clock time spent inside so far."""

    seconds: float = 0.0


@contextmanager
def inside() -> Iterator[Clock]:
    """Time all calls of the callback and of hooks that are attached from now on; calls inside calls count once."""
    clock, depth = Clock(), 0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth, start = depth + 1, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                depth -= 1
                clock.seconds += 0.0 if depth else time.perf_counter() - start

        return wrapper

    with ExitStack() as patches:
        for kind, names in _ENTRANCES.items():
            for name in names:
                patches.enter_context(patch.object(kind, name, timed(getattr(kind, name))))
        yield clock
