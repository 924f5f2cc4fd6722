"""Split live units into dead ones: incoming weights duplicated, outgoing weights divided, noise added."""

from dataclasses import dataclass
from typing import Literal

from recycle.edits import Edit, Split
from recycle.kinds import check_fields
from recycle.methods.selection import NEEDED_BY, Parent, Units, match
from recycle.stats import Stats


@dataclass(frozen=True)
class SplitDead:
    """Turn each dead unit into half of a live one; the network's function stays up to the noise.

    Each live unit is split at most once an event, so that no unit has many copies. Where more units are dead
    than alive the rest waits for the next event.
    """

    share: float = 0.5
    """Part of the parent's outgoing weights that the newborn takes."""
    noise: float = 0.1
    """Length of the antisymmetric noise on the incoming weights, relative to the row; rows keep their norm.
    Without it newborns part from their parents only through the optimizer's state, and slowly."""
    tau: float = 0.0
    """Recycle units whose dormancy score is at most this as well; 0: only units that are exactly constant."""
    rescale: bool = False
    """Balance the parent's incoming and outgoing norms first, without changing its function (ReLU-like units):
    copies of copies otherwise inherit ever larger rows."""
    balanced: bool = False
    """Divide incoming and outgoing weights by the root of the share (ReLU-like units)."""
    parent: Parent = "utility"
    """Which live units are split: by ``utility``, by ``gradient``, by ``eigenvalue`` (of the splitting
    matrix, see s2d), or ``random``."""
    moments: Literal["fresh", "transform"] = "fresh"
    """State of the optimizer for the newborn: its initial value, or what its parent's would have been."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that it reads."""
        return ("mean_abs", "minimum", "maximum", *NEEDED_BY[self.parent])

    def __post_init__(self) -> None:
        check_fields(self, "split")
        if not 0 <= self.share < 1 or not self.noise >= 0 or not self.tau >= 0:
            raise ValueError(
                "split needs 0 <= share < 1, noise >= 0 and tau >= 0, "
                f"got share={self.share}, noise={self.noise}, tau={self.tau}"
            )

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the slots still say, then split the best live units into them."""
        chosen, slots, folds = match(group, stats, self.tau, self.parent)
        if not slots:
            return []
        edit = Split(
            chosen,
            slots,
            share=self.share,
            noise=self.noise,
            balanced=self.balanced and group.homogeneous,
            rescale=self.rescale and group.homogeneous,
            moments=self.moments,
        )
        return [*folds, edit]
