"""Split the units that learn most, remove those that learn nothing: two cutoffs on the gradient of each unit."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recycle.edits import Edit, Prune, Split
from recycle.kinds import check_fields
from recycle.methods.selection import Units, fold
from recycle.stats import Stats


@dataclass(frozen=True)
class GradientCutoff:
    """Compare each unit's mean absolute gradient over the window (of its incoming weights) with two cutoffs.

    At constant width a unit at or below ``remove`` gives its place to half of one above ``split``, the least useful
    to the busiest; what it said on average is folded into its consumers' biases. With ``resize`` units really go and
    come, within ``least`` and ``most``.

    A live unit whose gradient is exactly zero although its consumers listen is not removed: the loss did not ask for
    what it feeds (an action that was not sampled), which says nothing about the unit.
    """

    split: float = 2.0
    """Units whose gradient is above this are split."""
    remove: float = 0.01
    """Units whose gradient is at most this are removed."""
    relative: bool = True
    """Cutoffs are multiples of the layer's mean gradient; False: absolute, in the loss's units per weight."""
    resize: bool = False
    """Change the width instead of filling freed places."""
    least: int = 8
    """With ``resize``: never fewer units than this."""
    most: int = 1024
    """With ``resize``: never more."""
    share: float = 0.5
    """Part of the parent's outgoing weights that the newborn takes."""
    noise: float = 0.1
    """Length of the antisymmetric noise on the incoming weights, relative to the row."""

    needs: ClassVar[tuple[str, ...]] = ("weight_gradient", "mean_abs", "minimum", "maximum", "outgoing_norm")

    def __post_init__(self) -> None:
        check_fields(self, "gradient_cutoff")
        if not 0 <= self.remove < self.split:
            raise ValueError(f"gradient_cutoff needs 0 <= remove < split, got remove={self.remove}, split={self.split}")
        if not 2 <= self.least <= self.most or not 0 <= self.share < 1 or not self.noise >= 0:
            raise ValueError(
                "gradient_cutoff needs 2 <= least <= most, 0 <= share < 1 and noise >= 0, got "
                f"least={self.least}, most={self.most}, share={self.share}, noise={self.noise}"
            )

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the removed units say, then split the busiest into their places, or prune and widen."""
        gradient = stats.weight_gradient
        scale = gradient.mean().clamp_min(torch.finfo(gradient.dtype).tiny) if self.relative else 1.0
        idle = (gradient <= self.remove * scale) & ~unasked(stats)
        slots = _sorted(idle, gradient)
        busy = _sorted(gradient > self.split * scale, -gradient)
        if not self.resize:
            count = min(len(slots), len(busy))
            slots, busy = slots[:count], busy[:count]
        else:
            slots = slots[: max(0, group.width - self.least)]
            busy = busy[: max(0, self.most - group.width + len(slots))]
        edits: list[Edit] = [*fold(group, stats, slots)]
        if self.resize and len(slots):
            edits.append(Prune(slots.tolist()))
        if len(busy):
            into = None if self.resize else slots.tolist()
            edits.append(Split(busy.tolist(), into, share=self.share, noise=self.noise))
        return edits


def unasked(stats: Stats) -> Tensor:
    """Live units that consumers listen to and that nevertheless got a gradient of exactly zero: ``(width,)``, bool."""
    return ~stats.dead & (stats.mean_abs > 0) & (stats.outgoing_norm > 0) & (stats.weight_gradient == 0)


def _sorted(chosen: Tensor, by: Tensor) -> Tensor:
    units = chosen.nonzero()[:, 0]
    return units[torch.argsort(by[units], stable=True)]
