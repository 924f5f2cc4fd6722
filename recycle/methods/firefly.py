"""Widen layers with new units that were tried out first (Wu et al. 2020, "Firefly Neural Architecture Descent")."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

from recycle.births import Birth, firefly
from recycle.edits import Edit, Grow
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.methods.widths import check_width, room
from recycle.stats import Stats


@dataclass(frozen=True)
class Firefly:
    """Try several random units for each that is wanted, improve them by a few steps, keep the most promising.

    Needs the Recycler's ``loss``. The output changes by the size of their outgoing weights, which is reported. Of the
    paper's two kinds of growth only new units are tried; splits are what ``s2d`` and ``split`` make.
    """

    count: int = 1
    """Units that each layer gains at an event."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    candidates: int = 4
    """Units tried for each that is kept."""
    steps: int = 5
    """Gradient steps of each candidate; each is a pass forward and back."""
    size: float = 0.01
    """Length of their outgoing weights, relative to the mean of the layer's."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "firefly")
        check_width("firefly", self.count, self.most)
        if self.candidates < 1 or self.steps < 0 or not 0 < self.size < float("inf"):
            raise ValueError(
                "firefly needs candidates >= 1, steps >= 0 and size > 0, "
                f"got candidates={self.candidates}, steps={self.steps}, size={self.size}"
            )

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One growth."""
        count = room(group, self.count, self.most)
        return [Grow(count, _birth(self.candidates, self.steps, self.size))] if count else []


@cache
def _birth(candidates: int, steps: int, size: float) -> Birth:
    return partial(firefly, candidates=candidates, steps=steps, size=size)
