"""Reset units chosen by chance: the control that asks whether it matters *which* units are recycled."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.stats import Stats


@dataclass(frozen=True)
class Random:
    """Reset random units, dead or alive. Live units lose what they contributed, so this changes the output."""

    count: int | None = None
    """Units a group and event; None: as many as are dead."""
    weights: bool = True
    """False: only the optimizer forgets them, weights stay and so does the output: the control that asks whether it
    is the fresh moments that help."""

    needs: ClassVar[tuple[str, ...]] = ("minimum", "maximum")

    def __post_init__(self) -> None:
        check_fields(self, "random")
        if self.count is not None and self.count < 0:
            raise ValueError(f"random resets count >= 0 units, got count={self.count}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One reset of ``count`` random units."""
        count = int(stats.dead.sum()) if self.count is None else min(self.count, group.width)
        units = torch.randperm(group.width, generator=stats.generator)[:count]
        return [Reset(units.tolist(), weights=self.weights)] if count else []
