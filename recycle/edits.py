"""Edits of single units, as data: printed, compared, logged, tested alone, and replayed on target networks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor

from recycle.births import Birth
from recycle.kinds import check_fields, unit_numbers


@dataclass(frozen=True)
class Split:
    """Give each slot a copy of a live parent and divide the parent's outgoing weights between the two.

    The output stays as it was if the slot's consumers saw zero from it (and ``noise`` is 0).

    Args:
        parents: live units, one for each slot; a unit may be named more than once.
        into: slots to overwrite. None widens the layer: the newborns come behind its units, in this order.
        share: part of the parent's outgoing weights that the newborn takes, in [0, 1); of several newborns of one
            parent each takes it of what is left. None: the parent and its newborns take equal parts (Net2Net).
        noise: length of the noise on the incoming weights, relative to the row's norm. It is antisymmetric
            (newborn and parent move apart so that the output changes to second order only) and the rows keep
            their norm.
        balanced: multiply incoming *and* outgoing weights by the square root of the share instead. For ReLU-like
            units SGD, momentum and weight decay then stay on the unsplit trajectory. Refused for others.
        rescale: first balance the parent's incoming and outgoing norms without changing its function. ReLU-like
            units only.
        along: a direction for each parent, in which newborn and parent move apart instead of a random one: one number
            for each incoming weight, and a last one for the bias where there is one. ``noise`` says how far; norms
            are not kept. Only for units with one weight tensor and at most a bias.
        moments: ``"fresh"`` gives the newborn the optimizer's initial state and leaves the parent's alone: the
            two part. ``"transform"`` gives both the state that they would have had: the two hardly part.
    """

    parents: Sequence[int]
    into: Sequence[int] | None = None
    share: float | None = field(default=0.5, kw_only=True)
    noise: float = field(default=0.0, kw_only=True)
    balanced: bool = field(default=False, kw_only=True)
    rescale: bool = field(default=False, kw_only=True)
    along: Sequence[Sequence[float]] | None = field(default=None, kw_only=True)
    moments: Literal["fresh", "transform"] = field(default="fresh", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", unit_numbers(self.parents, "Split's parents"))
        if self.into is not None:
            object.__setattr__(self, "into", unit_numbers(self.into, "Split's slots"))
        if isinstance(self.along, Tensor):
            object.__setattr__(self, "along", self.along.tolist())
        check_fields(self)
        if self.along is not None:
            object.__setattr__(self, "along", tuple(tuple(map(float, row)) for row in self.along))

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit overwrites."""
        return self.into or ()

    def only(self, keep: Collection[int]) -> Split:
        """The same edit for those of its slots that are in ``keep``."""
        if self.into is None:
            return self
        slots = self.slots
        kept = [i for i, slot in enumerate(slots) if slot in keep]
        along = None if self.along is None else [self.along[i] for i in kept]
        return replace(self, parents=[self.parents[i] for i in kept], into=[slots[i] for i in kept], along=along)


@dataclass(frozen=True)
class Reset:
    """Give units fresh incoming weights and silence their outgoing ones.

    Args:
        units: units to overwrite.
        birth: where the incoming weights come from, see :mod:`recycle.births`; None: the module's own
            initialisation.
        parents: one live unit for each, for births that look at one.
        weights: False leaves all weights as they are, so that only the optimizer forgets the units.
        warm: second moments of the incoming weights begin at this part of the median of the units that stay, in
            [0, 1]; 0: at the optimizer's initial value. With no second moment to divide by, and a ``step`` that is
            large already, Adam's steps are up to 6.5 times the learning rate.
    """

    units: Sequence[int]
    birth: Birth | None = None
    parents: Sequence[int] | None = field(default=None, kw_only=True)
    weights: bool = field(default=True, kw_only=True)
    warm: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", unit_numbers(self.units, "Reset's units"))
        object.__setattr__(
            self, "parents", None if self.parents is None else unit_numbers(self.parents, "Reset's parents")
        )
        check_fields(self)
        _check_birth(self.birth)

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit overwrites."""
        return self.units

    def only(self, keep: Collection[int]) -> Reset:
        """The same edit for those of its units that are in ``keep``."""
        kept = [i for i, unit in enumerate(self.units) if unit in keep]
        parents = None if self.parents is None else [self.parents[i] for i in kept]
        return replace(self, units=[self.units[i] for i in kept], parents=parents)


@dataclass(frozen=True)
class Fold:
    """Move what constant units contribute into their consumers' biases, and silence their outgoing weights.

    Exact for a unit whose output is always ``means[i]``; otherwise the mean contribution is kept.
    Refused where a consumer has no bias or pads its input with zeros.
    """

    units: Sequence[int]
    means: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", unit_numbers(self.units, "Fold's units"))
        if isinstance(self.means, Tensor):
            object.__setattr__(self, "means", self.means.tolist())
        check_fields(self)
        object.__setattr__(self, "means", tuple(map(float, self.means)))

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit overwrites."""
        return self.units

    def only(self, keep: Collection[int]) -> Fold:
        """The same edit for those of its units that are in ``keep``."""
        kept = [i for i, unit in enumerate(self.units) if unit in keep]
        return replace(self, units=[self.units[i] for i in kept], means=[self.means[i] for i in kept])


@dataclass(frozen=True)
class Prune:
    """Remove units for good: tensors shrink, modules' ``in_features``, ``out_features``, ... follow.

    The units that stay move up: unit ``u`` becomes ``u`` minus the number of units removed before it. The output
    stays as it was if the consumers saw zero from the units (:class:`Fold` a constant first).
    """

    units: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", unit_numbers(self.units, "Prune's units"))

    @property
    def slots(self) -> Sequence[int]:
        """Units that the edit removes."""
        return self.units

    def only(self, keep: Collection[int]) -> Prune:
        """The same edit for those of its units that are in ``keep``."""
        return replace(self, units=[unit for unit in self.units if unit in keep])


@dataclass(frozen=True)
class Grow:
    """Widen a layer by ``count`` units with fresh incoming and zero outgoing weights: the output stays as it was.

    Refused where a new unit would be zero on both sides, or two would be equal on both: such units never learn.

    Args:
        count: how many; they come behind the layer's units.
        birth: where the weights come from, see :mod:`recycle.births`; None: the module's own initialisation. Some
            births say outgoing weights too, and some of those change the output a little (near_zero, tiny, firefly).
        parents: one live unit for each, for births that look at one.
    """

    count: int
    birth: Birth | None = None
    parents: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "parents", None if self.parents is None else unit_numbers(self.parents, "Grow's parents")
        )
        check_fields(self)
        _check_birth(self.birth)

    @property
    def slots(self) -> Sequence[int]:
        """None: no unit is overwritten."""
        return ()

    def only(self, keep: Collection[int]) -> Grow:
        """The same edit: it overwrites no unit that could be left out."""
        return self


@dataclass(frozen=True)
class Merge:
    """The inverse of a :class:`Split`: the parent takes over the child's outgoing weights, the child is removed.

    Exact where the two have the same incoming weights, or, for ReLU-like units, one is the other times a positive
    number. Later units move up by one.
    """

    child: int
    parent: int

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slots(self) -> Sequence[int]:
        """The unit that the edit removes."""
        return (self.child,)

    def only(self, keep: Collection[int]) -> Merge | Prune:
        """The same edit, or none at all if its child is not in ``keep``."""
        return self if self.child in keep else Prune(())


Edit: TypeAlias = Split | Reset | Fold | Prune | Grow | Merge


def resizes(edit: Edit) -> bool:
    """Whether the edit changes how many units there are."""
    return isinstance(edit, (Prune, Grow, Merge)) or (isinstance(edit, Split) and edit.into is None)


def kept(edit: Edit, width: int) -> list[int]:
    """Which of a group's units stand where after an edit: old numbers in the new order, -1 for a newborn."""
    gone = set(edit.slots) if resizes(edit) else set()
    return [u for u in range(width) if u not in gone] + [-1] * born(edit)


def born(edit: Edit) -> int:
    """How many units the edit adds to its group."""
    if isinstance(edit, Grow):
        return edit.count
    return len(edit.parents) if isinstance(edit, Split) and edit.into is None else 0


def fewer(edit: Edit, most: int) -> Edit:
    """The same edit with the first ``most`` of its newborns; an edit that adds no unit is returned as it is."""
    if born(edit) <= most:
        return edit
    if isinstance(edit, Grow):
        first = getattr(edit.birth, "first", None)  # a birth that knows its units one by one
        birth = edit.birth if first is None else first(most)
        return replace(edit, count=most, birth=birth, parents=None if edit.parents is None else edit.parents[:most])
    assert isinstance(edit, Split)
    return replace(edit, parents=edit.parents[:most], along=None if edit.along is None else edit.along[:most])


def renumbered(edit: Edit, now: Mapping[int, int]) -> Edit:
    """The same edit where unit ``u`` is called ``now[u]``.

    Raises:
        KeyError: it names a unit that ``now`` lacks.
    """
    changes: dict[str, Any] = {}
    for key, value in vars(edit).items():
        if key in ("units", "parents", "into") and value is not None:
            changes[key] = [now[unit] for unit in value]
        elif key in ("child", "parent"):
            changes[key] = now[value]
    return replace(edit, **changes)


def describe(edit: Any) -> dict[str, Any]:
    """An edit of units or layers as plain numbers and strings, for JSON."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(edit).items() if v is not None}
    if "along" in values:
        values["along"] = "given"
    if "birth" in values:
        birth = values["birth"]
        options = ", ".join(f"{k}={v}" for k, v in getattr(birth, "keywords", {}).items())
        named = getattr(birth, "func", birth)
        values["birth"] = getattr(named, "__name__", type(named).__name__) + (f"({options})" if options else "")
    return {"edit": type(edit).__name__, **values}


def _check_birth(birth: Birth | None) -> None:
    if isinstance(birth, type):
        raise TypeError(f"a birth is a function that makes weights, got the class {birth.__name__}; see recycle.births")
