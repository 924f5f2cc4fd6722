"""ReDo: reset dormant units (Sokar, Agarwal, Castro and Evci 2023, "The Dormant Neuron Phenomenon in Deep RL")."""

from dataclasses import dataclass
from typing import ClassVar

from recycle.edits import Edit, Reset
from recycle.methods.selection import Units
from recycle.stats import Stats


@dataclass(frozen=True)
class ReDo:
    """Give dormant units fresh incoming weights and zero outgoing ones (algorithm 1 of the paper).

    The score is the unit's mean |activation|, after its nonlinearity, over the layer's mean of it (equation 1;
    the text's "sums to 1" would divide by the sum). Exact for units that are dead; a unit that is only dormant
    takes its small contribution with it.
    """

    tau: float = 0.025
    """Dormant at or below this score (definition 3.1); the paper's value for DQN."""

    needs: ClassVar[tuple[str, ...]] = ("mean_abs",)

    def __post_init__(self) -> None:
        if not 0 <= self.tau < float("inf"):
            raise ValueError(f"redo needs a threshold tau >= 0, got tau={self.tau}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One reset of every dormant unit, the deadest first."""
        score = stats.score
        units = (score <= self.tau).nonzero()[:, 0]
        return [Reset(units[score[units].argsort(stable=True)].tolist())] if len(units) else []
