"""Rows of training passes that say what a new unit would be worth: what it reads, what there is, what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recycle.graph import UnitGroup, plain
from recycle.rows import Look, Pass

ROWS = 2048
"""Examples that are kept, at most: those of the latest passes."""


@dataclass(frozen=True, eq=False)
class GrowthSample:
    """Rows of the latest sampled passes at the layer that makes a group's units and at those that read them.

    Float64, on the CPU. A row is an example (a position of a sequence); each example counts once, as it was seen last.
    """

    inputs: Tensor
    """What a unit's weights meet: ``(rows, fan_in)``, with a last column of ones where the layer has a bias."""
    activations: Tensor
    """The units as their consumers read them, ``(rows, width)``."""
    gradients: Tensor
    """Gradient of the loss at the consumers' outputs, ``(rows, outputs of all consumers)``; of a mean loss it carries
    1 / batch."""
    preactivations: Tensor
    """The units before their activation, ``(rows, width)``."""
    beside: Tensor
    """What else the consumers read: ``(rows, features)``, with a last column of ones where one has a bias."""
    biased: bool
    """Whether ``inputs`` ends with a column of ones."""


def looks(group: UnitGroup) -> list[Look]:
    """Where to look for a :class:`GrowthSample`: at the layer that makes the units, and at those that read them."""
    if why_not_sampled(group):
        return []
    ((layer, axis),) = group.producers()
    readers = [Look(at, axis.name, told=True) for at, axis in zip(_consumers(group), group.outgoing, strict=True)]
    return [Look(layer, axis.name, said=True), *readers]


def growth_of(group: UnitGroup, passes: Sequence[Pass]) -> GrowthSample | None:
    """The latest row of each example in the passes that were kept, or None where no gradient has come yet."""
    if not passes:
        return None
    ((_, own),) = group.producers()
    parts = [_parts(kept, own.name, [axis.name for axis in group.outgoing]) for kept in passes]
    whole = [part for part in parts if part and len({len(rows) for rows in part}) == 1]
    if not whole:
        return None
    inputs, before, examples, read, gradients = (torch.cat(rows)[-ROWS:] for rows in zip(*whole, strict=True))
    which = torch.unique(examples, dim=0, return_inverse=True)[1]
    rows = torch.arange(len(which))
    latest = torch.zeros(int(which.max()) + 1, dtype=torch.long)
    latest = latest.scatter_reduce_(0, which, rows, "amax").sort().values
    ones = torch.ones(len(latest), 1, dtype=torch.double)
    columns = group.outgoing[0].index[:, 0]
    other = torch.ones(read.shape[1], dtype=torch.bool)
    other[columns] = False
    biased = any(axis.role == "bias" for axis in group.incoming)
    has_bias = any(getattr(layer, "bias", None) is not None for layer in _consumers(group))
    return GrowthSample(
        inputs=torch.cat([inputs[latest], ones], 1) if biased else inputs[latest],
        activations=read[latest][:, columns],
        gradients=gradients[latest],
        preactivations=before[latest][:, own.index[:, 0]],
        beside=torch.cat([read[latest][:, other], *([ones] if has_bias else [])], 1),
        biased=biased,
    )


def _parts(kept: Pass, own: str, readers: Sequence[str]) -> list[Tensor]:
    """Inputs, pre-activations, examples, activations and gradients, row by row; none where places differ."""
    made, seen = kept.readings[own], [kept.readings[name] for name in readers]
    places = made.read.shape[:-1]
    if any(reading.read.shape[:-1] != places or reading.told is None for reading in seen):
        return []
    assert made.said is not None and kept.examples is not None
    told = [_rows(reading.told) for reading in seen if reading.told is not None]
    return [_rows(made.read), _rows(made.said), _rows(kept.examples), _rows(seen[0].read), torch.cat(told, 1)]


def why_not_sampled(group: UnitGroup) -> str:
    """Why there are no such rows of a group, or "" where there are."""
    made = [axis.name for axis in group.incoming if axis.role == "weight"]
    producers = [layer for layer, _ in group.producers()]
    if len(made) != 1 or len(producers) != 1 or not isinstance(producers[0], nn.Linear):
        return f"its units are not made by one Linear layer alone but by {', '.join(made)}"
    others = [axis.name for axis in group.incoming if axis.role not in ("weight", "bias")]
    if others:
        return f"{others[0]!r} stands between the layer and its activation"
    for axis in group.outgoing:
        layer = group.module.get_submodule(axis.name.rpartition(".")[0])
        if not (axis.hooked and isinstance(layer, nn.Linear) and plain(layer) and axis.dim == 1 and axis.span == 1):
            return f"consumer {axis.name!r} is no Linear layer with one column for each unit"
        if len(group.outgoing) > 1 and axis.size(group.tensor(axis.name)) != group.width:
            return f"consumer {axis.name!r}, one of several, reads other features beside the units"
    if len(_consumers(group)) < len(group.outgoing) or not group.one_value:
        return "its consumers read different values of it"
    return ""


def _consumers(group: UnitGroup) -> list[nn.Module]:
    layers = [group.module.get_submodule(axis.name.rpartition(".")[0]) for axis in group.outgoing]
    return list(dict.fromkeys(layers))


def _rows(values: Tensor) -> Tensor:
    """One row for each sample and position, float64, on the CPU."""
    return values.reshape(-1, values.shape[-1]).cpu().double()
