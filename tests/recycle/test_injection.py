"""Plasticity injection: the output stays, the old head is frozen, and the new one is really trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import NotRecyclable, Recycler
from recycle.injected import InjectedHidden, InjectedOutput, is_injected
from recycle.injection import inject, wrap_again
from recycle.interventions import Inject
from recycle.methods.l2_init import L2Init
from recycle.methods.monitor import Monitor
from recycle.methods.plasticity_injection import PlasticityInjection
from recycle.methods.redo import ReDo

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.double)


def mlp(*between: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), *between, nn.Linear(4, 1)]
        return nn.Sequential(*layers).double()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, recycler: Recycler, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        with recycler.listening():
            ((net(X) - 3) ** 2).mean().backward()
        optimizer.step()


def watched(net: nn.Module, optimizer: torch.optim.Optimizer, method: Any = None, **options: Any) -> Recycler:
    graph = recycle.trace(net, lambda: net(X))
    options = {"sample_every": 1, "generator": torch.Generator().manual_seed(0)} | options
    return Recycler(graph, method or PlasticityInjection(), optimizers=[optimizer], **options)


def test_the_output_stays_the_old_head_freezes_and_the_new_one_learns() -> None:
    """One published injection left the old head trainable and the new one out of the optimizer: nothing happened."""
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    recycler = watched(net, adam)
    train(net, adam, recycler)
    said, head = net(X).detach(), copy.deepcopy(net[2:])
    report = recycler.step()
    assert report.interventions == (Inject(),) and not report.note
    assert isinstance(net[2], InjectedHidden) and isinstance(net[4], InjectedOutput)
    assert torch.equal(net(X), said)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {f"{part}.{leaf}" for part in ("0", "2.new", "4.new") for leaf in ("weight", "bias")}
    held = [p for group in adam.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad} and len(held) == 6
    assert set(adam.state) == {net[0].weight, net[0].bias}  # the trunk goes on, the new head begins
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, adam, recycler)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained
    # old + new - copy of new, each the two layers and what stands between them
    with torch.no_grad():
        h = torch.relu(net[0](X))
        parts = [getattr(net[4], k)(torch.relu(getattr(net[2], k)(h))) for k in ("old", "new", "twin")]
        torch.testing.assert_close(net(X), parts[0] + parts[1] - parts[2])
        torch.testing.assert_close(parts[0], head(h))


def test_it_happens_once_and_the_new_head_is_watched_from_then_on() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    recycler = watched(net, sgd, [PlasticityInjection(), Monitor()])
    train(net, sgd, recycler)
    assert [g.name for g in recycler.graph] == ["0", "2"]
    recycler.step()
    assert [g.name for g in recycler.graph] == ["2.new"]
    assert "requires_grad=False" in recycler.graph.frozen["0"]
    layers = str(net)
    with torch.no_grad():
        net[2].new.bias.fill_(10.0)
        net[2].new.bias[1] = -1e3
    train(net, sgd, recycler)
    report = recycler.step()
    assert report.interventions == () and str(net) == layers and report.event == 2
    assert report.groups["2.new"].dead == 0.25 and report.groups["2.new"].samples == 48
    assert recycler.tracker.passes == 6


def test_new_heads_are_as_the_network_begins_and_come_from_the_generator() -> None:
    nets = [mlp(), mlp(), mlp()]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        graph = recycle.trace(net, lambda net=net: net(X))
        inject(graph, generator=torch.Generator().manual_seed(seed))
    weights = [net[2].new.weight for net in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(nets[0][2].new.weight, nets[0][2].twin.weight)
    assert float(weights[0].detach().abs().max()) <= 5**-0.5 and not torch.equal(weights[0], nets[0][2].old.weight)


@pytest.mark.parametrize("tau", [1.0, 0.01])
def test_a_target_network_keeps_its_own_old_head_and_gets_the_same_new_one(tau: float) -> None:
    net, target = mlp(), mlp()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    recycler = watched(net, sgd, targets=[(target, tau)])
    train(net, sgd, recycler)
    said = target(X).detach()
    recycler.step()
    assert torch.equal(target(X), said)
    assert torch.equal(net[4].new.weight, target[4].new.weight) and net[4].new.weight is not target[4].new.weight
    with torch.no_grad():  # a hard copy, parameter by parameter, as stable-baselines3 makes it
        for mine, theirs in zip(net.parameters(), target.parameters(), strict=True):
            theirs.copy_(mine)
    assert torch.equal(net(X), target(X))


def test_a_network_is_built_again_for_a_saved_state() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    recycler = watched(net, adam)
    train(net, adam, recycler)
    recycler.step()
    train(net, adam, recycler)
    again = mlp()
    other = torch.optim.Adam(again.parameters(), lr=0.1)
    wrap_again(again, {"2": InjectedHidden, "4": InjectedOutput}, [other])
    again.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(adam.state_dict()))  # it would share the tensors
    resumed = watched(again, other)
    resumed.load_state_dict(recycler.state_dict())
    for module, optimizer, who in ((net, adam, recycler), (again, other, resumed)):
        train(module, optimizer, who)
    assert torch.equal(net(X), again(X)) and recycler.step() == resumed.step()


class Wired(nn.Module):
    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (mlp(nn.Dropout(0.5)), "dropout would hit the new head and its copy in different places"),
        (mlp(nn.BatchNorm1d(4)), "'2': its units also belong to 4"),
        (mlp(nn.LayerNorm(4)), "mixes the units"),
        (nn.Sequential(nn.Linear(2, 1)).double(), "it has no hidden layer before its output"),
        (
            Wired(
                lambda self, x: self.c(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], 1)),
                a=nn.Linear(2, 3), b=nn.Linear(2, 3), c=nn.Linear(6, 1),
            ).double(),
            "'c.weight' does not read its units in order and alone",
        ),
        (
            Wired(lambda self, x: self.c(torch.relu(self.a(x))[:, :4]), a=nn.Linear(2, 4), c=nn.Linear(4, 1)).double(),
            "injecting would change the output",
        ),
    ],
)  # fmt: skip
def test_a_head_that_cannot_be_injected_is_refused_and_nothing_changes(net: nn.Module, reason: str) -> None:
    adam = torch.optim.Adam(net.parameters())
    layers, before = str(net), {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(NotRecyclable, match=reason):
        inject(recycle.trace(net, lambda: net(X)), optimizers=[adam])
    assert str(net) == layers and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert {id(p) for g in adam.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}


def test_a_refusal_is_a_note_of_the_report() -> None:
    net = mlp(nn.Dropout(0.5))
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    recycler = watched(net, sgd)
    train(net, sgd, recycler)
    assert "dropout" in recycler.step().note
    train(net, sgd, recycler)
    assert recycler.step().groups["0"].samples == 48  # it watches on


def test_a_second_injection_and_other_methods_beside_it_are_refused() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(X))
    inject(graph)
    assert is_injected(net)
    with pytest.raises(NotRecyclable, match="injected already"):
        inject(recycle.trace(net, lambda: net(X)))
    for other in (ReDo(), L2Init()):
        with pytest.raises(ValueError, match=f"plasticity_injection freezes weights, and {type(other).__name__} would"):
            watched(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1), [PlasticityInjection(), other])
