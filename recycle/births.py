"""What the incoming weights of a newborn unit are. Its outgoing weights are always zero.

A birth is a function of :class:`Newborns` that returns one tensor for each of ``newborns.axes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle.graph import Axis, NotRecyclable


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
