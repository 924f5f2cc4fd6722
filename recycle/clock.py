"""Which updates are looked at: counts them, and knows when no training pass can come."""

from __future__ import annotations

from typing import Any


class Clock:
    """Counts updates by the steps of optimizers, or by training passes where no optimizer is known.

    Args:
        optimizers: how many step; the first one's steps are the updates.
        sample_every: one of so many updates is sampled.
    """

    def __init__(self, optimizers: int, sample_every: int) -> None:
        self.sample_every = sample_every
        self.passes = 0
        """Updates so far."""
        self.paused = False
        """Whether no training pass can come, during a rollout say."""
        self._cleared_at = 0
        self._resumed_at, self._between_pauses = 0, -1  # in updates; tells when the next pause is to be expected
        self._steps = [0] * optimizers
        self._root_calls = 0
        self._calls: dict[object, int] = {}  # by observation point, where neither steps nor root calls tell updates
        self._calls_before = 0  # of every point, before they were counted one by one

    @property
    def updates(self) -> int:
        """Updates in the window, sampled or not."""
        return self.passes - self._cleared_at

    @property
    def sampling(self) -> bool:
        """Whether a pass that comes now may be sampled: without optimizers only the pass itself tells."""
        return not self.paused and (not self._steps or self.passes % self.sample_every == 0)

    @property
    def pause_is_next(self) -> bool:
        """Whether as many updates were made since the last pause as before it."""
        return not self.paused and self.passes - self._resumed_at == self._between_pauses

    def pause(self) -> None:
        """No training pass comes until :meth:`resume`."""
        self.paused = True
        self._between_pauses = self.passes - self._resumed_at

    def resume(self) -> None:
        """End a :meth:`pause`."""
        self.paused = False
        self._resumed_at = self.passes

    def clear(self) -> None:
        """Begin a new window."""
        self._cleared_at = self.passes

    def stepped(self, number: int) -> bool:
        """An optimizer makes a step; whether it is one that is sampled."""
        step = self._steps[number]
        self._steps[number] = step + 1
        if number == 0:
            self.passes = step + 1
        return step % self.sample_every == 0

    def called(self) -> None:
        """The network makes a training pass, and no optimizer is known."""
        self._root_calls += 1
        self.passes = max(self.passes, self._root_calls)

    def due(self, point: object) -> bool:
        """Whether a pass is sampled. Between two optimizer steps all passes are, or none: layers that are called
        twice, and accumulated gradients, are seen whole."""
        if self._steps:
            return self.passes % self.sample_every == 0
        if self._root_calls:
            return (self._root_calls - 1) % self.sample_every == 0
        count = self._calls.get(point, self._calls_before)  # an entry point other than forward
        self._calls[point] = count + 1
        self.passes = max(self.passes, count + 1)
        return count % self.sample_every == 0

    def new_points(self) -> None:
        """Observation points are others from now on, and go on where those before them stood."""
        self._calls.clear()
        self._calls_before = self.passes

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "passes": self.passes,
            "steps": list(self._steps),
            "pauses": [self._resumed_at, self._between_pauses],
            "root_calls": self._root_calls,
            "cleared_at": self._cleared_at,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; further entries are not looked at."""
        self.passes, self._steps = int(state["passes"]), list(state["steps"])
        self._resumed_at, self._between_pauses = state["pauses"]
        self._root_calls, self._cleared_at = int(state["root_calls"]), int(state["cleared_at"])
        self.new_points()
