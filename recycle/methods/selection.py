"""Which units are dead, and which live ones can be their parents: what several methods share."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from recycle.edits import Fold
from recycle.graph import NotRecyclable
from recycle.samples import steepest
from recycle.stats import Stats

Parent = Literal["utility", "gradient", "random", "eigenvalue"]
NEEDED_BY: dict[Parent, tuple[str, ...]] = {
    "utility": ("outgoing_norm",),
    "gradient": ("weight_gradient",),
    "random": (),
    "eigenvalue": ("sample",),
}
"""Statistics that each way of choosing parents reads."""


class Units(Protocol):
    """The part of a group that a method may look at."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def homogeneous(self) -> bool: ...  # noqa: D102
    @property
    def why_not_foldable(self) -> str: ...  # noqa: D102
    @property
    def exact(self) -> bool: ...  # noqa: D102
    @property
    def why(self) -> str: ...  # noqa: D102
    @property
    def why_fixed(self) -> str: ...  # noqa: D102


class Resizable(Units, Protocol):
    """The part of a group that a method which chooses among layers may look at."""

    @property
    def why_fixed(self) -> str: ...  # noqa: D102
    @property
    def parameters(self) -> int: ...  # noqa: D102
    def cost(self, count: int = 1) -> int: ...  # noqa: D102


def match(group: Units, stats: Stats, tau: float, by: Parent) -> tuple[list[int], list[int], list[Fold]]:
    """Parents, the slots to overwrite with their children, and what to fold first: one parent for each slot.

    Where fewer units live than died, the rest of the slots waits for the next event.
    """
    slots = idle(group, stats, tau)
    chosen = parents(group, stats, slots, by)
    slots = slots[: len(chosen)]
    return chosen.tolist(), slots.tolist(), fold(group, stats, slots)


def idle(group: Units, stats: Stats, tau: float) -> Tensor:
    """Units to recycle, the deadest first: dead ones, and with ``tau`` > 0 those whose score is at most ``tau``."""
    chosen = (stats.dead & ~stuck(group, stats)) | (~stats.dead & (stats.score <= tau) & (tau > 0))
    units = chosen.nonzero()[:, 0]
    return units[torch.argsort(stats.score[units], stable=True)]


def stuck(group: Units, stats: Stats) -> Tensor:
    """Dead units whose constant is not zero and cannot be folded into their consumers' biases: ``(width,)``, bool.

    Or cannot yet: behind a BatchNorm whose running statistics still move. Overwriting one would change the output.
    """
    loose = torch.zeros_like(stats.dead) if stats.settled is None else ~stats.settled
    return stats.dead & (stats.maximum != 0) & (loose | (group.why_not_foldable != ""))


def fold(group: Units, stats: Stats, units: Tensor) -> list[Fold]:
    """Keep what these units contribute on average, in their consumers' biases; nothing for units that are zero."""
    units = units[(stats.minimum[units] != 0) | (stats.maximum[units] != 0)]
    if not len(units) or group.why_not_foldable:
        return []
    return [Fold(units.tolist(), stats.mean[units].tolist())]


def parents(group: Units, stats: Stats, slots: Tensor, by: Parent) -> Tensor:
    """Live units, the best first and each at most once, to be parents of ``slots``: ``(at most len(slots),)``.

    Args:
        group: what the units are.
        stats: the group's statistics.
        slots: units about to be overwritten.
        by: ``"utility"`` (mean |activation| times outgoing norm), ``"gradient"`` (of the incoming weights),
            ``"eigenvalue"`` (the most negative one of the splitting matrix, see :func:`recycle.samples.steepest`) or
            ``"random"``.
    """
    live = ~stats.dead
    live[slots] = False
    units = live.nonzero()[:, 0] if len(slots) else slots
    if not len(units):
        return units
    if by == "random":
        order = torch.randperm(len(units), generator=stats.generator)
    else:
        value = (
            stats.utility
            if by == "utility"
            else stats.weight_gradient
            if by == "gradient"
            else -steepest_descent(group, stats, 0.3)[0]
        )
        order = torch.argsort(value[units], descending=True, stable=True)
    return units[order][: len(slots)]


def steepest_descent(group: Units, stats: Stats, softness: float) -> tuple[Tensor, Tensor]:
    """:func:`recycle.samples.steepest` of the latest pass.

    Raises:
        NotRecyclable: the units are not ReLU-like, so that the smoothed hinge says nothing about them.
    """
    if not group.homogeneous:
        raise NotRecyclable(
            f"the splitting matrix is smoothed for ReLU-like units, those of {group.name!r} are not. Choose parents by "
            "utility, gradient or random"
        )
    assert stats.sample is not None
    return steepest(stats.sample, softness, stats.generator)
