"""What one event saw and did: prints, compares, and becomes JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from recycle import metrics
from recycle.edits import Edit, describe, resizes
from recycle.graph import UnitGroup
from recycle.interventions import Intervention
from recycle.names import did_you_mean
from recycle.stats import Stats


@dataclass(frozen=True)
class GroupReport:
    """One group at one event. Fractions are of its units, over the window that just ended."""

    width: int
    samples: int
    dead: float = math.nan
    """Dead before this event's edits."""
    dead_after: float = math.nan
    """Dead and not recycled at this event."""
    certified: float = math.nan
    """Dead for every possible input, before this event's edits; NaN where no bounds were computed."""
    dormant: float = math.nan
    constant: float = math.nan
    saturated: float = math.nan
    gradient_silent: float = math.nan
    effective_rank: float = math.nan
    duplicates: float = math.nan
    width_after: int = 0
    """Units after this event's edits."""
    recycled: int = 0
    """Units overwritten at this event; those that came or went are the difference of the widths."""
    unparted: int = 0
    """Units recycled from a parent that are still its copies: their incoming weights have a cosine above .98."""
    re_died: int = 0
    """Units recycled (overwritten) at an earlier event that were found dead again, each counted once; one that came
    when its layer grew was not dead before."""
    resemblance: float = math.nan
    """Mean cosine of the incoming weights of recycled units with those of the parents they came from, over all that
    still have their parent; falls from event to event as they part. NaN where there is none."""
    re_death_age: float = math.nan
    """Updates from birth until found dead again, the mean over :attr:`re_died`: at most an event too long."""
    note: str = ""
    """Why nothing, or less than asked, was done."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupReport) and json.dumps(asdict(self)) == json.dumps(asdict(other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Report:
    """What one :meth:`Recycler.step` saw and did. Prints, compares, and becomes JSON."""

    event: int
    groups: dict[str, GroupReport]
    edits: tuple[tuple[str, Edit], ...] = field(default=())
    """Group name and edit, in the order in which they were made."""
    interventions: tuple[Intervention, ...] = ()
    """What was done to whole layers, after the edits."""
    note: str = ""
    """Why nothing, or less than asked, was done to the network as a whole."""
    jumps: dict[int, float] = field(default_factory=dict)
    """How far the output moved on one batch, relative to its norm (the farthest of several outputs): at 0 by this
    event; at 5, 20, 50, 200 since just before the *previous* event, so many updates after it, learning
    included (compare with ``monitor``). Empty without a ``probe``; counts that this event came before are missing."""

    @property
    def recycled(self) -> int:
        """Units overwritten in all groups."""
        return sum(group.recycled for group in self.groups.values())

    @property
    def units(self) -> int:
        """Units of all groups, after the event's edits."""
        return sum(group.width_after for group in self.groups.values())

    @property
    def re_died(self) -> int:
        """Recycled units that died again, in all groups."""
        return sum(group.re_died for group in self.groups.values())

    def fraction(self, quantity: str) -> float:
        """``dead``, ``dormant``, ... over all units of all groups that were observed; NaN if none was."""
        known = [f.name for f in fields(GroupReport) if f.type == "float"]
        if quantity not in known:
            raise ValueError(f"a report has no fraction {quantity!r}: {did_you_mean(str(quantity), known)}")
        seen = [(getattr(g, quantity), g.width) for g in self.groups.values() if not math.isnan(getattr(g, quantity))]
        return sum(v * w for v, w in seen) / sum(w for _, w in seen) if seen else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; a quantity that was not observed is None."""
        groups = {
            name: {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(group).items()}
            for name, group in self.groups.items()
        }
        edits = [{"group": name, **describe(edit)} for name, edit in self.edits]
        found = {"event": self.event, "groups": groups, "edits": edits}
        if self.interventions:
            found["interventions"] = [describe(intervention) for intervention in self.interventions]
        if self.jumps:
            found["jumps"] = {str(updates): jump for updates, jump in self.jumps.items()}
        return found | ({"note": self.note} if self.note else {})

    def to_json(self) -> str:
        """:meth:`to_dict` on one line."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        dead = self.fraction("dead")
        seen = "nothing was observed" if math.isnan(dead) else f"{dead:.1%} were dead"
        head = f"event {self.event}: {self.recycled} units recycled, {seen}"
        size = max(map(len, self.groups), default=0)
        lines = [
            f"  {name.ljust(size)}  {g.width:5d}{_resized(g)} units  dead {g.dead:6.1%}{_certified(g)}  "
            f"dormant {g.dormant:6.1%}  recycled {g.recycled}{'  ' + g.note if g.note else ''}"
            for name, g in self.groups.items()
        ]
        whole = [f"  {describe(intervention)}" for intervention in self.interventions]
        return "\n".join([head, *lines, *whole, *([f"  {self.note}"] if self.note else [])])


def _resized(group: GroupReport) -> str:
    return f" -> {group.width_after}" if group.width_after not in (0, group.width) else ""


def _certified(group: GroupReport) -> str:
    return "" if math.isnan(group.certified) else f" observed, {group.certified:6.1%} certified"


def before(
    group: UnitGroup, stats: Stats, newborn: Tensor, parent: Tensor, note: str, certified: float = math.nan
) -> GroupReport:
    """What was seen of a group, before any edit.

    Args:
        group: the units.
        stats: their window.
        newborn: which were recycled and have not been found dead since, ``(width,)``.
        parent: the unit that each came from, or -1, ``(width,)``.
        note: why nothing will be done.
        certified: part that is dead for every possible input.
    """
    if not stats.samples or not stats.finite:
        return GroupReport(group.width, stats.samples, certified=certified, width_after=group.width, note=note)
    again = newborn & stats.dead
    children = (parent >= 0).nonzero()[:, 0]
    cosines = metrics.resemblance(group, children, parent[children])
    return GroupReport(
        group.width,
        stats.samples,
        certified=certified,
        dead=metrics.dead(stats),
        dead_after=metrics.dead(stats),
        dormant=metrics.dormant(stats),
        constant=metrics.constant(stats),
        saturated=metrics.saturated(stats),
        gradient_silent=metrics.gradient_silent(stats),
        effective_rank=math.nan if stats.activations is None else metrics.effective_rank(stats.activations),
        duplicates=float(metrics.duplicates(group).double().mean()),
        width_after=group.width,
        unparted=int((cosines > metrics.TWIN).sum()),
        re_died=int(again.sum()),
        resemblance=float(cosines.mean()) if len(children) else math.nan,
        re_death_age=float(stats.age[again].mean()) if again.any() else math.nan,
        note=note,
    )


def after(seen: GroupReport, stats: Stats, edits: list[Edit], note: str, width: int) -> GroupReport:
    """What was seen, and what the edits made of it; ``width`` is the group's now."""
    left = stats.dead.clone()
    left[[slot for edit in edits for slot in edit.slots]] = False
    dead = math.nan if math.isnan(seen.dead) else float(left.sum()) / width
    removed = {slot for edit in edits if resizes(edit) for slot in edit.slots}
    recycled = {slot for edit in edits for slot in edit.slots} - removed  # a constant is folded before it is removed
    return replace(seen, dead_after=dead, width_after=width, recycled=len(recycled), note=note)
