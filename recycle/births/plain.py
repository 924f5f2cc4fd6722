"""Births that need no data: fresh weights, mirrors of live units, and new units that cancel or hardly speak."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle.births.newborns import Born, Newborns
from recycle.graph import NotRecyclable


def like_init(newborns: Newborns) -> tuple[Tensor, ...]:
    """Start again: what the module's own initialisation would have given."""
    return newborns.fresh


def zero_out(newborns: Newborns) -> tuple[Tensor, ...]:
    """Random incoming weights, zero outgoing ones: the output stays as it was, and the first update moves the latter.

    Source: Butler 2022, "On the fly expansion of linear layers".
    """
    return newborns.fresh


def near_zero(newborns: Newborns, *, size: float = 0.01) -> Born:
    """Small random numbers on both sides, normal with the standard deviation ``size``.

    The output changes by O(size^2): a unit that gives something for an input of zero (a sigmoid) has that taken off
    its consumers' biases. Both sides get gradients of O(size) only, so these units start more slowly than those of
    :func:`zero_out`. Refused behind a normalisation, which would undo the small incoming weights.

    Source: "Growing network size incrementally", a question in the MXNet forum; the compensation is this project's.
    """
    newborns.refuse_normalised("near_zero")
    rows = tuple(
        size * draw if axis.role in ("weight", "bias") else fresh
        for axis, draw, fresh in zip(newborns.axes, newborns.draws, newborns.fresh, strict=True)
    )
    return Born(rows, tuple(size * draw for draw in newborns.sent), rest=newborns.at_rest(0.0)[1], exact=False)


def paired(newborns: Newborns, *, scale: float = 1.0) -> Born:
    """Two units with the same fresh incoming weights and opposite outgoing ones: exact, and both sides get gradients.

    Outgoing weights are random, as long as ``scale`` times the mean of the units that stay. Updates of the incoming
    weights part the two, in opposite directions.
    """
    count = len(newborns.fresh[0])
    if count % 2:
        raise NotRecyclable(f"paired makes two units at a time: Grow an even number, got {count}")
    half = count // 2
    rows = tuple(torch.cat([fresh[:half], fresh[:half]]) for fresh in newborns.fresh)
    sent = newborns.outgoing_of_length(tuple(draw[:half] for draw in newborns.sent), scale)
    return Born(rows, tuple(torch.cat([part, -part]) for part in sent))


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
