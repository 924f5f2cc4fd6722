"""Self-expanding neural networks (Mitchell, Menzenbach, Kersting and Mundt 2023, arXiv 2307.04526)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from recycle.activations import Activation, recognised
from recycle.births import Given
from recycle.edits import Edit, Grow
from recycle.graph import NotRecyclable
from recycle.growth_sample import GrowthSample
from recycle.interventions import Deepen, Layers
from recycle.kinds import check_fields
from recycle.methods.selection import Units
from recycle.natural_gradient import ExpansionTest, Proposal, deepening, widening
from recycle.stats import Stats


@dataclass
class _Memory:
    last: int = -1
    """Number of the event that expanded the network, -1 before the first."""
    found: dict[str, list[Edit] | str] = field(default_factory=dict)
    """What the present event decided on each group, or why nothing was done."""
    deepen: str | None = None
    """The group behind which the present event puts a layer."""
    asked: tuple[str, int] | None = None
    """The group of the layer that was asked for last, and how often layers had been inserted by then."""
    event: int = 0
    refused: set[str] = field(default_factory=set)
    """Groups behind which no layer could be inserted."""


@dataclass(frozen=True)
class SelfExpanding:
    """Widen the layer where a new unit raises the natural-gradient score most, if that passes the expansion test.

    The score g'F^-1 g is twice the loss that a step of the natural gradient would win; a new unit with zero outgoing
    weights raises it by what its activation explains of the gradient that the layer's other units do not explain. Its
    incoming weights are those, of many random ones improved by gradient ascent, that raise it most. The test looks at
    what such a search over one half of the rows is worth on the other half, and the other way round. An event widens
    one layer, by one unit after the other until the next one fails or ``most`` is reached. The output stays as it was.

    With a ``layer_cost`` an event may insert a hidden layer instead, behind ReLUs and born as the identity between
    them, where that raises the score, divided by the cost, more than any unit does. (The paper inserts learned rational
    activations; a ReLU network is one before and after.) Not under ``grow``, which widens.

    F is the empirical Fisher matrix of the loss, layer by layer (K-FAC), in an agent too, where the loss is PPO's or
    DQN's own: so the scale of the loss says nothing. The rows are the latest 2048 that were seen since the last event,
    of as many examples as are different: more than four for each unit. An agent's gradients are noisy, so give it time
    between events, and look at few updates after each rollout rather than at the last rollout alone (sample_every).
    Layers made and read by Linear layers, with a known activation between them and no normalisation.
    """

    relative: float = 0.03
    """Least gain over the present score of the layer that reads the units."""
    absolute: float = 0.0025
    """Least part of the gradient that the new unit explains, in [0, 1)."""
    certainty: float = 1.0
    """Standard errors by which the gain must be above zero. At 1 chance alone passes about one test in 40, at 2 none;
    the other two thresholds let fewer pass."""
    most: int = 4
    """Units that an event may add."""
    cooldown: int = 0
    """Events after one that expanded the network at which nothing is done."""
    proposals: int = 32
    """Random units to begin the search with."""
    steps: int = 60
    """Steps of Adam that improve each."""
    layer_cost: float | None = None
    """What a new hidden layer costs beside a unit; SENN's is 20. None: none is inserted."""
    damping: float = 0.1
    """Of both factors: added to the gradients' second moments, relative to their mean, and to a new unit's, relative to
    its largest activation squared, so that units that hardly ever fire gain little."""

    needs: ClassVar[tuple[str, ...]] = ("growth",)
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, "senn")
        if not self.relative >= 0 or not 0 <= self.absolute < 1 or not self.certainty >= 0 or not self.damping > 0:
            raise ValueError(
                f"senn needs relative >= 0, 0 <= absolute < 1, certainty >= 0 and damping > 0, got relative="
                f"{self.relative}, absolute={self.absolute}, certainty={self.certainty}, damping={self.damping}"
            )
        if self.layer_cost is not None and not self.layer_cost > 0:
            raise ValueError(f"senn needs layer_cost > 0 (units), or None to insert no layer, got {self.layer_cost}")
        if self.most < 1 or self.cooldown < 0 or self.proposals < 1 or self.steps < 0:
            raise ValueError(
                "senn needs most >= 1 and proposals >= 1 (units), cooldown >= 0 (events) and steps >= 0, got "
                f"most={self.most}, proposals={self.proposals}, cooldown={self.cooldown}, steps={self.steps}"
            )

    @property
    def count(self) -> int:
        """Units that an event may add, for a schedule that asks."""
        return self.most

    # -- where ---------------------------------------------------------------------------------------------

    def survey(self, groups: Sequence[Units], stats: Mapping[str, Stats]) -> list[str]:
        """Look at all groups before any is edited: the expansion of the largest relative gain is made, if any passes.

        Args:
            groups: all that are watched, in forward order.
            stats: of those that may be edited now, by name.

        Returns:
            The groups' names; last the one that widens, since then the others' rows would no longer fit.
        """
        memory, names = self._memory, [group.name for group in groups]
        memory.found, memory.deepen = {}, None
        seen = {group.name: group for group in groups if group.name in stats}
        memory.event = max((stats[name].event for name in seen), default=0)
        if memory.last >= 0 and memory.event - memory.last <= self.cooldown:
            memory.found = {name: f"an event expanded it {memory.event - memory.last} events ago" for name in seen}
            return names
        units: dict[str, Proposal] = {}
        layers: dict[str, Proposal] = {}
        for name, group in seen.items():
            try:
                units[name] = self._proposal(group, stats[name], _features(_sample(group, stats[name])))
            except NotRecyclable as error:
                memory.found[name] = str(error)
            if self.layer_cost is not None and name not in memory.refused:
                layers |= self._layer(group, stats[name], self.layer_cost)
        passed = [
            (made.relative, name, of is layers)
            for of in (units, layers)
            for name, made in of.items()
            if self._test.passed(made)
        ]
        _, winner, deeper = max(passed, default=(0.0, None, False))
        for name, proposal in units.items():
            if not self._test.passed(proposal) or (name == winner and not deeper):
                memory.found[name] = self._edits(seen[name], stats[name], proposal)
            else:
                gains_more = f"a {'layer behind' if deeper else 'unit of'} {winner!r} gains more"
                memory.found[name] = f"{_told(proposal)}: {gains_more}"
        memory.deepen = winner if deeper else None
        return [name for name in names if name != winner] + [name for name in names if name == winner]

    def on_networks(self, networks: Sequence[Layers], stats: Mapping[str, Stats]) -> list[Deepen]:
        """The layer that the survey decided on, if it did; one that was refused is not asked for again."""
        memory, deepened = self._memory, sum(network.deepened for network in networks)
        if memory.asked is not None and memory.asked[1] == deepened:
            memory.refused.add(memory.asked[0])
        elif memory.asked is not None:
            memory.refused.clear()  # paths are others now
        memory.asked = None
        if memory.deepen is None or memory.deepen in memory.refused:
            return []
        memory.last, memory.asked = memory.event, (memory.deepen, deepened)
        return [Deepen([memory.deepen])]

    @property
    def _test(self) -> ExpansionTest:
        return ExpansionTest(self.relative, self.absolute, self.certainty)

    def __call__(self, group: Units, stats: Stats) -> list[Edit]:
        """What the survey decided on this group; without one, whether to widen it is decided for it alone.

        Raises:
            NotRecyclable: it is not widened; the message says why.
        """
        found = self._memory.found.pop(group.name, None)
        if found is None:
            if stats.growth is None:
                return []
            found = self._edits(group, stats, self._proposal(group, stats, _features(stats.growth)))
        if isinstance(found, str):
            raise NotRecyclable(found)
        self._memory.last = max(self._memory.last, stats.event)
        return found

    def score(self, group: Units, stats: Stats) -> tuple[float, float]:
        """Relative and absolute gain of the best new unit, for a schedule that decides when to grow; 0 if uncertain."""
        best = self._proposal(group, stats, _features(_sample(group, stats)))
        certain = best.gain > self.certainty * best.error
        return (best.relative, best.absolute) if certain else (0.0, 0.0)

    # -- how many, with which weights ----------------------------------------------------------------------

    def _edits(self, group: Units, stats: Stats, proposal: Proposal) -> list[Edit] | str:
        """Units one after the other, each beside those before it, until one fails the test."""
        sample = _sample(group, stats)
        activation = _activation(group, sample)
        features, rows = _features(sample), []
        told = _told(proposal)
        while proposal.rows is not None and self._test.passed(proposal):
            rows.append(proposal.rows)
            if len(rows) == self.most:
                break
            features = torch.cat([features, activation(sample.inputs @ proposal.rows)[:, None]], 1)
            if len(features) < _least_rows(features):
                break
            proposal = self._proposal(group, stats, features)
        if not rows:
            return (
                f"{told}: not above relative={self.relative}, absolute={self.absolute} and certainty={self.certainty} "
                "standard errors"
            )
        return [Grow(len(rows), Given(torch.stack(rows), usual_length=group.homogeneous))]

    def _proposal(self, group: Units, stats: Stats, features: Tensor) -> Proposal:
        """The best new unit beside ``features``, judged on rows on which it was not found."""
        sample = _sample(group, stats)
        if group.why_fixed:
            raise NotRecyclable(f"it cannot change its width: {group.why_fixed}")
        if not group.exact:
            raise NotRecyclable(f"a new unit would change the output: {group.why}")
        if len(features) < _least_rows(features):
            raise NotRecyclable(
                f"{len(features)} different examples were seen since the last event, at least {_least_rows(features)} "
                f"are needed for {features.shape[1]} features. Let events be rarer, or sample_every smaller"
            )
        return widening(
            sample.inputs,
            features,
            sample.gradients,
            _activation(group, sample),
            biased=sample.biased,
            damping=self.damping,
            proposals=self.proposals,
            steps=self.steps,
            generator=stats.generator,
        )

    def _layer(self, group: Units, stats: Stats, cost: float) -> dict[str, Proposal]:
        """A hidden layer behind the group, by its name; none where it would not be the identity, or rows are few."""
        try:
            sample = _sample(group, stats)
            known = recognised(sample.preactivations, sample.activations)
        except NotRecyclable:
            return {}
        features = _features(sample)
        if known is None or known[0] != "relu" or len(features) < _least_rows(features):
            return {}
        found = deepening(
            sample.activations,
            features,
            sample.gradients,
            sample.outgoing,
            biased=sample.biased,
            cost=cost,
            damping=self.damping,
            generator=stats.generator,
        )
        return {group.name: found}

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The number of the event that expanded the network last, what it asked for, and what was refused."""
        memory = self._memory
        return {"last": memory.last, "asked": memory.asked, "refused": sorted(memory.refused)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._memory.last = int(state["last"])
        self._memory.asked = None if state["asked"] is None else (str(state["asked"][0]), int(state["asked"][1]))
        self._memory.refused = set(state["refused"])


def _sample(group: Units, stats: Stats) -> GrowthSample:
    if stats.growth is None:
        raise NotRecyclable(f"no gradient at what reads {group.name!r} was seen yet")
    if not all(bool(part.isfinite().all()) for part in (stats.growth.inputs, stats.growth.gradients)):
        raise NotRecyclable(f"NaN or infinite inputs or gradients were seen at {group.name!r}")
    return stats.growth


def _features(sample: GrowthSample) -> Tensor:
    """All that the next layer reads, ``(rows, features)``."""
    return torch.cat([sample.activations, sample.beside], 1)


def _least_rows(features: Tensor) -> int:
    """Two for each feature in each half: with fewer, what is there explains every gradient."""
    return 4 * features.shape[1]


def _activation(group: Units, sample: GrowthSample) -> Activation:
    found = recognised(sample.preactivations, sample.activations)
    if found is None:
        raise NotRecyclable(
            f"what turns the pre-activations of {group.name!r} into what its consumers read is no activation that is "
            "known: what a new unit would say cannot be foretold"
        )
    return found[1]


def _told(proposal: Proposal) -> str:
    return (
        f"the best new unit raises the score {proposal.current:.3g} by {proposal.gain:.3g} +- {proposal.error:.2g} "
        f"({proposal.relative:.2g}) and explains {proposal.absolute:.2g} of the gradient"
    )
