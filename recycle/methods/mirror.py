"""Turn each dead unit into the mirror image of a live one: it fires exactly where its parent does not."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from recycle.births import mirror
from recycle.methods.selection import Parent, Units, fold, idle, parents
from recycle.surgery import Edit, Reset
from recycle.track import Stats


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
    """Which live units are mirrored: by ``utility``, by ``gradient``, or ``random``."""

    needs: ClassVar[tuple[str, ...]] = ("mean_abs", "minimum", "maximum", "outgoing_norm")

    def __post_init__(self) -> None:
        if not self.tau >= 0 or not self.norm_cap > 0:
            raise ValueError(f"mirror needs tau >= 0 and norm_cap > 0, got tau={self.tau}, norm_cap={self.norm_cap}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the slots still say, then mirror the best live units into them."""
        slots = idle(group, stats, self.tau)
        chosen = parents(stats, slots, self.parent)
        slots = slots[: len(chosen)]
        if not len(slots):
            return []
        birth = mirror if self.norm_cap == 2.0 else partial(mirror, norm_cap=self.norm_cap)
        return [*fold(group, stats, slots), Reset(slots.tolist(), birth, parents=chosen.tolist())]
