"""What one pass showed on both sides of a layer's units: what makes them read, and what those that read them need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from recycle.graph import Axis, UnitGroup
from recycle.samples import patches

_PASSES = 256
"""Samples of a pass that are kept; of images and sequences an eighth of that."""
_ROWS = 2048
"""Rows of each consumer, at most."""
_NUMBERS = 2**24
"""Numbers of :attr:`Branch.inputs`, at most: 128 MiB."""
_FEWEST = 16
"""Values of each unit that are needed to see whether a consumer reads a function of the pre-activations."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True, eq=False)
class Branch:
    """One consumer, float64, on the CPU. A row is a sample; of a convolution, one of its output's positions.

    A new unit with incoming weights w (its bias last) and outgoing weights v (some for each tap) adds ``sum over taps
    of v[tap] * slope * inputs[row, tap] @ w`` to the consumer's output, where its activation has that slope.
    """

    inputs: Tensor
    """What a new unit's weights would meet, ``(rows, taps, fan_in)``, the last for its bias where it has one. A Linear
    has one tap, behind a flatten one for each position; a convolution has one for each place of its kernel."""
    activations: Tensor
    """All that the consumer reads, with a last column of ones where it has a bias: ``(rows, inputs)``."""
    gradient: Tensor
    """Gradient of the loss at the consumer's output, ``(rows, outputs)``; the rows stand for the whole batch."""
    taps_first: bool
    """Whether a unit's outgoing elements are ordered by tap, then output (a Linear's columns); or by output, then
    tap."""

    def paired(self, gradient: Tensor) -> Tensor:
        """``gradient`` times what new units would bring, summed over rows: ``(a unit's outgoing elements, fan_in)``."""
        pairs = torch.einsum("no,ntf->tof" if self.taps_first else "no,ntf->otf", gradient, self.inputs)
        return pairs.flatten(0, 1)

    def left_over(self) -> Tensor:
        """The part of the gradient that no change of the consumer's own weights would take away.

        Nothing where there are no more rows than inputs: such weights explain all of it.
        """
        held = self.activations
        best: Tensor = torch.linalg.lstsq(held, self.gradient, driver="gelsd").solution
        left = self.gradient - held @ best
        return left if float(left.norm()) > 1e-8 * float(self.gradient.norm()) else torch.zeros_like(left)


@dataclass(frozen=True, eq=False)
class Junction:
    """A layer's units, between the Linear or convolution that makes them and all that read them place by place."""

    branches: tuple[Branch, ...]
    """One for each of the group's outgoing axes."""

    def paired(self, gradients: Sequence[Tensor]) -> Tensor:
        """:meth:`Branch.paired` of all branches, one below the other."""
        return torch.cat([branch.paired(g) for branch, g in zip(self.branches, gradients, strict=True)])


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one consumer read and was told, on the samples that were kept."""

    layer: nn.Module
    index: Tensor  # inputs of each unit, (width, span)
    inputs: Tensor
    gradient: Tensor


class Crossing:
    """Keeps, by hooks, what one pass shows on both sides of a group's units.

    ``why`` says why that cannot be had for this group; "" where it can.
    """

    def __init__(self, group: UnitGroup) -> None:
        self.group = group
        made, readers = group.producers(), group.readers()
        weights = [axis for axis in group.incoming if axis.role == "weight"]
        self.why = ""
        if isinstance(readers, str):
            self.why = readers
        elif len(made) != 1 or len(weights) != 1:
            self.why = "the units are not made by one Linear or convolution alone"
        elif group.norms():
            self.why = f"{group.norms()[0].name!r} normalises the units"
        self.clear()

    @property
    def _readers(self) -> list[tuple[nn.Module, Axis]]:
        found = self.group.readers()  # as they are now: a resize moves entries
        return [] if isinstance(found, str) else found

    def clear(self) -> None:
        """Forget the pass."""
        self._made: tuple[Tensor, Tensor] | None = None
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    def points(self) -> list[tuple[nn.Module, Any]]:
        """Layers, and what to call with what they read and gave."""
        if self.why:
            return []
        layer = self.group.producers()[0][0]
        return [(layer, self._keep_made), *((at, partial(self._keep_read, axis.name)) for at, axis in self._readers)]

    def _keep_made(self, inputs: Tensor, output: Tensor) -> None:
        self.clear()
        self._made = _few(inputs, output.dim()), _few(output, output.dim())

    def _keep_read(self, name: str, inputs: Tensor, output: Tensor) -> None:
        if self._made is not None and inputs.requires_grad:  # or else the units learn nothing from this one
            output.register_hook(partial(self._keep_told, name, _few(inputs, self._dims)))  # type: ignore[no-untyped-call]

    @property
    def _dims(self) -> int:
        return 2 if self._made is None else self._made[1].dim()

    def _keep_told(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        kept = _few(gradient, self._dims)
        self._read[name] = inputs, kept * (len(gradient) / max(1, len(kept)))

    def junction(self) -> Junction | str:
        """The rows, or why they are not known."""
        if self.why:
            return self.why
        if self._made is None or len(self._read) < len(self._readers):
            return "no sampled pass showed what the consumers of these units read and need since it was last resized"
        ((layer, own),) = self.group.producers()
        kept = [_Reading(at, axis.index, *self._read[axis.name]) for at, axis in self._readers]
        return as_junction(layer, own.index[:, 0], *self._made, kept)

    def follow(self, resized: UnitGroup, kept: Sequence[int], width: int) -> None:
        """Another group was resized, or this one, which had that width: new unit i was unit ``kept[i]``, or is new
        where that is -1.

        What new units of another group say, and would be told, was not seen: it is taken to be zero.
        """
        born = torch.tensor([i for i, unit in enumerate(kept) if unit < 0], dtype=torch.long)
        if resized is self.group or [unit for unit in kept if unit >= 0] != list(range(width)):
            self.clear()
        if self._made is None:
            return
        ((layer, own),) = self.group.producers()
        (x, z), read = self._made, dict(self._read)
        for axis in resized.outgoing:
            places = axis.index[born].flatten()
            if axis.name == own.name:
                x = _with_zeros(layer, x, places)
            for at, reader in self._readers:
                if axis.name == reader.name and reader.name in read:
                    read[reader.name] = _with_zeros(at, read[reader.name][0], places), read[reader.name][1]
        for axis in resized.incoming:
            places = axis.index[born].flatten()
            if axis.name == own.name:
                z = _with_zeros(layer, z, places)
            for at, reader in self._readers:
                if axis.name == reader.name and reader.name in read:
                    read[reader.name] = read[reader.name][0], _with_zeros(at, read[reader.name][1], places)
        self._made, self._read = (x, z), read

    def state(self) -> dict[str, Any]:
        """Plain tensors."""
        made = None if self._made is None else [t.cpu().clone() for t in self._made]
        return {"made": made, "read": {name: [t.cpu().clone() for t in kept] for name, kept in self._read.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._made = None if state["made"] is None else (state["made"][0].clone(), state["made"][1].clone())
        self._read = {name: (x.clone(), g.clone()) for name, (x, g) in state["read"].items()}


def _with_zeros(layer: nn.Module, values: Tensor, places: Tensor) -> Tensor:
    """Zeros at these places among the features that a layer reads or gives, the others in order behind one another."""
    dim = values.dim() - len(getattr(layer, "kernel_size", ())) - 1
    old = torch.ones(values.shape[dim] + len(places), dtype=torch.bool)
    old[places] = False
    shape = [len(old) if d == dim else n for d, n in enumerate(values.shape)]
    return values.new_zeros(shape).index_copy_(dim, old.nonzero()[:, 0].to(values.device), values)


def _few(values: Tensor, dims: int) -> Tensor:
    """A copy of some of a batch, spread over it: the same samples of all tensors of one pass."""
    most = _PASSES if dims == 2 else _PASSES // 8
    return values.detach()[:: max(1, -(-len(values) // most))].clone()


def as_junction(
    layer: nn.Module, units: Tensor, inputs: Tensor, outputs: Tensor, readings: Sequence[_Reading]
) -> Junction | str:
    """Rows of what hooks kept of one pass, or why they cannot be had.

    That each consumer reads a function of the pre-activations, place by place, is seen from the values: in the order
    of its pre-activations a unit's activations turn at most once (those of SiLU and GELU do).

    Args:
        layer: makes the units.
        units: which of its outputs they are, ``(width,)``.
        inputs: what it read, ``(samples, ...)``.
        outputs: what it gave, ``(samples, ...)``.
        readings: of all consumers, on the same samples.
    """
    z = outputs.double().cpu()
    x = inputs.double().cpu()
    if isinstance(layer, nn.Linear):
        made, before = x.movedim(-1, 1), z.movedim(-1, 1)
    elif _plain(layer) and z.dim() == len(layer.kernel_size) + 2:
        rows = patches(layer, x)
        made, before = rows.reshape(len(x), *z.shape[2:], -1).movedim(-1, 1), z
    else:
        return f"there is no closed form for units of this {type(layer).__name__}"
    if layer.bias is not None:
        made = torch.cat([made, torch.ones_like(made[:, :1])], 1)
    branches = []
    for reading in readings:
        branch = _branch(reading, made, before[:, units])
        if isinstance(branch, str):
            return branch
        branches.append(branch)
    return Junction(tuple(branches))


def _branch(reading: _Reading, made: Tensor, before: Tensor) -> Branch | str:
    """``made`` and ``before`` are ``(samples, fan_in or units, *places)``."""
    layer, index = reading.layer, reading.index
    inputs, gradient = reading.inputs.double().cpu(), reading.gradient.double().cpu()
    places, kind = before[0, 0].numel(), type(layer).__name__
    if len(before) * places < _FEWEST:
        return f"{len(before) * places} values of each unit are too few, {_FEWEST} are needed"
    if len(inputs) != len(before):
        return f"what a {kind} reads of the units is no function of what is made in the same place"
    same_rank = inputs.dim() == before.dim() and index.shape[1] == 1
    if isinstance(layer, nn.Linear) and same_rank:
        inputs, gradient = inputs.movedim(-1, 1), gradient.movedim(-1, 1)
        after = inputs[:, index[:, 0]]
        taps, read, told = _rows(made)[:, None], _rows(inputs), _rows(gradient)
    elif isinstance(layer, nn.Linear) and inputs.dim() == 2 and index.shape[1] == places:  # behind a flatten
        after = inputs[:, index]
        before = before.flatten(2)
        taps, read, told = made.flatten(2).transpose(1, 2), inputs, gradient
    elif _plain(layer) and same_rank:
        after = inputs[:, index[:, 0]]
        size = math.prod(layer.kernel_size)
        most = max(1, _NUMBERS // (made[0].numel() * size))
        if after.shape == before.shape:
            taps = patches(layer, made[:most]).reshape(-1, made.shape[1], size).transpose(1, 2)
        read, told = patches(layer, inputs[:most]), _rows(gradient[:most]) * (len(made) / len(made[:most]))
    else:
        return f"there is no closed form for units that this {kind} reads"
    if after.shape != before.shape or not _one_function(before, after):
        return f"what a {kind} reads of the units is no function of what is made in the same place"
    if layer.bias is not None:
        read = torch.cat([read, torch.ones_like(read[:, :1])], 1)
    thin = max(1, -(-len(taps) // _ROWS), -(-taps.numel() // _NUMBERS))
    told = told[::thin] * (len(told) / len(told[::thin]))
    return Branch(taps[::thin], read[::thin], told, isinstance(layer, nn.Linear))


def _rows(values: Tensor) -> Tensor:
    """``(samples, features, *places)`` as ``(samples * places, features)``."""
    return values.movedim(1, -1).flatten(0, -2)


def _one_function(before: Tensor, after: Tensor) -> bool:
    """Whether a unit's activations, in the order of its pre-activations, turn at most once: ``(samples, units, *)``."""
    z, h = (t.movedim(1, 0).flatten(1) for t in (before, after))
    ordered = h.gather(1, z.argsort(1))
    travel = ordered.diff(dim=1).abs().sum(1)
    span = ordered.amax(1) - ordered.amin(1)
    return bool((travel <= 2 * span * (1 + 1e-5)).all()) and bool((span > 0).any())


def _plain(layer: nn.Module) -> TypeGuard[Convolution]:
    return (
        isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
