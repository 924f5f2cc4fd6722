"""Layer reset: initialise the last layers again (Nikishin et al. 2022, "The Primacy Bias in Deep RL")."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from recycle.interventions import Layers, Renew
from recycle.kinds import check_fields
from recycle.stats import Stats


@dataclass(frozen=True)
class LayerReset:
    """At every event the last layers begin anew, with the optimizer's state of them; the output changes.

    Parameters are overwritten in place, so the optimizer still trains them (a published implementation puts new
    modules in their place that no optimizer knows, and so freezes the layers for good).
    """

    last: int | None = 1
    """Layers that are at most so far from the output, 1 being output layers; None: all. The paper resets all of
    SAC's, one to three of DrQ's."""
    layers: tuple[str, ...] = ()
    """Paths of layers instead, such as ``("q_net.2", "q_net.4")``."""
    weights: bool = True
    """False: the optimizer forgets these layers, weights stay: the control that resets optimizer state alone."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))
        check_fields(self, "layer_reset")
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.last is not None and self.last < 1:
            raise ValueError(f"layer_reset counts last >= 1 layers from the output (None: all), got last={self.last}")

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Renew]:
        """Reset the layers asked for, in each network that has some of them."""
        found = []
        for network in networks:
            if self.layers:
                chosen = [path for path in network.depth if path in self.layers]
            else:
                chosen = [p for p, depth in network.depth.items() if self.last is None or 0 < depth <= self.last]
            if chosen:
                found.append(Renew(chosen, weights=self.weights))
        return found
