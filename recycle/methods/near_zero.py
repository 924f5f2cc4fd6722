"""Widen layers with units of almost no weight (a forum's "Growing network size incrementally")."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

from recycle.births import Birth, near_zero
from recycle.edits import Edit, Grow
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.methods.widths import check_width, room
from recycle.stats import Stats


@dataclass(frozen=True)
class NearZero:
    """Add units with small random weights on both sides: the output changes by the square of their size.

    How far is reported at each event. What a unit says for an input of zero (a sigmoid) is taken off its consumers'
    biases. Any hidden layer can be widened, the first included: only the number of its inputs is fixed.
    """

    count: int = 1
    """Units that each layer gains at an event."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    size: float = 0.01
    """Standard deviation of the new weights."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "near_zero")
        check_width("near_zero", self.count, self.most)
        if not 0 < self.size < float("inf"):
            raise ValueError(f"near_zero needs a size > 0, got size={self.size}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One growth."""
        count = room(group, self.count, self.most)
        return [Grow(count, _birth(self.size))] if count else []


@cache
def _birth(size: float) -> Birth:
    return partial(near_zero, size=size)
