"""Split along the steepest direction (Liu, Wu and Wang 2019, "Splitting Steepest Descent", arXiv 1910.02366)."""

from dataclasses import dataclass
from typing import ClassVar

from recycle.edits import Edit, Split
from recycle.kinds import check_fields
from recycle.methods.selection import Units, fold, idle, steepest_descent
from recycle.stats import Stats


@dataclass(frozen=True)
class SteepestDescent:
    """Split live units into dead ones where that lowers the loss most, the halves moving apart along that direction.

    Parents are the units whose splitting matrix has the most negative eigenvalue, each once an event; where none is
    negative no split would help (theorem 2.3 of the paper), and dead units wait. The paper widens a network that has
    converged; here the width stays. The matrix is that of the latest sampled pass alone, smoothed, since a ReLU has no
    second derivative. Layers of ReLU-like units made by one Linear or convolution, with no normalisation.
    """

    step: float = 0.1
    """How far each half moves, relative to the length of its incoming weights."""
    softness: float = 0.3
    """Width of the smoothed hinge, in standard deviations of the unit's pre-activation."""
    tau: float = 0.0
    """Recycle units whose dormancy score is at most this as well; 0: only units that are exactly constant."""

    needs: ClassVar[tuple[str, ...]] = ("mean_abs", "minimum", "maximum", "sample")

    def __post_init__(self) -> None:
        check_fields(self, "s2d")
        if not self.step > 0 or not self.softness > 0 or not self.tau >= 0:
            raise ValueError(
                "s2d needs step > 0, softness > 0 and tau >= 0, "
                f"got step={self.step}, softness={self.softness}, tau={self.tau}"
            )

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """Fold what the slots still say, then split the units that gain most into them."""
        slots = idle(group, stats, self.tau)
        if not len(slots):
            return []
        values, directions = steepest_descent(group, stats, self.softness)
        gain = (-values).clone()
        gain[slots] = 0
        chosen = gain.argsort(descending=True, stable=True)[: int((gain > 0).sum())][: len(slots)]
        slots = slots[: len(chosen)]
        if not len(slots):
            return []
        along = directions[chosen].tolist()
        return [*fold(group, stats, slots), Split(chosen.tolist(), slots.tolist(), noise=self.step, along=along)]
