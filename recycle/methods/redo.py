"""ReDo: reset dormant units (Sokar, Agarwal, Castro and Evci 2023, "The Dormant Neuron Phenomenon in Deep RL")."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.stats import Stats


@dataclass(frozen=True)
class ReDo:
    """Give dormant units fresh incoming weights and zero outgoing ones (algorithm 1 of the paper).

    The score is the unit's mean |activation|, after its nonlinearity, as a part of the layer's. Exact for units that
    are dead; a unit that is only dormant takes its small contribution with it.
    """

    tau: float = 0.025
    """Dormant at or below this score (definition 3.1); the paper's value for DQN."""
    score: Literal["mean", "sum"] = "mean"
    """The paper can be read in two ways. mean: a part of the layer's mean (equation 1, the authors' code, and what
    their thresholds are made for). sum: of the layer's sum, so that scores "sum to 1" (the text below the equation);
    the same tau is then that many times stricter as the layer has units."""

    needs: ClassVar[tuple[str, ...]] = ("mean_abs",)

    def __post_init__(self) -> None:
        check_fields(self, "redo")
        if not 0 <= self.tau < float("inf"):
            raise ValueError(f"redo needs a threshold tau >= 0, got tau={self.tau}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One reset of every dormant unit, the deadest first."""
        score = stats.score if self.score == "mean" else stats.score / group.width
        units = (score <= self.tau).nonzero()[:, 0]
        return [Reset(units[score[units].argsort(stable=True)].tolist())] if len(units) else []
