"""Widen layers with random units that say nothing yet (Butler 2022, "On the fly expansion of linear layers")."""

from dataclasses import dataclass
from functools import cache, partial

from recycle.births import Birth, revive, zero_out
from recycle.edits import Edit, Grow
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.methods.widths import check_width, room
from recycle.stats import Stats


@dataclass(frozen=True)
class Expand:
    """Add units with random incoming and zero outgoing weights: the output stays exactly as it was.

    The first update moves their outgoing weights, the second one the incoming ones too.
    """

    count: int = 1
    """Units that each layer gains at an event."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    active: float | None = None
    """Share of the latest inputs on which a newborn is positive, by its bias (see revive); None: incoming weights are
    the module's own initialisation, of which some units may never fire."""

    def __post_init__(self) -> None:
        check_fields(self, "expand")
        check_width("expand", self.count, self.most)
        if self.active is not None and not 0 < self.active < 1:
            raise ValueError(f"expand needs 0 < active < 1 (or None), got active={self.active}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it reads."""
        return () if self.active is None else ("inputs",)

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One growth."""
        count = room(group, self.count, self.most)
        return [Grow(count, _birth(self.active))] if count else []


@cache
def _birth(active: float | None) -> Birth:
    return zero_out if active is None else partial(revive, active=active)
