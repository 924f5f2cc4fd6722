"""Reset as many random units as another run recycled: the control for all but *which* units are recycled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from recycle.edits import Edit, Reset
from recycle.graph import NotRecyclable
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.stats import Stats


@dataclass(frozen=True)
class Replay:
    """At each event, reset as many random units of a group as another run's event of that number recycled there.

    Both runs must have events at the same steps: the same ``every``, copies of the environment and rollout length.
    As with ``random``, live units lose what they contributed.
    """

    path: str | Path = ""
    """The other run's ``edits.jsonl``, as ``RecycleCallback`` writes it; without one nothing is done."""
    network: str = ""
    """Whose lines count, ``"policy"`` or ``"critic"`` say; the callback fills it in. Empty: the file's only one."""

    needs: ClassVar[tuple[str, ...]] = ()
    _counts: dict[str, dict[str, dict[int, int]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "replay")
        if self.path:
            self._counts.update(_recycled(Path(self.path)))
            if self.network and self.network not in self._counts:
                raise ValueError(f"replay: {self.path} has no network {self.network!r}, only {', '.join(self._counts)}")

    @property
    def lacks(self) -> str:
        """What is missing for it to do anything, or ""."""
        return "" if self.path else "replay needs another run's file: path=.../edits.jsonl"

    def for_network(self, name: str) -> Replay:
        """The same replay of one of several networks."""
        return replace(self, network=name) if self.path and not self.network else self

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One reset of random units, as many as the file says."""
        if not self.path:
            return []
        if not self.network and len(self._counts) > 1:
            raise NotRecyclable(f"replay: {self.path} has {', '.join(self._counts)}; say which with network=")
        events = self._counts[self.network or next(iter(self._counts))]
        if group.name not in events:
            raise NotRecyclable(f"replay: {self.path} has no group {group.name!r}, only {', '.join(events)}")
        count = min(events[group.name].get(stats.event, 0), group.width)
        units = torch.randperm(group.width, generator=stats.generator)[:count]
        return [Reset(units.tolist())] if count else []


def _recycled(path: Path) -> dict[str, dict[str, dict[int, int]]]:
    """Units recycled by network, group and event."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"replay cannot read {path}: {error}") from error
    found: dict[str, dict[str, dict[int, int]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            event, groups = int(record["event"]), found.setdefault(str(record["network"]), {})
            counts = {name: int(group["recycled"]) for name, group in record["groups"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"replay: line {number} of {path} is no event of an edits.jsonl ({type(error).__name__}: {error})"
            ) from error
        for name, count in counts.items():
            if event in groups.setdefault(name, {}):
                raise ValueError(f"replay: line {number} of {path} is event {event} again: it holds more than one run")
            groups[name][event] = count
    if not found:
        raise ValueError(f"replay: {path} holds no event")
    return found
