"""Widen layers with the units whose gradient is largest at once (Evci et al. 2022, "GradMax", ICLR)."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

from recycle.births import Birth, gradmax
from recycle.births.gradmax import directions, strongest
from recycle.edits import Edit, Grow
from recycle.junction import Junction
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.methods.widths import check_width, in_pairs, room
from recycle.stats import Stats


@dataclass(frozen=True)
class GradMax:
    """Add units with no incoming weights, and outgoing ones that give those the largest gradient.

    The output stays exactly as it was. The latest sampled pass says which outgoing weights these are, where one Linear
    or convolution makes the units and such read them; elsewhere the Recycler's ``loss`` does. A layer has no more such
    directions than its consumers have outputs times places: one, in front of a single value. Where biases cannot make
    up for what the new units say at first (consumers with padding, or without bias) they come in pairs.
    """

    count: int = 1
    """Units that each layer gains at an event."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    lift: float = 0.1
    """Bias of the new units: a ReLU has no gradient at zero."""
    scale: float = 1.0
    """Length of their outgoing weights, relative to the mean of the layer's."""

    needs: ClassVar[tuple[str, ...]] = ("junction",)

    def __post_init__(self) -> None:
        check_fields(self, "gradmax")
        check_width("gradmax", self.count, self.most)
        if not self.scale > 0 or not self.lift > 0:
            raise ValueError(f"gradmax needs lift > 0 and scale > 0, got lift={self.lift}, scale={self.scale}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One growth by as many units as there are directions with a gradient, at most ``count``."""
        each = 2 if group.why_not_foldable else 1
        count = (in_pairs if each == 2 else room)(group, self.count, self.most)
        if isinstance(stats.junction, Junction):
            count = min(count, each * max(1, directions(strongest(stats.junction)[0])))
        return [Grow(count, _birth(self.lift, self.scale))] if count else []

    def score(self, group: Units, stats: Stats) -> tuple[float, float]:
        """The largest gradient that a new unit can have, for outgoing weights of norm 1: relative to the gradient of
        all weights that read the layer, and itself. Zeros where there is no closed form."""
        if not isinstance(stats.junction, Junction):
            return 0.0, 0.0
        branches = stats.junction.branches
        now = sum(float((b.gradient.T @ b.activations).square().sum()) for b in branches) ** 0.5
        best = float(strongest(stats.junction)[0][0])
        return (best / now if now else 0.0), best


@cache
def _birth(lift: float, scale: float) -> Birth:
    return partial(gradmax, lift=lift, scale=scale)
