"""The rows that are kept of sampled passes: how many, for how long, what a resize and a saved state make of them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Grow, Prune
from recycle.kept import NEEDS
from recycle.track import Tracker


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(seed: int, size: int = 20) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def watching(net: nn.Module, *needs: str) -> Tracker:
    return Tracker(recycle.trace(net, lambda: net(batch(9))), sample_every=1, **dict.fromkeys(needs, True))


def flat(value: Any) -> list[Tensor]:
    """All tensors of what a view gives, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else vars(value).values()
    return [t for part in parts if not isinstance(part, bool) for t in flat(part)]


@pytest.mark.parametrize("need", NEEDS)
def test_a_saved_state_goes_on_bit_by_bit(need: str) -> None:
    net = mlp()
    one, other = watching(net, need), watching(net, need)
    with one:
        net(batch(0)).square().mean().backward()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for further in (False, True):
        if further:
            with one, other:
                net(batch(1)).square().mean().backward()
        for group in one.graph:
            here, there = (flat(getattr(t.stats(t.graph[group.name]), need)) for t in (one, other))
            assert len(here) == len(there) > 0
            assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_growth_keeps_passes_until_there_are_enough_rows_and_the_others_the_latest() -> None:
    net = mlp()
    with watching(net, *NEEDS) as tracker:
        for seed in range(4):
            net(batch(seed, 900)).square().mean().backward()
    stats = tracker.stats(tracker.graph["0"])
    assert torch.equal(stats.inputs["0.weight"], batch(3, 900)[::4])
    assert torch.equal(stats.sample.inputs[:, :3], batch(3, 900)[::4])
    assert torch.equal(stats.junction.branches[0].inputs[:, 0, :3], batch(3, 900)[::4])
    rows = torch.cat([batch(seed, 900) for seed in (1, 2, 3)])[-2048:]
    assert torch.equal(stats.growth.inputs[:, :3], rows)


def test_what_layers_are_told_is_the_gradient_at_what_they_say() -> None:
    net = mlp()
    with watching(net, "sample", "junction", "growth") as tracker:
        said = net[2](net[1](net[0](batch(0))))
        said.retain_grad()
        net[4](net[3](said)).square().mean().backward()
    assert torch.equal(tracker.stats(tracker.graph["2"]).sample.gradient, said.grad)
    before = tracker.stats(tracker.graph["0"])
    assert torch.equal(before.junction.branches[0].gradient, said.grad)
    assert torch.equal(before.growth.gradients, said.grad)


def test_a_pass_in_which_a_layer_is_called_twice_is_left_out() -> None:
    net = mlp()
    with watching(net, "junction", "growth") as tracker:
        net(batch(0)).square().mean().backward()
        hidden = net[1](net[0](batch(1)))
        (net[2](hidden) + net[2](2 * hidden)).square().mean().backward()
    stats = tracker.stats(tracker.graph["0"])
    assert torch.equal(stats.growth.inputs[:, :3], batch(0))
    assert torch.equal(stats.junction.branches[0].inputs[:, 0, :3], batch(0))


def test_a_gradient_that_comes_behind_a_resize_is_left_out() -> None:
    net = mlp()
    with watching(net, "sample") as tracker:
        output = net(batch(0))
        tracker.resized(tracker.graph["0"], [0, 1, 2, 3])
        output.square().mean().backward()
    assert tracker.stats(tracker.graph["2"]).sample is None


def test_a_resize_forgets_rows_of_what_changed_but_a_junction_outlives_growth_beside_it() -> None:
    for edit, kept in ((Grow(1), [0, 1, 2, 3, -1]), (Prune([1]), [0, 2, 3])):
        net = mlp()
        with watching(net, *NEEDS) as tracker:
            net(batch(0)).square().mean().backward()
        first, second = tracker.graph["0"], tracker.graph["2"]
        before = tracker.stats(second).junction.branches[0]
        recycle.apply(edit, first)
        tracker.resized(first, kept)
        stats = tracker.stats(first)
        assert stats.sample is stats.growth is None and isinstance(stats.junction, str)
        assert torch.equal(stats.inputs["0.weight"], batch(0))  # what it reads is what it was
        stats = tracker.stats(second)
        assert stats.sample is stats.growth is None and stats.inputs == {}
        if isinstance(edit, Prune):
            assert isinstance(stats.junction, str)
        else:
            after = stats.junction.branches[0]
            assert torch.equal(after.gradient, before.gradient)
            assert after.inputs.shape[2] == 6 and not after.inputs[:, :, 4].any()  # the newborn, before the bias
            assert torch.equal(after.inputs[:, :, [0, 1, 2, 3, 5]], before.inputs)
