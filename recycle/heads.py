"""Whole attention heads beside the other groups: what was found coarsely takes the place of its parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from recycle.graph import Axis, UnitGroup

Place = tuple[tuple[str, int], ...]


def place(group: UnitGroup) -> Place:
    """The tensors, and their axes, that the units of a group live in."""
    return tuple((axis.name, axis.dim) for axis in (*group.incoming, *group.outgoing))


def beyond(blocks: Sequence[UnitGroup], groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """The exact groups among ``blocks`` that are none of ``groups``: heads."""
    found = [b for b in blocks if b.exact and not any(_same(b, g) for g in groups)]
    return [head for head in found if not any(head.name == g.name for g in apart(groups, found))]


def apart(groups: Sequence[UnitGroup], heads: Sequence[UnitGroup]) -> list[UnitGroup]:
    """The groups that share no element with ``heads``."""
    return [group for group in groups if not any(_share(head, group) for head in heads)]


def with_heads(
    heads: Sequence[UnitGroup], groups: Sequence[UnitGroup], frozen: Mapping[str, str], still: Collection[str]
) -> tuple[list[UnitGroup], dict[str, str]]:
    """``heads`` in place of the groups that they consist of, and what is frozen beside them.

    ``still``: names that are frozen where heads are units. No element then belongs to units of two groups.
    """
    kept = sorted([*heads, *apart(groups, heads)], key=lambda group: group.first)
    made = {axis.name for head in heads for axis in head.incoming if _all_told(head.tensor(axis.name), axis, kept)}
    return kept, {name: why for name, why in frozen.items() if name in still or not _among(name, made)}


def _same(one: UnitGroup, other: UnitGroup) -> bool:
    if place(one) != place(other) or one.width != other.width:
        return False
    pairs = zip((*one.incoming, *one.outgoing), (*other.incoming, *other.outgoing), strict=True)
    return all(torch.equal(a.index, b.index) for a, b in pairs)


def _share(head: UnitGroup, group: UnitGroup) -> bool:
    """Whether some entries belong to units of both."""
    return any(
        a.name == b.name and a.dim == b.dim and bool(torch.isin(a.index, b.index).any())
        for a in head.incoming
        for b in group.incoming
    )


def _all_told(tensor: Tensor, axis: Axis, groups: Sequence[UnitGroup]) -> bool:
    """Whether every entry along the axis belongs to some unit."""
    own = [a.index.flatten() for g in groups for a in g.incoming if a.name == axis.name and a.dim == axis.dim]
    return len(torch.unique(torch.cat(own))) == tensor.shape[axis.dim]


def _among(name: str, weights: Collection[str]) -> bool:
    """Whether ``name`` stands for one of these parameters, or a part of it."""
    path = name.partition("[")[0].partition(" ")[0]
    return path in weights or f"{path}.weight" in weights
