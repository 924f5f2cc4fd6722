"""Shrink and perturb: keep a part of the weights, add a part of new ones (Ash and Adams 2020, arXiv 1910.08475)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from recycle.interventions import Layers, Shrink
from recycle.kinds import check_fields
from recycle.stats import Stats


@dataclass(frozen=True)
class ShrinkPerturb:
    """At every event all weights become ``shrink`` times themselves plus ``perturb`` times freshly drawn ones.

    The noise is the network's own initialisation, as in the authors' code; with ``shrink + perturb = 1`` this is the
    interpolation of D'Oro et al. 2023 (.8 and .2 for encoders). Gains of normalisations and biases take part. Layers
    that do not say how they begin (bare parameters such as ``log_std``) are left alone.
    """

    shrink: float = 0.8
    """Part of the old weights that stays."""
    perturb: float = 0.2
    """Part of a fresh initialisation that is added."""
    heads: bool = True
    """Act on output layers too."""
    moments: Literal["fresh", "keep"] = "fresh"
    """The optimizer begins anew, as at the start of each of the paper's rounds, or keeps its state."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "shrink_perturb")
        if not 0 <= self.shrink <= 1 or not 0 <= self.perturb < float("inf"):
            raise ValueError(
                "shrink_perturb needs 0 <= shrink <= 1 and perturb >= 0, "
                f"got shrink={self.shrink}, perturb={self.perturb}"
            )

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Shrink]:
        """Shrink and perturb every layer of each network."""
        chosen = [[path for path, depth in net.depth.items() if self.heads or depth != 1] for net in networks]
        return [Shrink(c, keep=self.shrink, perturb=self.perturb, moments=self.moments) for c in chosen if c]
