"""ReGraMa: reset units by their gradient (Liu et al. 2025, "Measure gradients, not activations!", arXiv 2505.24061)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from recycle.edits import Edit, Reset
from recycle.kinds import check_fields
from recycle.methods.gradient_cutoff import unasked
from recycle.methods.selection import Units, fold
from recycle.stats import Stats


@dataclass(frozen=True)
class ReGraMa:
    """Reset units whose mean |gradient| of the incoming weights is small against the layer's mean of it.

    Works where activations say little: tanh, GELU, behind LayerNorm. The authors' code redraws incoming weights and
    leaves outgoing ones, which changes the output of the network by its own size; here outgoing weights are zeroed
    and the unit's mean contribution is folded into its consumers' biases. Output heads are never reset.
    """

    tau: float = 0.01
    """A unit is recycled where its share of the layer's mean gradient is at most this."""

    needs: ClassVar[tuple[str, ...]] = ("weight_gradient", "mean_abs", "minimum", "maximum", "outgoing_norm")

    def __post_init__(self) -> None:
        check_fields(self, "regrama")
        if not 0 <= self.tau < float("inf"):
            raise ValueError(f"regrama needs a threshold tau >= 0, got tau={self.tau}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One reset of every unit that learns (almost) nothing, the stillest first."""
        gradient = stats.weight_gradient
        score = gradient / gradient.mean().clamp_min(torch.finfo(gradient.dtype).tiny)
        units = ((score <= self.tau) & ~unasked(stats)).nonzero()[:, 0]
        units = units[score[units].argsort(stable=True)]
        return [*fold(group, stats, units), Reset(units.tolist())] if len(units) else []
