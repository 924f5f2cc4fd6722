"""Regenerative regularisation: pull the weights to where they began (Kumar et al. 2023, arXiv 2308.11958, L2 Init)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from recycle.interventions import Intervention, Layers, Pull
from recycle.kinds import check_fields
from recycle.stats import Stats


@dataclass(frozen=True)
class L2Init:
    """Add ``strength * ||p - p0||^2`` to the loss, through the optimizer: the training code stays as it is.

    ``p0`` are the values at which recycling began. In mode ``penalty`` each optimizer step sees the exact gradient of
    that term beside the loss's, which is restored behind the step. A loop that clips gradients (SB3's on-policy
    algorithms do) clips those of the loss alone. Parameters that got no gradient are not pulled.
    """

    strength: float = 1e-3
    """Factor of the squared distance. The paper tunes it between 1e-5 and 1e-2; values must stay reachable: where a
    value head has to grow large, set ``heads`` to False or choose less."""
    mode: Literal["penalty", "decoupled"] = "penalty"
    """``penalty``: through the gradient, as published (Adam rescales it). ``decoupled``: learning rate times the
    term's gradient, past the optimizer's rescaling; under plain SGD the same."""
    heads: bool = True
    """Pull output layers too, as published."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, "l2_init")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"l2_init needs a finite strength >= 0, got strength={self.strength}")

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Intervention]:
        """Nothing at events: it acts at every optimizer step."""
        return []

    def at_updates(self, networks: Sequence[Layers]) -> list[Pull]:
        """Pull every layer of each network."""
        chosen = [[path for path, depth in net.depth.items() if self.heads or depth != 1] for net in networks]
        return [Pull(c, strength=self.strength, mode=self.mode) for c in chosen if c]
