"""Growth on a schedule: when, where and by how many units layers widen, within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from recycle.births import revive
from recycle.edits import Edit, Grow, Prune, born, fewer
from recycle.graph import NotRecyclable
from recycle.kinds import check_fields
from recycle.methods.budget import Budget
from recycle.methods.selection import Resizable, Units, fold, idle
from recycle.methods.triggers import WORDS, Score, Trigger, trigger
from recycle.stats import Stats

FEWEST = 2
"""No layer is pruned below so many units."""


@dataclass(eq=False)
class _Plan:
    """What the present event is about to do, and what outlives it."""

    last: int = 0
    """The event of the latest growth, 0 if there was none."""
    units: int = 0
    """How many units there were at the first event."""
    event: int = 0
    groups: Sequence[Resizable] = ()
    allotted: dict[str, int] = field(default_factory=dict)
    given: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def begin(self, groups: Sequence[Resizable]) -> None:
        """Forget the event before."""
        self.groups, self.allotted, self.given, self.refused = groups, {}, {}, {}


@dataclass(frozen=True)
class Growth:
    """Widen layers while they train: ``when`` a trigger says so, within a budget.

    Alone it adds units with zero outgoing weights, so that the output stays as it was. Named with a method that
    proposes units (``grow+gradmax`` on the command line, ``Growth(GradMax())`` in Python) it asks that one instead,
    only in layers that are to grow, and cuts what is over ``count`` or the budget.

    With ``prune`` a layer gives units once the budget is spent and others take as many: a layer does one or the other
    at an event. Where a single layer is all there is, recycle its dead units in place instead (``redo``, ``revive``).
    Every network of a model (actor and critic) has a schedule and a budget of its own.
    """

    by: Any = None
    """In Python: the method that proposes the units, in place of ``birth``. On the command line: grow+METHOD."""
    when: str | Trigger = "rank:0.9"
    """``every:EVENTS``; ``rank:SHARE``: the numerical rank of a layer's activations is that share of its width;
    ``plateau:NAME[,PATIENCE[,THRESHOLD[,min|max]]]``: a recorded quantity has not improved by the relative threshold
    (.01) for so many events (5), under ``RecycleCallback`` ``train/value_loss``, ``rollout/ep_rew_mean`` (with
    ``max``) or whatever else stable-baselines3 logs; ``score[:RELATIVE[,ABSOLUTE]]``: the proposing method's score of
    a layer is above both (.03, .0025)."""
    where: Literal["each", "best"] = "each"
    """``each`` layer of which the trigger says so, or the ``best``: that which it values most; of equals the
    narrowest."""
    count: float | None = None
    """Units that a layer gains at an event, at most; below 1 a share of its width, at least one unit. None: the
    ``count`` of the proposing method, 1 if it has none. Births in pairs need an even one."""
    birth: Literal["init", "revive"] = "init"
    """Incoming weights of the newborns: as the module initialises them, or a random direction with its hinge in the
    latest inputs (see the method ``revive``)."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    budget: int | None = None
    """Units of all watched layers of a network together, at most; None: no bound, or with ``prune`` (and no
    ``parameters``) as many as there are at the first event."""
    parameters: int | None = None
    """Parameters of a whole network, at most; None: no bound."""
    prune: Literal["none", "dead", "utility"] = "none"
    """What makes room once the budget is spent: nothing; ``dead`` units, exactly; or ``utility``: dead ones, then those
    of least utility relative to their layer's mean, whose mean contribution is folded into the next biases."""
    maturity: int = 1000
    """Updates that a live unit has had before ``prune:utility`` judges it; newborns begin with no utility at all."""
    cooldown: int = 0
    """Events after a growth in which the network does not grow."""

    _trigger: Trigger = field(init=False, repr=False, compare=False)
    _plan: _Plan = field(default_factory=_Plan, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "grow")
        _check(self)
        chosen = trigger(self.when) if isinstance(self.when, str) else self.when
        if isinstance(chosen, Score) and chosen.score is None:
            scoring = getattr(self.by, "score", None)
            chosen = replace(chosen, score=scoring if callable(scoring) else None)
        object.__setattr__(self, "_trigger", chosen)

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it reads."""
        read = [*self._trigger.needs, *(self.by.needs if self.by is not None else ())]
        read += ["inputs"] * (self.birth == "revive")
        read += ["mean_abs", "minimum", "maximum", "outgoing_norm", "age"] * (self.prune != "none")
        return tuple(dict.fromkeys(read))

    @property
    def lacks(self) -> str:
        """What is missing for it to do anything, or ""."""
        if isinstance(self._trigger, Score) and self._trigger.score is None:
            named = "no method proposes units" if self.by is None else f"{type(self.by).__name__} has none"
            return f"grow: when=score needs score(group, stats) of the method that proposes units, and {named}"
        return str(getattr(self.by, "lacks", ""))

    @property
    def examples(self) -> Any:
        """By which the proposing method sees where the network is wrong; None where it has none."""
        return getattr(self.by, "examples", None)

    def for_network(self, name: str) -> Growth:
        """The same growth of one of several networks."""
        return replace(self, by=self.by.for_network(name)) if hasattr(self.by, "for_network") else self

    # -- deciding ------------------------------------------------------------------------------------------

    def survey(self, groups: Sequence[Resizable], stats: Mapping[str, Stats]) -> list[str]:
        """Decide which layers grow and which make room, before any is edited; returns the order in which to edit.

        Layers that give units come first. Of those that take some, what wants most comes first if another method
        proposes the units: it may know nothing of a layer whose neighbour has just been resized. Otherwise the last in
        the network does: ``revive`` looks at what a layer read, which has other columns once the one before is wider.

        Args:
            groups: all that are watched, in forward order.
            stats: of those that may be edited now, by name.
        """
        plan = self._plan
        plan.begin(groups)
        names = [group.name for group in groups]
        if not stats:
            return names
        plan.event = next(iter(stats.values())).event
        plan.units = plan.units or sum(group.width for group in groups)
        try:
            wishes = self._trigger([group for group in groups if group.name in stats], stats)
        except NotRecyclable as error:
            plan.refused = dict.fromkeys(stats, str(error))
            return names
        if wishes and not (plan.last and plan.event - plan.last <= self.cooldown):
            self._allot(wishes, stats)
        first = [*plan.given, *(plan.allotted if self.by is not None else ())]
        return [*first, *(name for name in reversed(names) if name not in first)]

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Prune, or propose as many units as were allotted and there is room for now."""
        plan = self._plan
        if group.name in plan.refused:
            raise NotRecyclable(plan.refused[group.name])
        if group.name in plan.given:
            units = plan.given[group.name]
            return [*fold(group, stats, torch.tensor(units)), Prune(units)]
        if group.name not in plan.allotted:
            return []
        layer = next(each for each in plan.groups if each.name == group.name)
        room = self._budget.room(layer, plan.groups, plan.allotted[group.name])
        if not room:  # others gave less than was planned
            raise NotRecyclable(self._spent)
        wanted = [Grow(room, revive if self.birth == "revive" else None)] if self.by is None else self.by(group, stats)
        if wanted and not any(map(born, wanted)):
            made = ", ".join(sorted({type(edit).__name__ for edit in wanted}))
            raise NotRecyclable(f"it is to grow, but {type(self.by).__name__} proposes no new unit (only {made})")
        edits: list[Edit] = []
        for proposed in wanted:
            edit = fewer(proposed, room)
            if born(edit) or not born(proposed):
                edits.append(edit)
            room -= born(edit)
        if edits:
            plan.last = plan.event
        return edits

    def _allot(self, wishes: Mapping[str, float], stats: Mapping[str, Stats]) -> None:
        """Say how many units each wishing layer gets, the one that wants most first, and who makes room for them."""
        plan = self._plan
        wishing = sorted((g for g in plan.groups if g.name in wishes), key=lambda g: (-wishes[g.name], g.width))
        plan.refused = {group.name: why for group in wishing if (why := self._why_not(group))}
        able = [group for group in wishing if group.name not in plan.refused]
        takers = able[:1] if self.where == "best" else able
        wanted = [self._wanted(group) for group in takers]
        shares = self._budget.shares(takers, plan.groups, wanted)
        if sum(shares) < sum(wanted) and self.prune != "none":
            takers, shares = self._make_room(able, self._spare(stats))
        plan.allotted = {group.name: share for group, share in zip(takers, shares, strict=True) if share}
        plan.refused |= {group.name: self._spent for group, share in zip(takers, shares, strict=True) if not share}

    def _wanted(self, group: Resizable) -> int:
        """Units that a layer gains at an event if the network has room."""
        given = float(getattr(self.by, "count", 1)) if self.count is None else self.count
        count = int(given) if given >= 1 else max(1, round(given * group.width))
        return count if self.most is None else min(count, self.most - group.width)

    def _why_not(self, group: Resizable) -> str:
        if group.why_fixed:
            return f"it is to grow, but cannot change its width: {group.why_fixed}"
        if self.most is not None and group.width >= self.most:
            return f"it is to grow, but has its most={self.most} units already"
        return ""

    @property
    def _budget(self) -> Budget:
        kept = self._plan.units if self.prune != "none" and self.parameters is None else None
        return Budget(self.most, kept if self.budget is None else self.budget, self.parameters)

    @property
    def _spent(self) -> str:
        return f"it is to grow, but there is no room for another unit ({self._budget})"

    # -- making room ---------------------------------------------------------------------------------------

    def _spare(self, stats: Mapping[str, Stats]) -> list[tuple[float, str, int]]:
        """Units that can go, the first to go first: utility relative to the layer's mean (dead: -1), layer, unit."""
        found = []
        for group in self._plan.groups:
            if group.name not in stats or group.why_fixed:
                continue
            seen = stats[group.name]
            worth = dict.fromkeys(idle(group, seen, 0.0).tolist(), -1.0)
            if self.prune == "utility":
                relative = seen.utility / seen.utility.mean().clamp_min(1e-12)
                judged = ~seen.dead & (seen.age >= self.maturity)
                worth |= {unit: float(relative[unit]) for unit in judged.nonzero()[:, 0].tolist()}
            own = sorted((value, group.name, unit) for unit, value in worth.items())
            found += own[: max(0, group.width - FEWEST)]
        return sorted(found)

    def _make_room(
        self, able: Sequence[Resizable], spare: Sequence[tuple[float, str, int]]
    ) -> tuple[list[Resizable], list[int]]:
        """Let layers give what others lack; returns those that take, and how many units each.

        Layers with dead units of their own give them. If all others are to grow, only the first of them does.
        """
        plan = self._plan
        with_dead = {name for worth, name, _ in spare if worth < 0}
        plan.refused |= {
            group.name: "it is to grow, but there is no room for another unit, and it has dead ones of its own"
            for group in able
            if group.name in with_dead
        }
        takers = [group for group in able if group.name not in with_dead]
        givers = {name for _, name, _ in spare} - {group.name for group in takers}
        if self.where == "best" or not givers:
            takers = takers[:1]
        wanted = [self._wanted(group) for group in takers]
        lacking = sum(wanted) - sum(self._budget.shares(takers, plan.groups, wanted))
        names = {group.name for group in takers}
        for _, name, unit in [one for one in spare if one[1] not in names][:lacking]:
            plan.given.setdefault(name, []).append(unit)
            plan.refused.pop(name, None)
        return takers, wanted

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from event to event, its trigger and the proposing method included."""
        parts = {"trigger": self._trigger, "by": self.by}
        return {"last": self._plan.last, "units": self._plan.units} | {
            name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._plan.last, self._plan.units = int(state["last"]), int(state["units"])
        for name, part in {"trigger": self._trigger, "by": self.by}.items():
            if hasattr(part, "load_state_dict") and name in state:
                part.load_state_dict(state[name])


def _check(growth: Growth) -> None:
    if growth.by is not None and (isinstance(growth.by, (str, type)) or not callable(growth.by)):
        raise ValueError(f"grow: by is a method such as GradMax(), got {growth.by!r}. By name write grow+METHOD")
    if growth.by is not None and growth.birth != "init":
        name = type(growth.by).__name__
        raise ValueError(f"grow: {name} says what is born, so birth={growth.birth!r} would be ignored")
    if getattr(growth.by, "layer_cost", None) is not None:
        name = type(growth.by).__name__
        raise ValueError(f"grow: it widens layers, so layer_cost of {name} would be ignored")
    if getattr(growth.by, "deepen", 0):
        raise ValueError(f"grow: it widens layers, so deepen of {type(growth.by).__name__} would be ignored")
    if not isinstance(growth.when, str) and not hasattr(growth.when, "needs"):
        raise ValueError(f"grow: when is one of {WORDS}, or a Trigger; got {growth.when!r}")
    count = 1 if growth.count is None else growth.count
    if not 0 < count < math.inf or (count > 1 and count != int(count)):
        raise ValueError(f"grow: count is a whole number of units, or a share of the width below 1; got {count}")
    for name in ("most", "budget", "parameters"):
        value = getattr(growth, name)
        if value is not None and value < FEWEST:
            raise ValueError(f"grow: {name} is at least {FEWEST}, got {value}")
    if growth.cooldown < 0 or growth.maturity < 0:
        raise ValueError(
            "grow: cooldown counts events and maturity updates, 0 or more, "
            f"got cooldown={growth.cooldown}, maturity={growth.maturity}"
        )
