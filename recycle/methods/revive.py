"""Give each dormant unit a random direction, with its hinge in the middle of the latest data."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, Literal

from recycle.births import Birth, revive
from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.selection import Units, fold, idle
from recycle.stats import Stats

RULES: dict[str, float] = {"B": 0.1, "C": 0.025}
"""The dormancy threshold of each preset."""


@dataclass(frozen=True)
class Revive:
    """Reset dormant units into ones that fire on half of the latest inputs, and that take steps of the usual size.

    What a unit said on average is folded into its consumers' biases. Its incoming row becomes a random direction, its
    length the geometric mean of a fresh and a live row's, its bias such that the unit is positive on half of the inputs
    that its layer read on the latest sampled pass; its outgoing weights are zero. The second moments of its incoming
    weights begin at a tenth of the live units' median, so that Adam's first steps stay near the learning rate. Exact
    for units that are dead; of one that is only dormant the mean stays.

    The inputs are those from before the event: where several layers in a row lose units at once, what the lower
    newborns begin to say is not yet among the inputs of the upper ones.
    """

    rule: Literal["B", "C"] = "C"
    """Preset of ``tau``. ``C``: .025, the gentle one. ``B``: .1, for supervised streams and bandits."""
    tau: float | None = None
    """Recycle units whose dormancy score is at most this; 0: only units that are exactly constant. None: the rule's."""
    active: float = 0.5
    """Share of the latest inputs on which a newborn is positive."""
    warm: float = 0.1
    """Second moments of newborns' incoming weights as a part of the live median; 0: as ReDo leaves them."""

    needs: ClassVar[tuple[str, ...]] = ("mean_abs", "minimum", "maximum", "inputs")

    def __post_init__(self) -> None:
        check_fields(self, "revive")
        if not (self.tau is None or self.tau >= 0) or not 0 < self.active < 1 or not 0 <= self.warm <= 1:
            raise ValueError(
                "revive needs tau >= 0 (or None), 0 < active < 1 and 0 <= warm <= 1, "
                f"got tau={self.tau}, active={self.active}, warm={self.warm}"
            )

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the dormant units still say, then give them new rows, the deadest first."""
        units = idle(group, stats, RULES[self.rule] if self.tau is None else self.tau)
        if not len(units):
            return []
        return [*fold(group, stats, units), Reset(units.tolist(), _birth(self.active), warm=self.warm)]


@cache
def _birth(active: float) -> Birth:
    """One and the same object for each share, so that equal edits compare equal."""
    return revive if active == 0.5 else partial(revive, active=active)
