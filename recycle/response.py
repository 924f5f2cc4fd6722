"""What incoming weights would give on the inputs that their layer read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from recycle.graph import Axis, UnitGroup

Response = Callable[[Tensor], Tensor]
"""Rows, as :meth:`recycle.graph.Axis.read` returns them, -> ``(values, units, span)``, without any bias."""


def responses(group: UnitGroup, units: Tensor, inputs: dict[str, Tensor]) -> tuple[Response | None, ...]:
    """For each incoming axis: what rows in the places of ``units`` give on ``inputs``; None where those are unknown.

    Args:
        group: the units' group.
        units: places of the rows; a grouped convolution reads other channels in each.
        inputs: by weight, see :attr:`recycle.stats.Stats.inputs`.
    """
    layers = {axis.name: layer for layer, axis in group.fed()}
    return tuple(
        partial(_respond, layers[axis.name], axis, group.tensor(axis.name), units, inputs[axis.name])
        if axis.name in layers and axis.name in inputs
        else None
        for axis in group.incoming
    )


def _respond(layer: nn.Module, axis: Axis, weight: Tensor, units: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
    """A copy of the layer runs with these rows, so that padding, strides and groups are its own; hooks see nothing."""
    filled = torch.zeros_like(weight)
    axis.write(filled, units, rows)
    inputs = inputs.to(filled)
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        output = inputs @ filled.T
    else:
        twin = copy.copy(layer)
        twin._parameters = {"weight": nn.Parameter(filled), "bias": None}
        output = type(layer).forward(twin, inputs).detach()
    channels_last = output.movedim(1, -1).flatten(0, -2)
    return channels_last[:, axis.entries(units, output.device)].reshape(-1, len(units), axis.span)
