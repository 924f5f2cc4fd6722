"""What layers read, said and were told on sampled training passes: the one place that keeps rows, for whatever use.

Who needs rows says at which layers to look (a :class:`Look` each) and how long to keep them (:class:`Record`), and
reads them with a function of the passes that were kept. The hooks are those of :class:`recycle.track.Tracker`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recycle.graph import UnitGroup

_SAMPLES = 256
"""Samples of a pass that are kept; an eighth of images, of sequences, and of samples of many numbers."""
_NUMBERS = 4096
"""Numbers of one sample that are not many."""


@dataclass(frozen=True, eq=False)
class Look:
    """A layer of which rows are kept: what it reads, and what else is asked for."""

    layer: nn.Module
    name: str
    """Path of its weight."""
    said: bool = False
    """Keep what it says as well."""
    told: bool = False
    """Keep the gradient of the loss at what it says as well."""


@dataclass(eq=False)
class Reading:
    """One layer in one pass, ``(samples, ...)`` each; all layers of a pass on the same samples."""

    read: Tensor
    said: Tensor | None = None
    told: Tensor | None = None


@dataclass(eq=False)
class Pass:
    """What the layers of one record showed."""

    size: int
    """Samples that the pass had."""
    stride: int
    """Every so manieth of them was kept."""
    resizes: int = 0
    """How often the layers had been resized until then: gradients that come later fit no more."""
    examples: Tensor | None = None
    """What tells samples of several passes apart, see :class:`Examples`."""
    readings: dict[str, Reading] = field(default_factory=dict)
    """By the names of the looks."""
    twice: bool = False
    """A layer was called twice, so that nobody knows which call belongs to this pass."""

    @property
    def rows(self) -> int:
        """Samples and positions that were kept, of what the first layer read."""
        return math.prod(next(iter(self.readings.values())).read.shape[:-1])


class Examples:
    """Tells which samples of several passes are the same example: one for all records of a network.

    Samples are known by what the first layer of a pass reads, so that a rollout buffer or a small data set that is
    passed over again and again does not look larger than it is.
    """

    def __init__(self) -> None:
        self._latest = torch.zeros(0, 0)

    def of(self, read: Tensor, first: bool) -> Tensor:
        """What the first layer of this pass read: ``(samples, ..., features)``."""
        if first or self._latest.shape[:-1] != read.shape[:-1]:
            self._latest = read
        return self._latest


class Record:
    """Rows of layers that are looked at together, of passes that showed all that is asked for.

    Args:
        looks: in forward order; a pass begins where the first is called.
        rows: keep the latest passes that have so many rows together; 1: the latest pass alone.
        examples: tells samples of several passes apart; None: nobody asks.
        first: whether its layer is the first of those that share ``examples``.
        beside: the group between these layers, whose rows outlive the growth of others: what new units of those say,
            and would be told, was not seen and is taken to be zero. None: any resize of a layer's sides forgets rows.
    """

    def __init__(
        self,
        looks: Sequence[Look],
        *,
        rows: int = 1,
        examples: Examples | None = None,
        first: bool = False,
        beside: UnitGroup | None = None,
    ) -> None:
        self.looks = tuple(looks)
        self.rows, self.examples, self.first, self.beside = rows, examples, first, beside
        self.passes: list[Pass] = []
        """Those kept, the oldest first."""
        self._open: Pass | None = None
        self._resizes = 0

    def clear(self) -> None:
        """Forget everything."""
        self.passes.clear()
        self._open = None

    # -- hooks ---------------------------------------------------------------------------------------------

    def end(self) -> None:
        """What is called next belongs to no pass that counts."""
        self._open = None

    def see(self, look: Look, read: Tensor, output: Any) -> None:
        """A layer was called in a sampled pass."""
        beginning = look is self.looks[0]
        if beginning:
            self._open = None
        if (look.said or look.told) and not (isinstance(output, Tensor) and output.requires_grad):
            return
        values = _batched(look.layer, read)
        if beginning:
            self._open = Pass(len(values), stride(values, self.rows), self._resizes)
        here = self._open
        if here is None or not (beginning or read.requires_grad):  # or else the units learn nothing from this one
            return
        if look.name in here.readings:
            here.twice = True
            return
        reading = here.readings[look.name] = Reading(_some(values, here))
        if beginning and self.examples is not None:
            here.examples = self.examples.of(reading.read, self.first)
        if look.said:
            reading.said = _some(_batched(look.layer, output), here)
        if look.told:
            output.register_hook(partial(self._watch_gradient, here, look))
        else:
            self._keep(here)

    def _watch_gradient(self, here: Pass, look: Look, gradient: Tensor) -> None:
        here.readings[look.name].told = _some(_batched(look.layer, gradient), here)
        self._keep(here)

    def _keep(self, here: Pass) -> None:
        if here.twice or here.resizes != self._resizes:
            return
        for look in self.looks:
            reading = here.readings.get(look.name)
            if reading is None or (look.told and reading.told is None):
                return
        if here not in self.passes:
            self.passes.append(here)
            while sum(kept.rows for kept in self.passes[1:]) >= self.rows:
                del self.passes[0]

    # -- resizes and state ---------------------------------------------------------------------------------

    def follow(self, resized: UnitGroup, kept: Sequence[int], width: int) -> None:
        """A group that had that width was resized: new unit i was unit ``kept[i]``, or is new where that is -1."""
        self._open = None
        self._resizes += 1
        reads = {axis.name: axis for axis in resized.outgoing}
        makes = {axis.name: axis for axis in resized.incoming}
        touched = [look for look in self.looks if look.name in reads]
        touched += [look for look in self.looks if look.name in makes and (look.said or look.told)]
        grown = [unit for unit in kept if unit >= 0] == list(range(width))
        if touched and (self.beside is None or resized is self.beside or not grown):
            self.clear()
        born = torch.tensor([i for i, unit in enumerate(kept) if unit < 0], dtype=torch.long)
        for look in touched if self.passes else ():
            for reading in (each.readings[look.name] for each in self.passes):
                if look.name in reads:
                    reading.read = _with_zeros(look.layer, reading.read, reads[look.name].index[born].flatten())
                if look.name in makes:
                    places = makes[look.name].index[born].flatten()
                    reading.said = None if reading.said is None else _with_zeros(look.layer, reading.said, places)
                    reading.told = None if reading.told is None else _with_zeros(look.layer, reading.told, places)

    def state(self) -> list[dict[str, Any]]:
        """Plain tensors and numbers, on the CPU."""
        return [
            {
                "size": kept.size,
                "stride": kept.stride,
                "examples": _copied(kept.examples),
                "readings": {k: [_copied(r.read), _copied(r.said), _copied(r.told)] for k, r in kept.readings.items()},
            }
            for kept in self.passes
        ]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from :meth:`state`."""
        self.clear()
        for saved in state:
            kept = Pass(saved["size"], saved["stride"], self._resizes, _copied(saved["examples"]))
            for name, (read, said, told) in saved["readings"].items():
                kept.readings[name] = Reading(read.clone(), _copied(said), _copied(told))
            self.passes.append(kept)


def stride(values: Tensor, rows: int = 1) -> int:
    """Every so manieth sample of a pass is kept, so that they are spread over all of its batch.

    256 samples are kept at most, or ``rows`` where that is more; an eighth of that of images, of sequences and of
    samples of more than 4096 numbers each.

    Args:
        values: what the first layer read, ``(samples, ...)``.
        rows: see :class:`Record`.
    """
    most = max(_SAMPLES, rows)
    if values.dim() > 2 or values.shape[1] > _NUMBERS:
        most //= 8
    return max(1, -(-len(values) // most))


def inputs_of(group: UnitGroup, records: dict[str, Record]) -> dict[str, Tensor]:
    """What the layers that make a group's units read in the latest pass, :attr:`recycle.stats.Stats.inputs`."""
    found = {}
    for layer, axis in group.fed():
        for kept in records[axis.name].passes if axis.name in records else ():
            read, places = kept.readings[axis.name].read, len(getattr(layer, "kernel_size", ()))
            found[axis.name] = read.reshape(-1, *read.shape[-1 - places :]).cpu()
    return found


def _batched(layer: nn.Module, values: Tensor) -> Tensor:
    """With an axis of samples, where there is none."""
    return values[None] if values.dim() == len(getattr(layer, "kernel_size", ())) + 1 else values


def _some(values: Tensor, here: Pass) -> Tensor:
    return values.detach()[:: here.stride].clone()


def _copied(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to("cpu", copy=True)


def _with_zeros(layer: nn.Module, values: Tensor, places: Tensor) -> Tensor:
    """Zeros at these places among the features that a layer reads or gives, the others in order behind one another."""
    dim = values.dim() - len(getattr(layer, "kernel_size", ())) - 1
    old = torch.ones(values.shape[dim] + len(places), dtype=torch.bool)
    old[places] = False
    shape = [len(old) if d == dim else n for d, n in enumerate(values.shape)]
    return values.new_zeros(shape).index_copy_(dim, old.nonzero()[:, 0].to(values.device), values)
