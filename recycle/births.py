"""What the incoming weights of a newborn unit are. Its outgoing weights are always zero.

A birth is a function of :class:`Newborns` that returns one tensor for each of ``newborns.axes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle.graph import Axis, NotRecyclable
from recycle.response import Response


@dataclass(frozen=True, eq=False)
class Newborns:
    """Units about to be born, with everything that a birth may look at.

    Tensors are shaped ``(units, span, everything else)``, as :meth:`recycle.graph.Axis.read` returns them.
    """

    axes: tuple[Axis, ...]
    """The incoming axes of the group: weight rows, biases, gains, running statistics."""
    fresh: tuple[Tensor, ...]
    """What the module's own initialisation gives these units, one tensor for each axis."""
    parents: tuple[Tensor, ...] | None
    """The live elements of each newborn's parent, or None where the edit names no parents."""
    others: tuple[Tensor, ...] = ()
    """The elements of all units that stay, ``(units that stay, span, ...)``."""
    draws: tuple[Tensor, ...] = ()
    """Standard normal numbers shaped like ``fresh``; a target network's newborns get the same ones."""
    responses: tuple[Response | None, ...] = ()
    """For each axis: what rows give on the layer's latest inputs, ``(values, units, span)`` without any bias. None
    where these are unknown: for biases, recurrent weights, or where no inputs were kept."""


Birth = Callable[[Newborns], tuple[Tensor, ...]]


def like_init(newborns: Newborns) -> tuple[Tensor, ...]:
    """Start again: what the module's own initialisation would have given."""
    return newborns.fresh


def mirror(newborns: Newborns, *, norm_cap: float = 2.0) -> tuple[Tensor, ...]:
    """The parent's incoming weights and bias negated: a ReLU that fires exactly where its parent does not.

    The row is shortened to at most ``norm_cap`` times the initial row norm, which keeps the hinge where it is
    (weights and bias shrink together). Without the cap the norms of repeatedly mirrored rows grow until
    training breaks.
    """
    if newborns.parents is None:
        raise NotRecyclable("mirror needs a parent for each unit: pass Reset(units, mirror, parents=...)")
    weights = [i for i, axis in enumerate(newborns.axes) if axis.role == "weight"]
    norm = torch.stack([newborns.parents[i].square().sum((1, 2)) for i in weights]).sum(0).sqrt()
    usual = torch.stack([newborns.fresh[i].square().sum((1, 2)) for i in weights]).sum(0).sqrt().median()
    factor = (norm_cap * usual / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)[:, None, None]
    born = []
    for axis, fresh, parent in zip(newborns.axes, newborns.fresh, newborns.parents, strict=True):
        if axis.role in ("weight", "bias") or axis.name.endswith("running_mean"):
            born.append(-factor * parent)
        elif axis.name.endswith("running_var"):
            born.append(factor**2 * parent)
        else:
            born.append(parent if axis.role == "gain" else fresh)
    return tuple(born)


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
        born[i] = _random_direction(newborns.draws[i]) * _usual_length(newborns.fresh[i], newborns.others[i])
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


class Given:
    """Incoming weights that a method worked out itself, the bias last where there is one: ``(units, fan_in)``.

    Args:
        rows: of the newborns, in their order. Their layer must be made of one weight, with at most a bias.
        usual_length: scale each row so that its weights are as long as those of :func:`revive`, between a fresh and a
            live row. For ReLU-like units, whose hinge that leaves where it is.
    """

    def __init__(self, rows: Tensor, usual_length: bool = False) -> None:
        self.rows, self.usual_length = rows, usual_length

    def __call__(self, newborns: Newborns) -> tuple[Tensor, ...]:
        """The rows, as the newborns' layer holds them."""
        roles = [axis.role for axis in newborns.axes]
        if roles.count("weight") != 1 or roles.count("bias") > 1 or set(roles) - {"weight", "bias"}:
            raise NotRecyclable(f"given rows are for units with one weight and at most a bias, these have {roles}")
        at = roles.index("weight")
        size, own = newborns.fresh[at][0].numel(), newborns.fresh[at]
        if tuple(self.rows.shape) != (len(own), size + roles.count("bias")):
            raise NotRecyclable(
                f"{len(own)} newborns with {size} weights and {roles.count('bias')} biases each got rows of shape "
                f"{tuple(self.rows.shape)}"
            )
        rows = self.rows.to(own)
        if self.usual_length:
            norm = rows[:, :size].norm(dim=1, keepdim=True)
            usual = _usual_length(own, newborns.others[at]).reshape(-1)[0]
            rows = rows * torch.where(norm > 0, usual / norm, 1.0)
        weights, bias = rows[:, :size].reshape_as(own), rows[:, size:]
        return tuple(
            weights if role == "weight" else bias.reshape_as(f) for role, f in zip(roles, newborns.fresh, strict=True)
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Given) and self.usual_length == other.usual_length and torch.equal(self.rows, other.rows)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Given({len(self.rows)} rows)"


def _random_direction(draws: Tensor) -> Tensor:
    return draws / draws.square().sum(2, keepdim=True).sqrt().clamp_min(torch.finfo(draws.dtype).tiny)


def _usual_length(fresh: Tensor, others: Tensor) -> Tensor:
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
