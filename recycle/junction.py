"""What one pass showed on both sides of a layer's units: what makes them read, and what those that read them need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recycle.graph import UnitGroup
from recycle.rows import Look, Pass
from recycle.samples import is_plain_convolution, patches

_ROWS = 2048
"""Rows of each consumer, at most."""
_NUMBERS = 2**24
"""Numbers of :attr:`Branch.inputs`, at most: 128 MiB."""
_FEWEST = 16
"""Values of each unit that are needed to see whether a consumer reads a function of the pre-activations."""


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


def looks(group: UnitGroup) -> list[Look]:
    """Where to look for a :class:`Junction`: at the layer that makes the units, and at those that read them."""
    readers = group.readers()
    if isinstance(readers, str) or _why_not(group):
        return []
    ((layer, axis),) = group.producers()
    made = [Look(layer, axis.name, said=True)]
    return made + [Look(at, name, told=True) for name, at in {axis.name: at for at, axis in readers}.items()]


def _why_not(group: UnitGroup) -> str:
    """Why hooks cannot see both sides of a group's units; "" where they can."""
    readers = group.readers()
    weights = [axis for axis in group.incoming if axis.role == "weight"]
    if isinstance(readers, str):
        return readers
    if len(group.producers()) != 1 or len(weights) != 1:
        return "the units are not made by one Linear or convolution alone"
    return f"{group.norms()[0].name!r} normalises the units" if group.norms() else ""


def junction_of(group: UnitGroup, passes: Sequence[Pass]) -> Junction | str:
    """The rows of the latest pass that was kept, or why they are not known."""
    why, readers = _why_not(group), group.readers()
    if why or isinstance(readers, str):
        return why
    if not passes:
        return "no sampled pass showed what the consumers of these units read and need since it was last resized"
    here = passes[-1]
    ((layer, own),) = group.producers()
    made = here.readings[own.name]
    assert made.said is not None
    kept = []
    for at, axis in readers:  # as they are now: a resize moves entries
        seen = here.readings[axis.name]
        assert seen.told is not None
        kept.append(_Reading(at, axis.index, seen.read, seen.told * (here.size / max(1, len(seen.told)))))
    return as_junction(layer, own.index[:, 0], made.read, made.said, kept)


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
    elif is_plain_convolution(layer) and z.dim() == len(layer.kernel_size) + 2:
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
    elif is_plain_convolution(layer) and same_rank:
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
