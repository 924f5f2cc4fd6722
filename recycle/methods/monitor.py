"""Watch and change nothing: the control that every comparison needs."""

from dataclasses import dataclass
from typing import ClassVar

from recycle.edits import Edit
from recycle.methods.selection import Units
from recycle.stats import Stats


@dataclass(frozen=True)
class Monitor:
    """Report dead units and leave them dead."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """No edit."""
        return []
