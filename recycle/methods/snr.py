"""Self-Normalized Resets: reset units that are silent for unusually long (Farias & Jozefiak 2024, arXiv 2410.20098)."""

from dataclasses import dataclass
from typing import ClassVar

from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.selection import Units, fold, stuck
from recycle.stats import Stats


@dataclass(frozen=True)
class SelfNormalizedResets:
    """Reset a unit that is silent for longer than all but a share ``eta`` of the times between its firings.

    A unit that fires rarely may be silent for long, one that fires always may not (algorithm 1 of the paper: reset
    where P(A >= a) <= eta). The paper tests after every update, here events do; time is counted in sampled passes.

    The authors' code counts no interval where a unit fired in successive batches, counts the silence that a reset
    ended as if the unit had fired, and learns its thresholds at task boundaries. Here every interval counts, a silence
    only if the unit itself ended it, and no boundary is needed.
    """

    eta: float = 0.01
    """Probability of resetting a live unit in one silence; the paper tries .00125 to .08."""

    needs: ClassVar[tuple[str, ...]] = ("silence", "rarity", "minimum", "maximum")

    def __post_init__(self) -> None:
        check_fields(self, "snr")
        if not 0 <= self.eta < 1:
            raise ValueError(f"snr needs a probability eta in [0, 1), got eta={self.eta}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One reset of every unit whose silence cannot be chance, the least likely first."""
        chosen = (stats.rarity <= self.eta) & (stats.silence > 0) & ~stuck(group, stats)
        units = chosen.nonzero()[:, 0]
        units = units[stats.rarity[units].argsort(stable=True)]
        constant = units[stats.dead[units]]
        return [*fold(group, stats, constant), Reset(units.tolist())] if len(units) else []
