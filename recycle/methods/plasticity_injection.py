"""Plasticity injection: a new head beside the frozen old one (Nikishin et al. 2023, arXiv 2305.15555)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from recycle.interventions import Inject, Layers
from recycle.stats import Stats


@dataclass(frozen=True)
class PlasticityInjection:
    """Once, at the first event behind the warm-up: what the network says becomes old + new - copy of new.

    Of the three heads only the new one is trained from then on; the output is unchanged at the event, and what the old
    head learned stays. A head is the last hidden layer and the output layers that read it: an output layer alone is
    linear, and injecting there would change nothing. The head's cost triples. (Published ports leave the old head
    trainable, or the new one out of the optimizer.)
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Inject]:
        """Inject into each network that was not injected yet."""
        return [Inject() for network in networks if not network.injected]
