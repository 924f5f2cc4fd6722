"""Per-unit statistics of one window: what a method reads, and the running moments they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recycle.firing import Firing
from recycle.folding import Mistakes
from recycle.growth_sample import GrowthSample
from recycle.junction import Junction
from recycle.samples import Sample

_KEPT = 256
"""Rows of activations kept of the latest sampled pass, for effective rank."""
_BUFFER = 2**15
"""Numbers of a layer that wait, at most, until their moments are taken together; larger passes do not wait."""
_MERGED = 256
"""Moments that are kept apart at most."""
_PLACES = 64
"""Passes whose places in a buffer are remembered, at most."""


@dataclass(frozen=True, eq=False)
class Stats:
    """What was seen of a group's units since the last event. Every tensor is ``(width,)``, float64, on the CPU.

    "Activation" is a unit's output as its consumers read it, over samples and positions (time, space).
    In data-parallel training it is what all ranks saw, see :func:`recycle.merged.merged`.
    """

    samples: int
    """Sampled values of each unit, the smallest over its consumers; 0 if nothing was seen."""
    firing_rate: Tensor
    """Share of activations that are not zero."""
    mean: Tensor
    mean_abs: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor
    gradient: Tensor
    """Mean absolute gradient of the loss at the pre-activation; 0 for a dead ReLU, NaN where not observed.

    Each sampled pass counts the same. Under a loss scaler it carries the scale."""
    weight_gradient: Tensor
    """Mean absolute gradient of the incoming weights at ``optimizer.step()``, NaN where not observed."""
    age: Tensor
    """Updates since the unit was last recycled, or since tracking began."""
    incoming_norm: Tensor
    """L2 norm of the incoming weights."""
    outgoing_norm: Tensor
    """L1 norm of the outgoing weights: how much the consumers listen."""
    silence: Tensor
    """Sampled passes since the unit fired (was not zero), over events; NaN where no method asked for it."""
    rarity: Tensor
    """Probability that the unit, alive, is silent for that long: the share of its inter-firing times that were longer.
    One more time is added, that decides where there were few: it is drawn from a geometric distribution whose mean is
    1 + the unit's, with the layer's mean as one of the unit's times. NaN where no method asked for it."""
    event: int = 0
    """Number of the event that asks, the first is 1; 0 outside of events."""
    updates: int = 0
    """Updates since the last event, sampled or not."""
    finite: bool = True
    """False if a NaN or an infinity was seen; such a window says nothing."""
    settled: Tensor | None = None
    """Bool: where False, a constant unit has another value in evaluation mode (running statistics still move
    towards it), so it cannot be folded yet. None: nowhere."""
    sample: Sample | None = None
    """The latest sampled pass at the layer that makes the units. None where no method asked for it, or where that is
    not one Linear or plain convolution without a normalisation behind it."""
    inputs: dict[str, Tensor] | None = None
    """What the layers that make the units read on the latest sampled pass, by the name of their weight, on the CPU:
    ``(values, features)``, for a convolution ``(samples, channels, ...)``; a part of it, spread over the whole batch.
    Weights whose input no hook sees are missing; None where no method asked for it."""
    activations: Tensor | None = None
    """Up to 256 rows of the latest sampled pass, spread over its batch: ``(values, width)``, on the device and in the
    precision of the network; it may change with the next pass. None where nothing was seen."""
    recorded: Mapping[str, float] = field(default_factory=dict)
    """What the training loop measured itself, by the names under which it called :meth:`recycle.Recycler.record`: the
    mean since the last event."""
    junction: Junction | str | None = None
    """What the latest sampled pass showed on both sides of the units, or why that is not known (they are not made by
    one Linear or convolution, say). None where no method asked for it."""
    growth: GrowthSample | None = None
    """Rows that say what a new unit would be worth. None where no method asked for them, where no gradient has come
    yet, or where the units are not made and read by Linear layers alone."""
    mistakes: Callable[[], Mistakes] | None = None
    """Finds out where the network is wrong, by the examples that a method was built with; None where none asked. May
    raise :class:`recycle.NotRecyclable`."""
    generator: torch.Generator | None = None
    """Source of randomness for methods that draw."""

    @property
    def dead(self) -> Tensor:
        """Units that gave zero, or another constant that can be folded away, for every input seen."""
        constant = self.minimum == self.maximum
        return constant if self.samples > 1 else torch.zeros_like(constant)

    @property
    def score(self) -> Tensor:
        """Dormancy score: mean |activation| over the layer's mean of it (Sokar et al. 2023, eq. 1)."""
        return self.mean_abs / self.mean_abs.mean().clamp_min(1e-9)

    @property
    def utility(self) -> Tensor:
        """Mean |activation| times outgoing L1 norm: what the consumers receive of a unit."""
        return self.mean_abs * self.outgoing_norm


def wide(values: Tensor) -> Tensor:
    """Half precision as single: it counts no further than 2048."""
    return values.float() if values.element_size() < 4 else values


def largest(seen: list[Tensor], missing: Tensor) -> Tensor:
    """The largest of several, unit by unit: a unit learns if one of its branches does."""
    return torch.stack(seen).amax(0) if seen else missing


def _copied(values: Tensor) -> Tensor:
    """On the CPU, so that what is saved on a GPU loads anywhere."""
    return values.to("cpu", copy=True)


class Window:
    """What one observation point saw, on the device of the activations.

    A small pass is only copied into a buffer; moments are taken when that is full or read, and merged when the
    window is read. Nothing large is allocated on the way, which on a CPU costs more than all the sums.

    Args:
        firing: keep inter-firing times as well; they outlive the window.
        apart: those of passes that count later, see :class:`recycle.firing.Firing`.
    """

    def __init__(self, firing: bool = False, apart: bool = False) -> None:
        self.firing = Firing(apart) if firing else None
        self.buffer = self.scratch = torch.empty(0, 0)
        self._places: dict[tuple[int, int], Tensor] = {}  # views of the buffer, which cost more than a copy into them
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_places": {}}  # a view that is pickled is no view any more

    def clear(self) -> None:
        """Forget everything."""
        self.filled = 0  # rows of the buffer whose moments are still to be taken
        self.counts: list[int] = []
        self.moments: list[tuple[Tensor, ...]] = []  # fired, sum |a|, sum, squared deviations, min, max
        self._last: Tensor | None = None
        if self.firing is not None:
            self.firing.fade()

    def following(self, order: Sequence[int]) -> Window:
        """An empty one for the units after a resize, see :meth:`Firing.follow`; inter-firing times go along."""
        new = Window()
        if self.firing is not None:
            self.firing.follow(order)
            new.firing = self.firing
        return new

    @property
    def latest(self) -> Tensor | None:
        """Up to 256 activations of the latest pass, spread over the whole batch: ``(values, width)``, or None."""
        return None if self._last is None else _thinned(self._last)

    @property
    def count(self) -> int:
        """Values of each unit seen so far."""
        return sum(self.counts) + self.filled

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        moments = [torch.stack(of_passes).cpu() for of_passes in zip(*self.moments, strict=True)]
        return {
            "waiting": _copied(self.buffer[: self.filled]) if self.filled else None,
            "counts": list(self.counts),
            "moments": moments,
            "latest": None if self.latest is None else _copied(self.latest),
            "firing": None if self.firing is None else self.firing.state(),
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        self.clear()
        self.counts = list(state["counts"])
        self.moments = list(zip(*(t.to(device, copy=True).unbind() for t in state["moments"]), strict=True))
        if state["waiting"] is not None:
            waiting = state["waiting"].to(device)
            self._room_for(waiting)
            self._keep(waiting)
        self._last = None if state["latest"] is None else state["latest"].to(device, copy=True)
        if self.firing is not None:
            self.firing.load(state["firing"], device)

    def add(self, act: Tensor) -> None:
        """Add ``act`` of shape ``(values, width)``."""
        if self.firing is not None:
            self.firing.add(act)
        if act.numel() > _BUFFER:
            self._take_moments()
            self._last = _thinned(act).clone()
            self._add_moments(wide(act), None)
            return
        self._room_for(act)
        self._last = self._keep(act)

    def _room_for(self, act: Tensor) -> None:
        count, room = act.shape[0], self.buffer.shape[0]
        if self.filled + count > room:
            self._take_moments()
        if count > room or self.buffer.device != act.device:
            rows = _BUFFER // act.shape[1]
            self.buffer = torch.empty(rows, act.shape[1], dtype=wide(act[:0]).dtype, device=act.device)
            self.scratch = torch.empty_like(self.buffer)
            self._places = {}

    def _keep(self, act: Tensor) -> Tensor:
        count = act.shape[0]
        place = self._places.get((self.filled, count))
        if place is None:
            place = self.buffer.narrow(0, self.filled, count)
            if len(self._places) < _PLACES:
                self._places[self.filled, count] = place
        self.filled += count
        return place.copy_(act)

    def _take_moments(self) -> None:
        if self.filled:
            self._add_moments(self.buffer[: self.filled], self.scratch[: self.filled])
            self.filled = 0

    def _add_moments(self, act: Tensor, scratch: Tensor | None) -> None:
        total = act.sum(0)
        scratch = torch.sub(act, total / len(act), out=scratch)
        spread = scratch.square_().sum(0)  # var_mean, aminmax and count_nonzero are ten times slower
        fired = torch.sign(act, out=scratch).abs_().sum(0)
        size = torch.abs(act, out=scratch).sum(0)
        self.counts.append(len(act))
        self.moments.append((fired, size, total, spread, act.amin(0), act.amax(0)))
        if len(self.counts) == _MERGED:
            self.moments, self.counts = [self.merged()], [sum(self.counts)]

    def merged(self) -> tuple[Tensor, ...]:
        """The moments of all passes as those of one (parallel variance, Chan et al. 1979)."""
        fired, size, total, spread, low, high = (
            stacked.to(_exact(stacked)) for stacked in map(torch.stack, zip(*self.moments, strict=True))
        )
        count = torch.tensor(self.counts, dtype=total.dtype, device=total.device)[:, None]
        between = count * (total / count - total.sum(0) / count.sum()).square()
        return fired.sum(0), size.sum(0), total.sum(0), (spread + between).sum(0), low.amin(0), high.amax(0)

    def condense(self) -> None:
        """Keep the moments of all passes as those of one, so that :meth:`state` is small."""
        self._take_moments()
        if len(self.counts) > 1:
            self.moments, self.counts = [self.merged()], [sum(self.counts)]

    def read(self) -> dict[str, Tensor]:
        """The fields of :class:`Stats` that one observation point gives, on the CPU."""
        self._take_moments()
        fired, size, total, spread, low, high = (t.cpu().double() for t in self.merged())
        return {
            "firing_rate": fired / self.count,
            "mean": total / self.count,
            "mean_abs": size / self.count,
            "variance": spread / self.count,
            "minimum": low,
            "maximum": high,
            **({} if self.firing is None else self.firing.read()),
        }


class Gradients:
    """Mean absolute gradients of sampled passes; one that is not finite (a loss scaler's overflow) does not count.

    Sums are kept and divided when they are read: on a CPU a mean costs several times as much.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.passes: list[Tensor] = []
        self.counts: list[int] = []
        self.earlier: Tensor | None = None  # (1 + width,): how many passes were merged, and their sum

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        passes = torch.stack(self.passes).cpu() if self.passes else None
        earlier = None if self.earlier is None else _copied(self.earlier)
        return {"passes": passes, "counts": list(self.counts), "earlier": earlier}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        passes, earlier = state["passes"], state["earlier"]
        self.passes = [] if passes is None else list(passes.to(device, copy=True).unbind())
        self.counts = list(state.get("counts", [1] * len(self.passes)))
        self.earlier = None if earlier is None else earlier.to(device, copy=True)

    def add(self, sums: Tensor, count: int) -> None:
        """Add one pass: sums of ``count`` absolute gradients of each unit, ``(width,)``."""
        self.passes.append(sums)
        self.counts.append(count)
        if len(self.passes) == _MERGED:
            self.earlier = self.merged()
            self.passes, self.counts = [], []

    def merged(self) -> Tensor:
        """How many finite passes there were, and their sum: ``(1 + width,)``."""
        table = torch.stack(self.passes)
        table = table.to(_exact(table))
        table /= torch.tensor(self.counts, dtype=table.dtype, device=table.device)[:, None]
        good = table.isfinite().all(1, keepdim=True)
        total = torch.cat([good.to(table.dtype), torch.where(good, table, 0.0)], 1).sum(0)
        return total if self.earlier is None else total + self.earlier

    def mean(self, width: int) -> Tensor:
        """``(width,)``, on the CPU; NaN if nothing counted."""
        total = self.merged() if self.passes else self.earlier
        if total is None:
            return torch.full((width,), float("nan"), dtype=torch.double)
        values = total.cpu().double()
        return values[1:] / values[0]


def _thinned(act: Tensor) -> Tensor:
    """At most 256 rows, spread over all of them; a view."""
    return act[:: max(1, len(act) // _KEPT)][:_KEPT]


def _exact(values: Tensor) -> torch.dtype:
    """The widest type that the device has."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def joined(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several consumers that read different values of the units: a unit is as alive as its liveliest reader."""
    result = dict(seen[0])
    for other in seen[1:]:
        for key, value in other.items():
            if key != "mean":
                result[key] = (torch.minimum if key in ("minimum", "silence") else torch.maximum)(result[key], value)
    return result
