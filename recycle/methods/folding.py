"""Widen a layer by a unit that folds the output where it is typically wrong (Kang 2024, "Growing Networks by Folding").

The document: "Growing Networks by Folding on Typical Instances", slides, 1 November 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from recycle.births import Given
from recycle.edits import Edit, Grow
from recycle.folding import Creases, Direction, Examples, fold
from recycle.graph import NotRecyclable
from recycle.interventions import Deepen, Layers
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.stats import Stats


@dataclass(frozen=True)
class _Fold:
    """A layer that was to be widened; whether it was shows behind the event alone."""

    event: int
    group: Units
    width: int


@dataclass(frozen=True)
class Folding:
    """Add units whose hinge goes through the decision boundary where the network is typically wrong.

    The typical mispredicted instance is found by k-means weighted with the losses, the fold point on the boundary of
    the linear segment that is active there. The new unit's hinge goes through that point, in the direction in which
    its outgoing weights have the largest gradient and the instance is on its active side; its outgoing weights are
    zero, so that the output stays as it was. Layers of ReLU-like units that one Linear or convolution makes.

    It has to see where the network is wrong, by a function that it is given here or as the Recycler's own
    ``examples``::

        def examples():
            outputs = net(x)
            return outputs, F.cross_entropy(outputs, y, reduction="none"), y

        Recycler(graph, Folding(examples), optimizers=[adam])

    Under ``RecycleCallback`` it need not be given one: an agent's critic is folded by its |TD error| on 256 examples
    drawn at each event, and layers that the actor alone runs, which predict no value, are left as they are.
    """

    examples: Examples | None = None
    """Runs the network and returns outputs (n, k), the loss of each example (n,), and targets: integers (n,) for
    classes, numbers shaped like the outputs for a regression or a critic. None: the Recycler's; without any nothing is
    done."""
    count: int = 1
    """Units that an event adds to each layer, each for a cluster of its own and for what those before it leave of the
    gradient."""
    most: int = 64
    """Width up to which a layer is widened."""
    direction: Direction = "gradient"
    """How the hinge lies: gradient (largest gradient), tangent (across the boundary), or as the document has it toward
    (parallel to the boundary) or origin (with a bias of zero)."""
    clusters: int = 5
    """Of examples, from the worst of which the typical instance comes."""
    sample: int = 256
    """Examples (of a convolution: patches) that are clustered at most."""

    deepen: int = 0
    """Events, at most, at which the layers that are folded also get a hidden layer behind them, born as the identity
    (the document's equivalent deepening; ReLUs alone); 0: none. Not under ``grow``, which widens."""

    needs: ClassVar[tuple[str, ...]] = ("mistakes",)
    _folds: list[_Fold] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "folding")
        if min(self.count, self.most, self.clusters, self.sample) < 1:
            raise ValueError(
                "folding needs count, most, clusters and sample >= 1, "
                f"got {self.count}, {self.most}, {self.clusters}, {self.sample}"
            )
        if self.deepen < 0:
            raise ValueError(f"folding needs deepen >= 0 events, got {self.deepen}")

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """One edit with all newborns that could be made.

        Raises:
            NotRecyclable: nothing is wrong, or there is no boundary to fold; the report says so.
        """
        count = min(self.count, self.most - group.width)
        if stats.mistakes is None:
            return []
        if count < 1:
            raise NotRecyclable(f"{group.name!r} has {group.width} units, and most={self.most}")
        mistakes = stats.mistakes()
        if not mistakes.bias and self.direction != "origin":
            raise NotRecyclable(f"{group.name!r} has no bias to put a hinge on the boundary: pass direction='origin'")
        made = fold(mistakes, count, direction=self.direction, clusters=self.clusters, sample=self.sample,
                    generator=stats.generator)  # fmt: skip
        found = made.found[0]
        if not bool(made.mispredicted):
            rows = min(self.sample, mistakes.wrong.shape[1])
            raise NotRecyclable(f"none of the {rows} examples looked at is mispredicted: there is nothing to fold")
        if not bool(found.any()):
            raise NotRecyclable(
                "no fold point: the output does not depend on what the layer reads at any typical mispredicted "
                "instance (a dead segment)"
            )
        if self.deepen:
            self._folds.append(_Fold(stats.event, group, group.width))
        return [Grow(int(found.sum()), Given(_rows(made, mistakes.bias)))]

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Deepen]:
        """A hidden layer behind each layer that the present event folded, where there is a place for one."""
        event = max((seen.event for seen in stats.values()), default=0)
        folded = [fold.group.name for fold in self._folds if fold.event == event and fold.group.width > fold.width]
        self._folds.clear()
        if not folded or sum(network.deepened for network in networks) >= self.deepen:
            return []
        places = [name for network in networks for name in network.gaps if name in folded]
        return [Deepen(places or folded)]  # without a place the refusal says why


def _rows(made: Creases, bias: bool) -> Tensor:
    """Weights of the newborns, the bias last: ``(units, fan_in + 1)``."""
    found = made.found[0]
    weight = made.weight[0][found]
    return torch.cat([weight, made.bias[0][found][:, None]], 1) if bias else weight
