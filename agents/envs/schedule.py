"""When a task changes: lifetime agent timesteps -> task index. What changes is in `drift.py`."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

FORMS = '"every:10000", "at:5000,20000", "cyclic:10000", "cyclic:10000,4" or "random:10000"'
RANDOM_STREAM = 0x5EED  # keeps the draws of `random` apart from the drifts', which start from the same seed


class Schedule(Protocol):
    """Says which task is due at a lifetime step; steps are agent timesteps summed over all copies, from 0.

    Anything with these two methods will do. It should be immutable, comparable and picklable, so that all copies
    of an environment can agree on it.
    """

    def task_at(self, step: int) -> int:
        """Tell the index of the task due at `step`; 0 before the first change."""

    def change_points(self, horizon: int) -> list[int]:
        """List the steps below `horizon` at which another task becomes due, in increasing order."""


@dataclass(frozen=True)
class Every:
    """A new task every `interval` steps, for ever: 0, 1, 2, ..."""

    interval: int

    def task_at(self, step: int) -> int:
        """Tell the index of the task due at `step`."""
        return _checked(step) // self.interval

    def change_points(self, horizon: int) -> list[int]:
        """List the multiples of the interval below `horizon`."""
        return list(range(self.interval, horizon, self.interval))


@dataclass(frozen=True)
class At:
    """A new task at each of the given steps; the last one stays."""

    steps: tuple[int, ...]

    def task_at(self, step: int) -> int:
        """Tell the index of the task due at `step`."""
        return bisect_right(self.steps, _checked(step))

    def change_points(self, horizon: int) -> list[int]:
        """List the given steps below `horizon`."""
        return [step for step in self.steps if step < horizon]


@dataclass(frozen=True)
class Cyclic:
    """`tasks` tasks in turn, `interval` steps each, then the first again: 0, 1, 0, 1, ..."""

    interval: int
    tasks: int = 2

    def task_at(self, step: int) -> int:
        """Tell the index of the task due at `step`, below `tasks`."""
        return _checked(step) // self.interval % self.tasks

    def change_points(self, horizon: int) -> list[int]:
        """List the multiples of the interval below `horizon`."""
        return list(range(self.interval, horizon, self.interval))


@dataclass(frozen=True)
class Random:
    """A new task after a random time, uniform between half and one and a half of `mean_interval`, by `seed`.

    Uniform, not memoryless: the moment cannot be foreseen, yet every task lasts long enough to be learned.
    """

    mean_interval: int
    seed: int = 0

    def task_at(self, step: int) -> int:
        """Tell the index of the task due at `step`."""
        return bisect_right(self._points(_checked(step)), step)

    def change_points(self, horizon: int) -> list[int]:
        """List the random change points below `horizon`; a longer horizon only adds to them."""
        points = self._points(horizon)
        return list(points[: bisect_right(points, horizon - 1)])

    def _points(self, step: int) -> tuple[int, ...]:
        count = 64  # doubled, so that a whole run asks for a handful of cached lists
        while (points := _random_points(self.mean_interval, self.seed, count))[-1] <= step:
            count *= 2
        return points


def parse(spec: str, seed: int = 0) -> Every | At | Cyclic | Random:
    """Read a schedule as a command line writes it.

    `every:N`: a new task every N steps. `at:N,M,...`: at these steps. `cyclic:N` or `cyclic:N,K`: K tasks (default
    2) in turn, N steps each. `random:N`: at random times, N steps apart on average, decided by `seed`.
    Numbers may be written 10000, 10_000 or 1e4. Raises ValueError for anything else.
    """
    if seed < 0:
        raise ValueError(f"A schedule expects a seed of 0 or more: got {seed}. Pass a non-negative integer.")
    kind, _, text = spec.partition(":") if isinstance(spec, str) else (spec, "", "")
    if kind not in ("every", "at", "cyclic", "random"):
        raise ValueError(f"A schedule is one of {FORMS}: got {spec!r}. Start it with one of these four words.")
    numbers = [_whole(part, spec) for part in text.split(",")]
    if kind == "at":
        if any(later <= earlier for earlier, later in pairwise(numbers)):
            raise ValueError(f'"at" expects increasing steps: got {spec!r}. Sort them and write each one once.')
        return At(tuple(numbers))
    most = 2 if kind == "cyclic" else 1
    if len(numbers) > most:
        raise ValueError(
            f'"{kind}" expects at most {most} number{"s"[: most - 1]}: got {spec!r}. Use "at:" to list change points.'
        )
    if kind == "every":
        return Every(numbers[0])
    if kind == "random":
        return Random(numbers[0], seed)
    if numbers[1:] == [1]:
        raise ValueError(f'"cyclic" expects 2 tasks or more: got {spec!r}. Leave the drift out for a single task.')
    return Cyclic(*numbers)


def _whole(text: str, spec: str) -> int:
    try:
        number = float(text.strip())
    except ValueError:
        number = 0.5
    if number < 1 or not number.is_integer():
        raise ValueError(
            f"A schedule expects whole numbers of 1 or more: got {text.strip()!r} in {spec!r}. Write it like {FORMS}."
        )
    return int(number)


def _checked(step: int) -> int:
    if step < 0:
        raise ValueError(f"A step is counted from 0: got {step}. Pass the lifetime agent timesteps.")
    return step


@lru_cache(maxsize=128)
def _random_points(mean_interval: int, seed: int, count: int) -> tuple[int, ...]:
    rng = np.random.default_rng([RANDOM_STREAM, seed])
    spread = mean_interval // 2
    lengths = rng.integers(mean_interval - spread, mean_interval + spread, endpoint=True, size=count)
    return tuple(np.cumsum(lengths).tolist())
