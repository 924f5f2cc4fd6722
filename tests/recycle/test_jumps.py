"""What happens behind an event: how far the output moves, when newborns die again, how copies part."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Recycler, Reset, Split
from recycle.methods.monitor import Monitor

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.double)


class Script:
    """Makes the edits of its list, one list an event."""

    needs = ()

    def __init__(self, *events: list[Any]) -> None:
        self.events = list(events)

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        return self.events.pop(0) if self.events else []


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        net[0].bias.fill_(3.0)  # all live
    return net


def train(net: nn.Module, optimizer: Any, recycler: Recycler, steps: int) -> list[Tensor]:
    """What the network says after each update."""
    said = []
    for _ in range(steps):
        optimizer.zero_grad()
        with recycler.listening():
            ((net(X) - 3) ** 2).mean().backward()
        optimizer.step()
        said.append(net(X).detach())
    return said


def watched(net: nn.Module, method: Any, optimizer: Any, **options: Any) -> Recycler:
    graph = recycle.trace(net, lambda: net(X))
    return Recycler(graph, method, optimizers=[optimizer], sample_every=1, **options)


def moved(then: Tensor, now: Tensor) -> float:
    return float((now - then).norm() / then.norm())


def test_the_output_at_the_event_and_5_20_50_and_200_updates_later() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    recycler = watched(net, Script([Reset([1])], [], []), sgd, probe=lambda: net(X))
    train(net, sgd, recycler, 3)
    before = net(X).detach()
    first = recycler.step()
    assert first.jumps == {0: pytest.approx(moved(before, net(X).detach()))} and first.jumps[0] > 0.01
    said = train(net, sgd, recycler, 60)
    assert recycler.observe(keep_window=True).jumps == pytest.approx(
        {k: moved(before, said[k - 1]) for k in (5, 20, 50)}
    )
    second = recycler.step()
    assert second.jumps == pytest.approx({0: 0.0} | {k: moved(before, said[k - 1]) for k in (5, 20, 50)})
    assert second.to_dict()["jumps"].keys() == {"0", "5", "20", "50"}
    before = net(X).detach()
    said = train(net, sgd, recycler, 201)
    assert recycler.step().jumps[200] == pytest.approx(moved(before, said[199]))


def test_an_exact_edit_does_not_jump_and_a_hand_made_one_jumps_by_what_it_took() -> None:
    """Outputs 2 + 1 = 3 on one input; without the second unit 2: a jump of 1 / 3."""
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    x = torch.ones(2, 1, dtype=torch.double)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0], [1.0], [-1.0]]))
        net[2].weight.fill_(1.0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    graph = recycle.trace(net, lambda: net(x))
    method = Script([Split([0], into=[2])], [Reset([1])])
    recycler = Recycler(graph, method, optimizers=[sgd], sample_every=1, probe=lambda: net(x))
    jumps = []
    for _ in range(2):
        with recycler.listening():
            net(x).sum().backward()
        sgd.step()
        jumps.append(recycler.step().jumps[0])
    assert jumps == [0.0, pytest.approx(1 / 3)]


def test_of_several_outputs_the_farthest_counts_and_one_that_is_zero_does_not() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    found = []
    for probe in (lambda: net(X), lambda: {"v": net(X), "small": 1e-3 * net(X), "none": 0 * net(X), "fixed": X}):
        recycler = watched(copy.copy(net), Script([]), sgd, probe=probe)
        train(net, sgd, recycler, 1)
        recycler._jumps.before_event(0)  # type: ignore[union-attr]
        with torch.no_grad():
            net[2].weight.mul_(1.5)
            found.append(recycler._jumps.after_event()[0])  # type: ignore[union-attr]
            net[2].weight.div_(1.5)
    assert found[0] == pytest.approx(found[1]) and found[0] > 0


def test_looking_changes_nothing() -> None:
    def run(looks: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1)).double()
        adam = torch.optim.Adam(net.parameters())
        recycler = watched(net, Monitor(), adam, probe=(lambda: net(X)) if looks else None)
        for _ in range(3):
            train(net, adam, recycler, 6)
            recycler.step()
        assert net.training
        return [t.clone() for t in net.state_dict().values()], torch.get_rng_state()

    with torch.random.fork_rng(devices=[]):
        (one, first), (other, second) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and torch.equal(first, second)


def test_a_saved_recycler_looks_on() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    recycler = watched(net, Script([Reset([1])]), sgd, probe=lambda: net(X))
    train(net, sgd, recycler, 3)
    recycler.step()
    train(net, sgd, recycler, 10)
    twin = mlp()
    twin.load_state_dict(net.state_dict())
    other = torch.optim.SGD(twin.parameters(), lr=1e-3)
    resumed = watched(twin, Script(), other, probe=lambda: twin(X))
    resumed.load_state_dict(copy.deepcopy(recycler.state_dict()))
    train(net, sgd, recycler, 15)
    train(twin, other, resumed, 15)
    found = recycler.step().jumps
    assert found.keys() == {0, 5, 20} and resumed.step().jumps == found


def test_without_a_probe_there_are_no_jumps_and_without_an_optimizer_no_probe() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    recycler = watched(net, Monitor(), sgd)
    train(net, sgd, recycler, 6)
    assert recycler.step().jumps == {} and "jumps" not in recycler.step().to_dict()
    with pytest.raises(ValueError, match="a probe counts updates by optimizer steps"):
        Recycler(recycle.trace(net, lambda: net(X)), Monitor(), probe=lambda: net(X))


def test_how_long_a_recycled_unit_lived_and_how_far_copies_have_parted() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    recycler = watched(net, Script([Split([0], into=[1]), Reset([2])]), sgd)
    train(net, sgd, recycler, 2)
    group = recycler.step().groups["0"]
    assert math.isnan(group.resemblance) and math.isnan(group.re_death_age)
    with torch.no_grad():
        net[0].weight[1] = torch.tensor([3.0, 0.0])
        net[0].bias[1] = 4.0
        net[0].weight[0] = torch.tensor([0.0, 0.0])
        net[0].bias[0] = 1.0
        net[0].bias[2] = 1.0
    train(net, sgd, recycler, 7)
    group = recycler.step().groups["0"]
    assert group.resemblance == pytest.approx(0.8)  # (3, 0, 4) and (0, 0, 1)
    assert group.re_died == 0
    with torch.no_grad():
        net[0].bias[[1, 2]] = -1e3
    train(net, sgd, recycler, 4)
    group = recycler.step().groups["0"]
    assert (group.re_died, group.re_death_age) == (2, 11.0)
    assert group.resemblance < 0
