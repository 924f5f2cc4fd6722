"""When layers grow: at fixed events, when a loss stops falling, when a layer uses all its width, or by a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from recycle.graph import NotRecyclable
from recycle.kinds import check_fields
from recycle.methods.selection import Resizable, Units
from recycle.metrics import numerical_rank
from recycle.stats import Stats

Scoring: TypeAlias = Callable[[Units, Stats], tuple[float, float]]
"""What growing a layer would gain: relative to what its weights could gain as they are, and in absolute terms."""


class Trigger(Protocol):
    """Says which layers may grow at an event. One that remembers something has state_dict() and load_state_dict()."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the :class:`recycle.stats.Stats` fields that it reads."""
        ...

    def __call__(self, groups: Sequence[Resizable], stats: Mapping[str, Stats]) -> dict[str, float]:
        """Name of each layer that may grow, and how much it wants to: a larger number wants more.

        It is asked once an event, about the layers that were observed. It may raise
        :class:`recycle.NotRecyclable`: then nothing grows, and the report says why.
        """
        ...


@dataclass(frozen=True)
class Every:
    """All layers, at every so many events."""

    events: int = 1

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "every")
        if self.events < 1:
            raise ValueError(f"every:N counts events, N >= 1, got {self.events}")

    def __call__(self, groups: Sequence[Resizable], stats: Mapping[str, Stats]) -> dict[str, float]:
        """All, with equal wishes."""
        return {group.name: 0.0 for group in groups if stats[group.name].event % self.events == 0}


@dataclass(frozen=True)
class Rank:
    """Layers whose activations use at least a share of their width.

    NORTH* (Maile, Rachelson, Luga and Wilson 2022) grows where the numerical rank of the activations is near the width.
    It is counted on at most 256 samples of the latest pass (no more than a minibatch), which bounds the share of
    wider layers. Dead units and duplicates lower it.
    """

    share: float = 0.9
    """Numerical rank over width from which on a layer grows, in (0, 1]."""
    tolerance: float = 0.01
    """Singular values count above this part of the largest."""

    needs: ClassVar[tuple[str, ...]] = ("activations",)

    def __post_init__(self) -> None:
        check_fields(self, "rank")
        if not 0 < self.share <= 1 or not 0 < self.tolerance < 1:
            raise ValueError(
                f"rank:SHARE[,TOLERANCE] needs 0 < share <= 1 and 0 < tolerance < 1, got {self.share}, {self.tolerance}"
            )

    def __call__(self, groups: Sequence[Resizable], stats: Mapping[str, Stats]) -> dict[str, float]:
        """Those at or above the share; the fullest wants most."""
        shares = {group.name: self.used(group, stats[group.name]) for group in groups}
        return {name: share for name, share in shares.items() if share >= self.share}

    def used(self, group: Units, stats: Stats) -> float:
        """Numerical rank of the latest activations over the width."""
        assert stats.activations is not None
        return numerical_rank(stats.activations, self.tolerance) / group.width


@dataclass(frozen=True)
class Plateau:
    """All layers, when a quantity that the training loop records has not improved for some events.

    As torch's ReduceLROnPlateau: an event whose value beats the best so far by more than a part ``threshold`` of it is
    an improvement. After it fired, the value of that event is the best so far, so that the wider network has as many
    events to improve on it.
    """

    quantity: str = "loss"
    """The name under which :meth:`recycle.Recycler.record` gets it."""
    patience: int = 5
    """Events in a row without an improvement."""
    threshold: float = 0.01
    """Relative change that counts."""
    mode: Literal["min", "max"] = "min"
    """Whether lower (a loss) or higher (a return) is better."""

    needs: ClassVar[tuple[str, ...]] = ("recorded",)
    _seen: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)  # best, waited

    def __post_init__(self) -> None:
        check_fields(self, "plateau")
        if self.patience < 1 or not 0 <= self.threshold < math.inf:
            raise ValueError(
                "plateau:NAME[,PATIENCE[,THRESHOLD[,MODE]]] needs patience >= 1 (events) and threshold >= 0, "
                f"got {self.patience}, {self.threshold}"
            )

    def __call__(self, groups: Sequence[Resizable], stats: Mapping[str, Stats]) -> dict[str, float]:
        """All, with equal wishes, when the quantity stands still; a NaN is no value."""
        if not groups:
            return {}
        recorded = stats[groups[0].name].recorded
        if self.quantity not in recorded:
            known = ", ".join(sorted(recorded)) or "nothing"
            raise NotRecyclable(
                f"the plateau of {self.quantity!r} cannot be seen: {known} was recorded since the last event. Call "
                f"recycler.record({self.quantity!r}, value) in the training loop"
            )
        value = recorded[self.quantity]
        if not math.isfinite(value) or not self._stands_still(value):
            return {}
        return {group.name: 0.0 for group in groups}

    def _stands_still(self, value: float) -> bool:
        best = self._seen.get("best")
        gain = math.inf if best is None else best - value if self.mode == "min" else value - best
        if best is None or gain > self.threshold * abs(best):
            self._seen.update(best=value, waited=0)
            return False
        self._seen["waited"] += 1
        if self._seen["waited"] < self.patience:
            return False
        self._seen.update(best=value, waited=0)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best value and how many events ago."""
        return dict(self._seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._seen.clear()
        self._seen.update(state)


@dataclass(frozen=True)
class Score:
    """Layers whose expansion would gain enough: the test of self-expanding networks (Mitchell et al. 2023).

    A layer grows if its score's relative part is above ``relative`` and its absolute part above ``absolute``. Here a
    cooldown is an option of the growth, and costs of layers are the score's own.
    """

    relative: float = 0.03
    """Least gain relative to what the layer's weights could gain as they are."""
    absolute: float = 2.5e-3
    """Least gain by itself, in the score's units."""
    score: Scoring | None = None
    """The score; None: that of the method that proposes the units."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "score")
        if not self.relative >= 0 or not self.absolute >= 0:
            raise ValueError(f"score:RELATIVE[,ABSOLUTE] needs numbers >= 0, got {self.relative}, {self.absolute}")

    def __call__(self, groups: Sequence[Resizable], stats: Mapping[str, Stats]) -> dict[str, float]:
        """Those that pass both thresholds; the one that gains most relatively wants most."""
        assert self.score is not None
        found, unknown = {}, []
        for group in groups:
            try:
                relative, absolute = self.score(group, stats[group.name])
            except NotRecyclable as error:
                unknown.append(f"{group.name}: {error}")
                continue
            if relative > self.relative and absolute > self.absolute:
                found[group.name] = relative
        if unknown and len(unknown) == len(groups):
            raise NotRecyclable(f"no layer has a score ({'; '.join(unknown)})")
        return found


_KINDS: dict[str, Callable[..., Trigger]] = {"every": Every, "rank": Rank, "plateau": Plateau, "score": Score}
_NUMBERS = {"every": (int,), "rank": (float, float), "plateau": (str, int, float, str), "score": (float, float)}
WORDS = "every:EVENTS, rank:SHARE, plateau:NAME[,PATIENCE[,THRESHOLD[,min|max]]], score[:RELATIVE[,ABSOLUTE]]"


def trigger(words: str) -> Trigger:
    """``"every:4"``, ``"rank:0.9"``, ``"plateau:loss,5,0.01"`` or ``"score:0.03,0.0025"`` as an object.

    Raises:
        ValueError: it says none of these.
    """
    kind, _, rest = words.partition(":")
    given = [word.strip() for word in rest.split(",")] if rest else []
    if kind not in _KINDS or len(given) > len(_NUMBERS[kind]):
        raise ValueError(f"when is one of {WORDS}; got {words!r}")
    try:
        values = [convert(word) for convert, word in zip(_NUMBERS[kind], given, strict=False)]
    except ValueError as error:
        raise ValueError(f"when is one of {WORDS}; got {words!r} ({error})") from error
    return _KINDS[kind](*values)
