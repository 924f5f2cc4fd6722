"""How far layers may widen: each alone, all together, and the network in parameters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from recycle.methods.selection import Resizable


@dataclass(frozen=True)
class Budget:
    """Bounds on widths; None: no bound."""

    most: int | None = None
    """Units of one layer."""
    units: int | None = None
    """Units of all watched layers of a network together."""
    parameters: int | None = None
    """Parameters of a whole network."""

    def room(self, group: Resizable, groups: Sequence[Resizable], wanted: int) -> int:
        """How many of ``wanted`` more units the layer may have, as all ``groups`` are now."""
        return self.shares([group], groups, [wanted])[0]

    def shares(self, takers: Sequence[Resizable], groups: Sequence[Resizable], wanted: Sequence[int]) -> list[int]:
        """How many units each of ``takers`` may have of what it wants; the first comes first."""
        units = None if self.units is None else self.units - sum(group.width for group in groups)
        left = None if self.parameters is None or not takers else self.parameters - takers[0].parameters
        found = []
        for group, count in zip(takers, wanted, strict=True):
            if self.most is not None:
                count = min(count, self.most - group.width)
            if units is not None:
                count = min(count, units)
            count = min(max(count, 0), 2**40)
            if left is not None:
                count = bisect_right(range(1, count + 1), left, key=group.cost)  # costs rise with the count
            found.append(count)
            units = None if units is None else units - count
            left = None if left is None else left - group.cost(count)
        return found

    def __str__(self) -> str:
        given = {"most": self.most, "budget": self.units, "parameters": self.parameters}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
