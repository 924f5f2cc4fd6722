"""Widen layers where their present weights fall short (Verbockhaven et al. 2024, "Growing Tiny Networks", TMLR)."""

from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

from recycle.births import Birth, tiny
from recycle.births.gradmax import directions
from recycle.births.tiny import best_features, gain_of_present
from recycle.edits import Edit, Grow
from recycle.junction import Junction
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.methods.widths import check_width, room
from recycle.stats import Stats


@dataclass(frozen=True)
class Tiny:
    """Add the units whose weights, both sides together, lower the loss most to first order.

    What the consumers' present weights could do is left out of account first. This changes the output: the amplitude
    is searched for where the Recycler has a ``loss``, and how far the output moves is reported at each event. Layers
    that one Linear or convolution makes and such read, without normalisation, with an activation that gives zero for
    zero.
    """

    count: int = 1
    """Units that each layer gains at an event."""
    most: int | None = None
    """No layer becomes wider; None: no bound."""
    amplitude: float = 0.1
    """Root mean square of the strongest newborn's pre-activation, and the length of its outgoing weights relative to
    the mean of the layer's; with a loss the best of 1, 1/2, 1/4, ... is taken instead."""

    needs: ClassVar[tuple[str, ...]] = ("junction",)

    def __post_init__(self) -> None:
        check_fields(self, "tiny")
        check_width("tiny", self.count, self.most)
        if not 0 < self.amplitude < float("inf"):
            raise ValueError(f"tiny needs an amplitude > 0, got amplitude={self.amplitude}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One growth by as many units as there are directions that would lower the loss, at most ``count``."""
        count = room(group, self.count, self.most)
        if isinstance(stats.junction, Junction):
            count = min(count, max(1, directions(best_features(stats.junction)[0])))
        return [Grow(count, _birth(self.amplitude))] if count else []

    def score(self, group: Units, stats: Stats) -> tuple[float, float]:
        """What the best new unit would lower the loss by for a unit change at the consumers' outputs: relative to what
        the consumers' present weights could, and itself. Zeros where there is no closed form."""
        if not isinstance(stats.junction, Junction):
            return 0.0, 0.0
        best, now = float(best_features(stats.junction)[0][0]), gain_of_present(stats.junction)
        return (best / now if now else 0.0), best


@cache
def _birth(amplitude: float) -> Birth:
    return partial(tiny, amplitude=amplitude)
