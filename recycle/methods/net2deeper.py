"""Net2Net's deeper networks: hidden layers born as the identity (Chen, Goodfellow, Shlens 2016, arXiv 1511.05641)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from recycle.interventions import Deepen, Layers
from recycle.kinds import check_fields
from recycle.stats import Stats


@dataclass(frozen=True)
class Net2Deeper:
    """At every event behind the warm-up a hidden layer more, until there are enough; the output stays as it was.

    The paper's rule, an identity of plain weights, needs ``s(s(x)) = s(x)``: a ReLU. The other kinds do without, see
    :class:`recycle.Deepen`. Where a kind cannot be exact nothing is done, and the report says why.
    """

    kind: Literal["identity", "pair", "blend", "residual"] = "identity"
    """What the new layer is: plain weights between ReLUs, the two signs of a signal between ReLUs, a learned blend of
    the identity and an activation, or a residual branch that begins at zero."""
    layers: tuple[str, ...] = ()
    """Paths of hidden layers behind each of which one is inserted, once. Empty: at each event behind the last that
    has a place for one; of an actor and a critic in one network, behind the last of each."""
    most: int = 1
    """Events at which a network gets a layer, where ``layers`` names none."""
    activation: str | None = None
    """A class in ``torch.nn``; None: the activation that stands before the gap."""
    kernel: int = 3
    """Size of a new convolution's kernel, odd."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):
            object.__setattr__(self, "layers", (self.layers,))
        check_fields(self, "net2deeper")
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.most < 1:
            raise ValueError(f"net2deeper needs most >= 1 events, got most={self.most}")

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Deepen]:
        """Deepen each network that is not deep enough yet and has a place for a layer."""
        found = []
        for network in networks:
            last = min((far for gap in network.gaps if (far := network.depth.get(gap, 0))), default=0)
            chosen = self.layers or [gap for gap in network.gaps if network.depth.get(gap, 0) == last]
            if chosen and network.deepened < (1 if self.layers else self.most):
                found.append(Deepen(chosen, kind=self.kind, activation=self.activation, kernel=self.kernel))
        return found
