"""Turn each dead unit into the mirror image of a live one: it fires exactly where its parent does not."""

from dataclasses import dataclass
from functools import cache, partial

from recycle.births import Birth, mirror
from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.selection import NEEDED_BY, Parent, Units, match
from recycle.stats import Stats


@dataclass(frozen=True)
class Mirror:
    """Give dead units a live unit's incoming weights and bias negated, and zero outgoing weights.

    No live row changes, so the function stays exactly. The newborn is active wherever its parent is not, so it
    is born alive on any data on which the parent is ever off.
    """

    tau: float = 0.0
    """Recycle units whose dormancy score is at most this as well; 0: only units that are exactly constant."""
    norm_cap: float = 2.0
    """The newborn's incoming row is at most this many times as long as a fresh one."""
    parent: Parent = "utility"
    """Which live units are mirrored: by ``utility``, by ``gradient``, by ``eigenvalue`` (of the splitting
    matrix, see s2d), or ``random``."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it reads."""
        return ("mean_abs", "minimum", "maximum", *NEEDED_BY[self.parent])

    def __post_init__(self) -> None:
        check_fields(self, "mirror")
        if not self.tau >= 0 or not self.norm_cap > 0:
            raise ValueError(f"mirror needs tau >= 0 and norm_cap > 0, got tau={self.tau}, norm_cap={self.norm_cap}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the slots still say, then mirror the best live units into them."""
        chosen, slots, folds = match(group, stats, self.tau, self.parent)
        return [*folds, Reset(slots, _birth(self.norm_cap), parents=chosen)] if slots else []


@cache
def _birth(norm_cap: float) -> Birth:
    """One and the same object for each cap, so that equal edits compare equal."""
    return mirror if norm_cap == 2.0 else partial(mirror, norm_cap=norm_cap)
