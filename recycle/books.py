"""What is remembered of single units from event to event: who was recycled when, and from which parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.edits import Edit, Grow, Reset, Split, resizes
from recycle.graph import Graph, UnitGroup
from recycle.stats import Stats


class Books:
    """Of each group, tensors of shape ``(width,)``. Ages are the tracker's (:attr:`recycle.track.Tracker.born`)."""

    def __init__(self, graph: Graph) -> None:
        self.windows = 0
        """Windows that have ended: a look that keeps its window brings no cooldown nearer to its end."""
        self.recycled_at = {g.name: torch.full((g.width,), -1, dtype=torch.long) for g in graph}
        """Windows that had ended when a unit was recycled last, or came; -1 for never."""
        self.newborn = {g.name: torch.zeros(g.width, dtype=torch.bool) for g in graph}
        """Whether a unit was recycled and has not been found dead since."""
        self.parent = {g.name: torch.full((g.width,), -1, dtype=torch.long) for g in graph}
        """The unit that it came from, while that one is still there; or -1."""
        self.firing: dict[str, Tensor] = {}
        """Firing rates at the latest report."""

    def ready(self, group: UnitGroup, slots: Sequence[int], cooldown: int) -> list[int]:
        """Those of the slots that were not recycled at one of the last ``cooldown`` events."""
        last = self.recycled_at[group.name]
        return [slot for slot in slots if last[slot] < 0 or self.windows - int(last[slot]) > cooldown]

    def saw(self, group: UnitGroup, stats: Stats) -> None:
        """Note what a report was made of."""
        if stats.samples and stats.finite:
            self.firing[group.name] = stats.firing_rate

    def enter(self, group: UnitGroup, stats: Stats, edits: Sequence[Edit]) -> list[int] | None:
        """Note the edits of one event, which have been made.

        Returns:
            Where they resized the group, which unit stands where now: old numbers, -1 for one that came. Else None.
        """
        slots = [slot for edit in edits for slot in edit.slots]
        if stats.samples and stats.finite:
            self.newborn[group.name] &= ~stats.dead
        self.newborn[group.name][slots] = True
        parent = self.parent[group.name]
        parent[torch.isin(parent, torch.tensor(slots, dtype=torch.long))] = -1  # the parent itself is another unit now
        for edit in edits:
            if isinstance(edit, (Split, Reset)) and not resizes(edit):
                parent[list(edit.slots)] = torch.tensor(edit.parents or -1, dtype=torch.long)
        self.recycled_at[group.name][slots] = self.windows
        return self._renumber(group.name, edits) if any(map(resizes, edits)) else None

    def _renumber(self, name: str, edits: Sequence[Edit]) -> list[int]:
        """Units have other numbers now, and behind them stand newborns, which overwrote none."""
        width = len(self.parent[name])
        gone = {slot for edit in edits if resizes(edit) for slot in edit.slots}
        order = [unit for unit in range(width) if unit not in gone]
        place = torch.full((width,), -1)
        place[order] = torch.arange(len(order))
        parents: list[int] = []
        for edit in edits:
            if resizes(edit) and isinstance(edit, (Grow, Split)):
                born = len(edit.parents) if isinstance(edit, Split) else edit.count
                parents += edit.parents or [-1] * born
        old = torch.tensor([*order, *[-1] * len(parents)])
        for books, value in ((self.recycled_at, self.windows), (self.newborn, False)):
            kept = books[name][old.clamp_min(0)]
            books[name] = torch.where(old < 0, torch.full_like(kept, value), kept)
        parent = torch.cat([self.parent[name][order], torch.tensor(parents, dtype=torch.long)])
        self.parent[name] = torch.where(parent < 0, parent, place[parent.clamp_min(0)])
        self.firing.pop(name, None)
        return [int(unit) for unit in old]

    def forget(self, name: str) -> None:
        """All units of a group begin anew, as they do in a network's first pass."""
        self.newborn[name].fill_(False)
        self.parent[name].fill_(-1)

    def carry(self, name: str, before: Books, called: str) -> None:
        """Take over a group that was ``called`` so in the books of a network before its layers changed."""
        self.recycled_at[name] = before.recycled_at[called]
        self.newborn[name], self.parent[name] = before.newborn[called], before.parent[called]

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        kept = {"recycled_at": self.recycled_at, "newborn": self.newborn, "parent": self.parent, "firing": self.firing}
        return {"windows": self.windows, **{k: {n: v.clone() for n, v in of.items()} for k, of in kept.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; further entries are not looked at."""
        self.windows = int(state["windows"])
        self.recycled_at, self.newborn, self.parent, self.firing = (
            {name: values.clone() for name, values in state[key].items()}
            for key in ("recycled_at", "newborn", "parent", "firing")
        )
