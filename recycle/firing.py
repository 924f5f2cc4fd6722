"""When units fired: how long each is silent now, and how rarely it was silent for as long before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_OCTAVE = 4
"""Bins for each doubling of an inter-firing time; up to 8 passes every length has its own."""
_BINS = 20 * _OCTAVE
_REMEMBERED = 1024
"""Inter-firing times of a unit that are remembered from event to event, about; older ones fade."""


class Firing:
    """Inter-firing times of a layer's units, in sampled passes, on the device of the activations.

    A unit fires in a pass if it is not zero for some sample and position of it. Its inter-firing time is 1 where it
    fired in the pass before as well. A histogram with bins that grow with the time costs O(units) an update, whatever
    the times are.

    Args:
        apart: keep who fired in each pass apart, instead of counting it: in data-parallel training a unit fires if it
            does so on any process, and nobody asks the others in a pass.
    """

    def __init__(self, apart: bool = False) -> None:
        self.apart: list[Tensor] | None = [] if apart else None  # who fired, ``(width,)`` for each pass
        self.silent: Tensor | None = None  # passes since the unit fired, or since it was born
        self.total = self.times = torch.empty(0)  # passes between births and latest firings; histogram of the times

    def add(self, act: Tensor) -> None:
        """Add one pass of shape ``(values, width)``."""
        fired = (act.amax(0) != 0) | (act.amin(0) != 0)
        if self.silent is None:
            self.silent = torch.zeros(act.shape[1], device=act.device)
            self.total = torch.zeros_like(self.silent)
            self.times = torch.zeros(act.shape[1], _BINS, device=act.device)
        if self.apart is None:
            self.count(fired)
        else:
            self.apart.append(fired)

    def count(self, fired: Tensor) -> None:
        """Count one pass in which these units fired, ``(width,)`` bool."""
        assert self.silent is not None
        time = self.silent + 1
        self.times.scatter_add_(1, _bin(time)[:, None], fired.to(time.dtype)[:, None])
        self.total += time * fired
        self.silent = time * ~fired

    def fade(self) -> None:
        """Let what was seen long ago count less: a unit's habits change while it learns."""
        if self.silent is not None:
            scale = (_REMEMBERED / self.times.sum(1).clamp_min(1)).clamp_max(1)
            self.times *= scale[:, None]
            self.total *= scale

    def follow(self, order: Sequence[int]) -> None:
        """Unit i was unit ``order[i]``, or is newborn, with no past, where that is -1."""
        if self.silent is not None:
            old = torch.tensor(order, device=self.silent.device)
            known = (old >= 0).to(self.silent.dtype)
            self.silent, self.total = (t[old.clamp_min(0)] * known for t in (self.silent, self.total))
            self.times = self.times[old.clamp_min(0)] * known[:, None]

    def read(self) -> dict[str, Tensor]:
        """``silence`` and ``rarity``, see :class:`recycle.stats.Stats`, on the CPU; nothing before the first pass."""
        if self.silent is None:
            return {}
        silent, total, times = (t.double().cpu() for t in (self.silent, self.total, self.times))
        count = times.sum(1)
        first = _bin(silent + 1)[:, None]
        longer = torch.where(torch.arange(_BINS) >= first, times, 0.0).sum(1)
        usual = (total.sum() / count.sum()).nan_to_num(1.0)  # of the layer; a layer that never fired might always
        mean = (total + usual) / (count + 1)
        return {"silence": silent, "rarity": (longer + (mean / (mean + 1)) ** silent) / (count + 1)}

    def state(self) -> list[Tensor] | None:
        """Plain tensors: silences, total times, histograms, and who fired in the passes that are kept apart."""
        if self.silent is None:
            return None
        kept = [torch.stack(self.apart)] if self.apart else []
        return [t.to("cpu", copy=True) for t in (self.silent, self.total, self.times, *kept)]

    def load(self, state: Any, device: torch.device) -> None:
        """Go on from :meth:`state`."""
        self.silent = None
        if self.apart is not None:
            self.apart = []
        if state is not None:
            self.silent, self.total, self.times = (t.to(device, copy=True) for t in state[:3])
            passes = list(state[3].to(device, copy=True).unbind()) if len(state) > 3 else []
            if self.apart is None:
                for fired in passes:
                    self.count(fired)
            else:
                self.apart = passes


def _bin(time: Tensor) -> Tensor:
    return (_OCTAVE * time.log2()).long().clamp_max(_BINS - 1)
