"""By how many units a layer may widen: what methods that grow share."""

from __future__ import annotations

from recycle.methods.selection import Units


def check_width(method: str, count: int, most: int | None) -> None:
    """Raise a ValueError unless these are a number of units and a width."""
    if count < 1 or (most is not None and most < 2):
        raise ValueError(f"{method} needs count >= 1 and most >= 2 (or None), got count={count}, most={most}")


def room(group: Units, count: int, most: int | None) -> int:
    """Units that the layer gains: ``count``, or fewer where it would become wider than ``most``."""
    return count if most is None else max(0, min(count, most - group.width))


def in_pairs(group: Units, count: int, most: int | None) -> int:
    """As :func:`room`, an even number: at least two, if there is room for two."""
    return room(group, count + count % 2, None if most is None else most - (most - group.width) % 2)
