"""A birth that looks at data: a random direction whose hinge lies among the latest inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle.births.newborns import Newborns
from recycle.graph import Axis


def revive(newborns: Newborns, *, active: float = 0.5) -> tuple[Tensor, ...]:
    """A random direction whose hinge lies in the data: the unit is positive on ``active`` of its latest inputs.

    Rows of weights point in a random direction and are as long as the geometric mean of a fresh row and of the live
    units' rows (medians of both). The bias puts the hinge at the quantile of what the row gives on the inputs that its
    layer read last; behind a batch normalisation, whose running statistics become those of the new row on these
    inputs, its shift does.

    Of a recurrent unit each gate's row of input weights (``weight_ih``) and its bias are made like this, gate by gate:
    on the latest inputs, with a state of zero, each gate is open, and the candidate positive, on ``active`` of them.
    The weights of the state (``weight_hh``) are the module's own initialisation, since no hook sees the states.

    So is everything but the weights where the inputs of a row are unknown, or where a unit is made by several layers
    (summed branches, a depthwise convolution), none of which alone decides when it fires.

    Source: this project; :class:`recycle.methods.revive.Revive` says when.
    """
    known = [i for i, response in enumerate(newborns.responses) if response is not None]
    owners = [axis.name.rpartition(".")[0] for axis in newborns.axes]
    weights = [i for i, axis in enumerate(newborns.axes) if axis.role == "weight"]
    aimed = known[0] if len(known) == 1 and all(owners[i] == owners[known[0]] for i in weights) else None
    made = [i for i in weights if aimed is None or i == aimed]
    born = list(newborns.fresh)
    for i in made:
        born[i] = _random_direction(newborns.draws[i]) * between_fresh_and_live(newborns.fresh[i], newborns.others[i])
    if aimed is None:
        return tuple(born)
    respond = newborns.responses[aimed]
    assert respond is not None
    values = respond(born[aimed])
    shift = -_quantile(values, active)
    for i, axis in enumerate(newborns.axes):
        if axis.role == "bias" and owners[i] == owners[aimed]:  # of a recurrent unit's two biases the first says it all
            born[i], shift = shift.unsqueeze(2), torch.zeros_like(shift)
            values = values + born[i][..., 0]
    for i, axis in enumerate(newborns.axes):
        if axis.name.endswith("running_mean"):
            _renormalise(newborns.axes, owners[i], born, values[..., 0], active)
    return tuple(born)


def _random_direction(draws: Tensor) -> Tensor:
    return draws / draws.square().sum(2, keepdim=True).sqrt().clamp_min(torch.finfo(draws.dtype).tiny)


def between_fresh_and_live(fresh: Tensor, others: Tensor) -> Tensor:
    """Between a fresh and a live row, for each row of a unit: ``(1, span, 1)``."""
    first = fresh.square().sum(2).sqrt().median(0).values
    now = others.square().sum(2).sqrt().median(0).values if len(others) else first
    return (first * now).sqrt()[None, :, None]


def _quantile(values: Tensor, active: float) -> Tensor:
    """Midway between the ``active`` largest values and the others: ``(values, ...)`` to ``(...)``."""
    above = min(max(round(active * len(values)), 0), len(values))
    ordered = values.sort(0, descending=True).values
    return (ordered[max(above - 1, 0)] + ordered[min(above, len(values) - 1)]) / 2


def _renormalise(axes: tuple[Axis, ...], norm: str, born: list[Tensor], values: Tensor, active: float) -> None:
    """Give a batch normalisation the statistics of the newborns' ``values``, and its shift the hinge."""
    variance, mean = torch.var_mean(values, 0, correction=min(1, len(values) - 1))
    gain = torch.ones_like(mean)
    for i, axis in enumerate(axes):
        if axis.name == f"{norm}.running_mean":
            born[i] = mean[:, None, None]
        elif axis.name == f"{norm}.running_var":
            born[i] = variance[:, None, None]
        elif axis.name.startswith(f"{norm}.") and axis.role == "gain":
            gain = born[i][:, 0, 0]
    hinge = (_quantile(values, active) - mean) / variance.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()
    for i, axis in enumerate(axes):
        if axis.role == "bias" and axis.name.startswith(f"{norm}."):
            born[i] = (-gain * hinge)[:, None, None]
