"""How far the output of a network moves at an event, and in the updates that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recycle.outputs import returned

AFTER = (5, 20, 50, 200)
"""Updates after an event at which the output is looked at again."""


class Jumps:
    """Compares the output on one batch with what it was just before the latest event.

    A look is one pass without gradients in evaluation mode: two an event and four behind it.

    Args:
        module: the network, put into evaluation mode for a look.
        probe: runs it on a batch that stays the same from event to event, or at least until the next.
    """

    def __init__(self, module: nn.Module, probe: Callable[[], Any]) -> None:
        self.module, self.probe = module, probe
        self._before: list[Tensor] = []
        self._event_at = 0
        self._found: dict[int, float] = {}

    def before_event(self, updates: int) -> dict[int, float]:
        """Remember what the network says now, ``updates`` after the first; returns what was seen since last time."""
        found, self._found = self._found, {}
        self._before, self._event_at = self._look(), updates
        return found

    @property
    def so_far(self) -> dict[int, float]:
        """What was seen since the latest event."""
        return dict(self._found)

    def after_event(self) -> dict[int, float]:
        """How far this event has moved the output, at 0; nothing if there was none to compare with."""
        return {0: self._moved()} if self._before else {}

    def after_update(self, updates: int) -> None:
        """Look again if it is time, ``updates`` after the first."""
        since = updates - self._event_at
        if self._before and since in AFTER:
            self._found[since] = self._moved()

    def _moved(self) -> float:
        """The largest relative change of an output."""
        moved = [0.0]
        for then, now in zip(self._before, self._look(), strict=True):
            size = float(then.double().norm())
            if size:
                moved.append(float((now.double() - then.double()).norm()) / size)
        return max(moved)

    @torch.no_grad()
    def _look(self) -> list[Tensor]:
        modes = [(layer, layer.training) for layer in self.module.modules()]
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        try:
            self.module.eval()
            with torch.random.fork_rng(devices=gpus):
                torch.manual_seed(0)  # a policy that samples draws the same each time
                return [t.detach().clone() for t in returned(self.probe()) if t.is_floating_point()]
        finally:
            for layer, mode in modes:
                layer.training = mode

    def state_dict(self) -> dict[str, Any]:
        """What was said before the latest event, and what was seen since."""
        return {"before": [t.cpu() for t in self._before], "event_at": self._event_at, "found": dict(self._found)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state_dict`; the probe must still run on the same batch."""
        self._before = [t.to(device) for t in state["before"]]
        self._event_at, self._found = int(state["event_at"]), dict(state["found"])
