"""What several trackers saw, each on its part of every batch, against what one saw on the whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle.merged import condensed, merged
from recycle.stats import Stats
from recycle.track import Tracker

FIELDS = (
    "samples", "firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum", "gradient", "weight_gradient",
    "age", "incoming_norm", "outgoing_norm", "silence", "rarity", "updates", "finite", "activations",
)  # fmt: skip
WATCHED = {"sample_every": 1, "firing": True, "sample": True, "inputs": True}


class TwoReaders(nn.Module):
    """Units that one layer reads as they are, and another behind an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.other = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        units = self.body(x).tanh()
        return self.one(units) + self.other(units.relu())


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (plain, (5,)),
    "two readers": (TwoReaders, (5,)),
    "convolutions": (convolutions, (2, 6, 6)),
}


class Watched:
    """A copy of a network under a tracker of its own."""

    def __init__(self, net: nn.Module, example: Tensor, **how: Any) -> None:
        self.net = copy.deepcopy(net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1)
        self.graph = recycle.trace(self.net, lambda: self.net(example))
        self.tracker = Tracker(self.graph, **({"optimizers": [self.optimizer]} | WATCHED | how))

    def look(self, x: Tensor, scale: float) -> None:
        self.optimizer.zero_grad()
        with self.tracker.listening():
            (self.net(x).square().flatten(1).mean(1).sum() * scale).backward()


def train(ranks: Sequence[Watched], alone: Watched, batches: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Every rank on its part; their gradients are averaged."""
    for x in batches:
        alone.look(x, 1 / len(x))
        for rank, part in zip(ranks, x.split(list(sizes)), strict=True):
            rank.look(part, len(ranks) / len(x))
        held = zip(*(rank.net.parameters() for rank in ranks), strict=True)
        for copies in held:
            mean = torch.stack([p.grad for p in copies if p.grad is not None]).sum(0) / len(ranks)
            for parameter in copies:
                parameter.grad = mean.clone()
        for each in (alone, *ranks):
            each.optimizer.step()


def together(ranks: Sequence[Watched]) -> list[dict[str, Stats]]:
    """What each rank's tracker says when it holds what all saw."""
    states = [rank.tracker.state_dict() for rank in ranks]
    told = [condensed(state) for state in states]
    found = []
    for rank, own in zip(ranks, states, strict=True):
        rank.tracker.load_state_dict(merged(told, own))
        found.append({group.name: rank.tracker.stats(group) for group in rank.graph})
    return found


def dead_in_part(make: Any) -> nn.Module:
    net = make().double()
    with torch.no_grad():
        next(net.parameters())[0] = 0.0
        list(net.parameters())[1][:2] = torch.tensor([-1.0, -2.0])  # the first dead, the second nearly so
    return net


@pytest.mark.parametrize("sizes", [(8, 8), (11, 0, 5), (4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("kind", NETS)
def test_ranks_together_see_what_one_process_sees(kind: str, sizes: tuple[int, ...]) -> None:
    make, shape = NETS[kind]
    net = dead_in_part(make)
    batches = [torch.randn(sum(sizes), *shape, dtype=torch.double) for _ in range(6)]
    alone = Watched(net, batches[0])
    ranks = [Watched(net, batches[0], shared=True) for _ in sizes]
    for window in (batches[:4], batches[4:]):
        train(ranks, alone, window, sizes)
        expected = {group.name: alone.tracker.stats(group) for group in alone.graph}
        for found in together(ranks):
            assert found.keys() == expected.keys()
            for name, stats in found.items():
                check(stats, expected[name])
        for each in (alone, *ranks):
            each.tracker.clear()


def check(stats: Stats, expected: Stats) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), equal_nan=True,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
    assert stats.inputs is not None and expected.inputs is not None
    torch.testing.assert_close(stats.inputs, expected.inputs)
    assert (stats.sample is None) == (expected.sample is None)
    if stats.sample is not None and expected.sample is not None:
        torch.testing.assert_close(vars(stats.sample), vars(expected.sample))
    assert torch.equal(stats.dead, expected.dead)


def test_windows_of_hundreds_of_passes_are_merged_too() -> None:
    net = dead_in_part(plain)
    batches = [torch.randn(4, 5, dtype=torch.double) for _ in range(300)]
    alone = Watched(net, batches[0], sample=False, inputs=False)
    ranks = [Watched(net, batches[0], shared=True, sample=False, inputs=False) for _ in range(2)]
    train(ranks, alone, batches, (2, 2))
    for stats in together(ranks):
        for name in FIELDS[:-1]:
            expected = getattr(alone.tracker.stats(alone.graph["0"]), name)
            torch.testing.assert_close(getattr(stats["0"], name), expected, msg=lambda text, name=name: name + text)


def test_what_was_seen_of_units_that_no_rank_ran_stays_unknown() -> None:
    net = dead_in_part(plain)
    ranks = [Watched(net, torch.randn(4, 5, dtype=torch.double), shared=True) for _ in range(2)]
    for found in together(ranks):
        stats = found["0"]
        assert stats.samples == 0 and stats.activations is None and stats.inputs == {} and stats.sample is None
        assert stats.gradient.isnan().all() and stats.weight_gradient.isnan().all() and stats.silence.isnan().all()


def test_one_rank_with_a_nan_spoils_the_window_of_all() -> None:
    net = dead_in_part(plain)
    x = torch.randn(4, 5, dtype=torch.double)
    ranks = [Watched(net, x, shared=True) for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.look(x * (torch.nan if number == 1 else 1.0), 1.0)
    for found in together(ranks):
        assert not found["0"].finite and found["0"].samples == 12


def test_rows_are_thinned_to_what_one_rank_keeps_and_rows_of_another_shape_left_out() -> None:
    net = dead_in_part(plain)
    example = torch.randn(3, 7, 5, dtype=torch.double)
    ranks = [Watched(net, example, shared=True) for _ in range(3)]
    for rank, length in zip(ranks, (7, 4, 7), strict=True):
        rank.look(torch.full((250, length, 5), float(length), dtype=torch.double), 1.0)
    for found in together(ranks):
        stats = found["0"]
        assert stats.samples == 250 * 18  # of every rank
        assert stats.activations is not None and len(stats.activations) == 256
        assert stats.inputs is not None and len(stats.inputs["0.weight"]) <= 256
        assert stats.sample is not None and bool((stats.sample.inputs[:, :5] == 7).all())
        assert len(stats.sample.inputs) <= 32 * 7


def test_a_rank_that_ran_less_counts_updates_as_the_one_that_ran_most() -> None:
    net = dead_in_part(plain)
    x = torch.randn(4, 5, dtype=torch.double)
    ranks = [Watched(net, x, shared=True, optimizers=()) for _ in range(2)]
    for rank, passes in zip(ranks, (1, 3), strict=True):
        for _ in range(passes):
            rank.look(x, 1.0)
    for found in together(ranks):
        assert found["0"].updates == 3 and found["0"].samples == 16
        assert found["0"].age.tolist() == [3.0] * 12
        assert float(found["0"].silence.max()) == 3.0  # the dead unit, of the longer run
