"""Methods that act on whole networks: what they ask for, what changes, and what the optimizer remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import recycle
from recycle import NotRecyclable, Recycler, Reset
from recycle.interventions import Pull, Renew, Shrink
from recycle.layers import NetworkLayers, intervene, layers_of
from recycle.methods.cbp import ContinualBackprop
from recycle.methods.l2_init import L2Init
from recycle.methods.layer_reset import LayerReset
from recycle.methods.monitor import Monitor
from recycle.methods.redo import ReDo
from recycle.methods.shrink_perturb import ShrinkPerturb

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(3), dtype=torch.double)


class TwoHeads(nn.Module):
    """A trunk, a hidden layer of one head only, a norm, a bare parameter and a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2)
        self.trunk = nn.Linear(2, 6)
        self.norm = nn.BatchNorm1d(6)
        self.deep = nn.Linear(6, 4)
        self.pi = nn.Linear(4, 2)
        self.vf = nn.Linear(6, 1)
        self.log_std = nn.Parameter(torch.zeros(2))
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.norm(self.trunk(self.frozen(x))))
        return self.pi(torch.relu(self.deep(h))) * self.log_std.exp(), self.vf(h)


def two_heads() -> TwoHeads:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoHeads().double()


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()


def loss_of(net: nn.Module) -> Tensor:
    out = net(X)
    return sum(((o - 1) ** 2).mean() for o in (out if isinstance(out, tuple) else (out,)))  # type: ignore[return-value]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, recycler: Recycler | None = None, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        if recycler is None:
            loss_of(net).backward()
        else:
            with recycler.listening():
                loss_of(net).backward()
        optimizer.step()


def watched(net: nn.Module, method: Any, optimizer: torch.optim.Optimizer, **options: Any) -> Recycler:
    graph = recycle.trace(net, lambda: net(X))
    return Recycler(graph, method, optimizers=[optimizer], sample_every=1, **options)


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def ones(name: str, tensor: Tensor, generator: torch.Generator | None) -> None:
    tensor.fill_(1.0)


# ---------------------------------------------------------------- layers


def test_layers_are_counted_from_the_output() -> None:
    net = two_heads()
    found = layers_of(recycle.trace(net, lambda: net(X)))
    depth = {"trunk": 2, "norm": 2, "deep": 2, "pi": 1, "vf": 1}  # the nearest head counts
    assert found == NetworkLayers(depth, gaps=("deep",))  # two layers read the trunk


def test_layers_of_excluded_groups_are_left_out_and_those_frozen_for_a_reason_are_no_heads() -> None:
    net = two_heads()
    graph = recycle.trace(net, lambda: net(X))
    assert layers_of(graph.select(exclude=["deep"])).depth == {"trunk": 2, "norm": 2, "pi": 1, "vf": 1}

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(self.a(x).sort(-1).values)))

    odd = Sorted().double()
    assert layers_of(recycle.trace(odd, lambda: odd(X))).depth == {"a": 0, "b": 2, "c": 1}


def test_a_layer_that_does_not_say_how_it_begins_is_not_listed() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.scale = nn.Parameter(torch.ones(1))  # reset_parameters knows nothing of it

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), Own()).double()
    graph = recycle.trace(net, lambda: net(X))
    assert layers_of(graph).depth == {"0": 2}
    with pytest.raises(NotRecyclable, match="no layer '2' to intervene on; there are 0"):
        intervene(Renew(["2"]), graph)


def test_a_layer_whose_weight_is_computed_is_left_alone_and_the_others_are_not() -> None:
    net = nn.Sequential(weight_norm(nn.Linear(2, 8)), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    graph = recycle.trace(net, lambda: net(X))
    assert layers_of(graph).depth == {"2": 2, "4": 1}
    before = [parameter.detach().clone() for parameter in net.parameters()]
    intervene(Renew(["2", "4"]), graph)
    changed = {name for (name, p), was in zip(net.named_parameters(), before, strict=True) if not torch.equal(p, was)}
    assert changed == {"2.weight", "2.bias", "4.weight", "4.bias"}


# ---------------------------------------------------------------- shrink and perturb


def test_shrink_and_perturb_by_hand() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters())
    recycler = watched(net, ShrinkPerturb(shrink=0.5, perturb=0.25), adam, init=ones)
    train(net, adam, recycler)
    before = bits(net)
    report = recycler.step()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, 0.5 * before[name] + 0.25)
    assert report.edits == () and report.recycled == 0
    assert report.interventions == (Shrink(["0", "2"], keep=0.5, perturb=0.25, moments="fresh"),)
    assert report.to_dict()["interventions"] == [
        {"edit": "Shrink", "layers": ["0", "2"], "keep": 0.5, "perturb": 0.25, "moments": "fresh"}
    ]
    assert not any(adam.state.get(p) for p in net.parameters())


def test_the_optimizer_keeps_its_state_if_asked_to() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters())
    recycler = watched(net, ShrinkPerturb(moments="keep"), adam)
    train(net, adam, recycler)
    before = copy.deepcopy(adam.state_dict()["state"])
    recycler.step()
    after = adam.state_dict()["state"]
    assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])


def test_an_interpolation_leaves_a_fresh_network_as_large_as_it_was() -> None:
    """Perturbing with anything but the network's own initialisation changes the scale of its layers for good."""
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1))
    graph = recycle.trace(net, lambda: net(torch.randn(2, 64)))
    fresh = nn.Linear(64, 512).weight.std().detach()
    intervene(Renew(["0"]), graph, generator=torch.Generator().manual_seed(0))
    assert float(net[0].weight.std().detach() / fresh) == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        net[0].weight.mul_(30)
    for _ in range(50):
        intervene(Shrink(["0"], keep=0.8, perturb=0.2), graph, generator=torch.Generator().manual_seed(1))
    assert float(net[0].weight.std().detach() / fresh) == pytest.approx(1, abs=0.02)


def test_only_the_layers_named_change_and_parameters_that_are_not_trained_never_do() -> None:
    net = two_heads()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recycler = watched(net, ShrinkPerturb(heads=False), sgd)
    train(net, sgd, recycler)
    before = bits(net)
    recycler.step()
    inner = {f"{layer}.{leaf}" for layer in ("trunk", "norm", "deep") for leaf in ("weight", "bias")}
    assert changed(before, bits(net)) == inner


def test_a_polyak_target_shrinks_by_itself_with_the_same_noise_and_a_hard_one_waits() -> None:
    net, soft, hard = mlp(), mlp(), mlp()
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.mul_(3)
    before, hard_before = bits(soft), bits(hard)
    graph = recycle.trace(net, lambda: net(X))
    start = bits(net)
    intervene(Shrink(["0"], keep=0.5, perturb=1.0), graph, targets=[(soft, 0.01), (hard, 1.0)])
    noise = net[0].weight - 0.5 * start["0.weight"]
    torch.testing.assert_close(soft[0].weight, 0.5 * before["0.weight"] + noise)
    assert changed(before, bits(soft)) == {"0.weight", "0.bias"} and not changed(hard_before, bits(hard))


# ---------------------------------------------------------------- layer reset


def test_a_reset_layer_is_new_and_its_optimizer_still_trains_it() -> None:
    """A published layer reset replaced the modules: 1 of 13 parameters was left in the optimizer."""
    net = two_heads()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    recycler = watched(net, LayerReset(), adam)
    train(net, adam, recycler)
    before = bits(net)
    report = recycler.step()
    assert report.interventions == (Renew(["pi", "vf"]),)
    heads = {"pi.weight", "pi.bias", "vf.weight", "vf.bias"}
    assert changed(before, bits(net)) == heads
    assert float(net.pi.weight.detach().abs().max()) <= 0.5  # as nn.Linear(4, 2) begins
    held = {id(p) for group in adam.param_groups for p in group["params"]}
    assert all(id(p) in held for p in net.parameters())
    assert {n for n, p in net.named_parameters() if p in adam.state} == {
        "trunk.weight", "trunk.bias", "norm.weight", "norm.bias", "deep.weight", "deep.bias", "log_std"}  # fmt: skip
    renewed = bits(net)
    train(net, adam, steps=1)
    assert heads <= changed(renewed, bits(net))
    assert all(float(adam.state[net.pi.weight][k].max()) == 1 for k in ("step",))


def test_all_layers_and_named_ones() -> None:
    net = two_heads()
    graph = layers_of(recycle.trace(net, lambda: net(X)))
    assert LayerReset(last=None).on_networks([graph], {}) == [Renew(["trunk", "norm", "deep", "pi", "vf"])]
    assert LayerReset(layers=["vf", "q_net.4"]).on_networks([graph], {}) == [Renew(["vf"])]  # type: ignore[arg-type]
    assert LayerReset(layers="elsewhere").on_networks([graph], {}) == []  # type: ignore[arg-type]


def test_buffers_begin_anew_too() -> None:
    net = two_heads()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recycler = watched(net, LayerReset(layers=("norm",)), sgd)
    train(net, sgd, recycler)
    assert int(net.norm.num_batches_tracked) > 0
    recycler.step()
    assert int(net.norm.num_batches_tracked) == 0 and float(net.norm.running_mean.abs().max()) == 0


def test_optimizer_state_alone_can_be_reset() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters())
    recycler = watched(net, LayerReset(last=None, weights=False), adam)
    train(net, adam, recycler)
    before = bits(net)
    recycler.step()
    assert not changed(before, bits(net)) and not any(adam.state.get(p) for p in net.parameters())


def test_units_of_a_reset_layer_are_newborn_and_no_longer_dead() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    with torch.no_grad():
        net[0].bias[1] = -1e3
    recycler = watched(net, LayerReset(last=2), sgd)
    train(net, sgd, recycler)
    group = recycler.step().groups["0"]
    assert (group.dead, group.dead_after) == (0.25, 0.0)
    assert recycler.histograms()["0/age"].tolist() == [0, 0, 0, 0]


def test_a_history_that_cannot_be_forgotten_in_part_is_refused_and_nothing_changes() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(X))
    before = bits(net)
    with pytest.raises(NotRecyclable, match="LBFGS keeps one flat history"):
        intervene(Renew(["0"]), graph, optimizers=[torch.optim.LBFGS(net.parameters())])
    with pytest.raises(NotRecyclable, match="no layer 'one' to intervene on; there are 0, 2"):
        intervene(Renew(["0", "one"]), graph)
    assert not changed(before, bits(net))


# ---------------------------------------------------------------- when


def test_nothing_is_done_without_training_or_before_the_end_of_the_warm_up() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recycler = watched(net, ShrinkPerturb(), sgd, warmup=4)
    before = bits(net)
    assert recycler.step().note == "no training pass was seen since the last event"
    train(net, sgd, recycler)
    before = bits(net)
    report = recycler.step()
    assert report.note == "warming up: 3 of 4 updates" and report.to_dict()["note"] == report.note
    assert recycler.observe().interventions == () and not changed(before, bits(net))
    train(net, sgd, recycler)
    assert recycler.step().interventions


# ---------------------------------------------------------------- L2 Init


def penalised(net: nn.Module, start: dict[str, Tensor], strength: float) -> Tensor:
    return strength * sum(((p - start[n]) ** 2).sum() for n, p in net.named_parameters())  # type: ignore[return-value]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
)
def test_the_penalty_is_that_of_the_loss_it_stands_for(make: Any) -> None:
    mine, theirs = mlp(), mlp()
    start = bits(theirs)
    first, second = make(mine.parameters()), make(theirs.parameters())
    recycler = watched(mine, L2Init(strength=0.05), first)
    for _ in range(20):
        train(mine, first, recycler, steps=1)
        second.zero_grad()
        (loss_of(theirs) + penalised(theirs, start, 0.05)).backward()
        second.step()
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-12, atol=1e-12)
    assert changed(start, bits(mine))


@pytest.mark.parametrize("mode", ["penalty", "decoupled"])
def test_one_pull_by_hand(mode: Any) -> None:
    """p = 3, p0 = 1, gradient 4, rate .1, strength .5: the step is .1 * (4 + 2 * .5 * (3 - 1)) = .6."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[2].weight.fill_(1.0)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    graph = recycle.trace(net, lambda: net(torch.ones(2, 1, dtype=torch.double)))
    recycler = Recycler(graph, L2Init(strength=0.5, mode=mode), optimizers=[sgd])
    recycler.attach()
    with torch.no_grad():
        net[2].weight.fill_(3.0)
    net[2].weight.grad = torch.full_like(net[2].weight, 4.0)
    untouched = net[0].weight.clone()
    sgd.step()
    torch.testing.assert_close(net[2].weight.detach(), torch.full_like(net[2].weight, 2.4))
    assert torch.equal(net[2].weight.grad, torch.full_like(net[2].weight, 4.0))  # the loss's own again
    assert torch.equal(net[0].weight, untouched)  # it got no gradient
    recycler.detach()
    sgd.step()
    torch.testing.assert_close(net[2].weight.detach(), torch.full_like(net[2].weight, 2.0))


def test_decoupled_pulls_are_not_rescaled_by_adam() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    recycler = watched(net, L2Init(strength=0.5, mode="decoupled"), adam)
    recycler.attach()
    with torch.no_grad():
        net[2].weight.add_(1.0)
    before = net[2].weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    torch.testing.assert_close(net[2].weight.detach(), before - 0.1 * 2 * 0.5 * 1.0)


def test_statistics_are_those_of_the_loss_alone() -> None:
    net, twin = mlp(), mlp()
    found = []
    for module, method in ((net, L2Init(strength=10.0)), (twin, Monitor())):
        sgd = torch.optim.SGD(module.parameters(), lr=0.0)
        recycler = watched(module, method, sgd)
        recycler.attach()
        with torch.no_grad():
            module[0].weight.add_(1.0)
        train(module, sgd, recycler, steps=1)
        found.append(recycler.tracker.stats(recycler.graph["0"]).weight_gradient)
    assert torch.equal(*found)


def test_without_an_optimizer_or_with_a_closure_it_is_refused() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(X))
    with pytest.raises(ValueError, match=r"L2Init acts at every optimizer step: pass optimizers="):
        Recycler(graph, L2Init())
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    Recycler(graph, L2Init(), optimizers=[sgd]).attach()
    with pytest.raises(NotRecyclable, match="Pass mode='decoupled'"):
        sgd.step(lambda: 0.0)


def test_the_initial_values_travel_with_the_state() -> None:
    net = mlp()
    start = bits(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recycler = watched(net, [ReDo(), L2Init()], sgd)
    train(net, sgd, recycler)
    state = recycler.state_dict()
    again = watched(net, [ReDo(), L2Init()], torch.optim.SGD(net.parameters(), lr=0.1))
    again.load_state_dict(state)
    (anchor,) = again.state_dict()["anchors"]
    assert not changed(start, anchor) and changed(start, bits(net))
    wide = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    other = watched(wide, [ReDo(), L2Init()], torch.optim.SGD(wide.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="saved for"):
        other.load_state_dict(state)


# ---------------------------------------------------------------- several methods


class Widen:
    needs = ()

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        return [recycle.Grow(1)]


def test_a_method_of_units_goes_with_those_of_networks() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    with torch.no_grad():
        net[0].bias[1] = -1e3
    recycler = watched(net, [ReDo(), Monitor(), ShrinkPerturb(heads=False), LayerReset(), L2Init()], sgd)
    train(net, sgd, recycler)
    report = recycler.step()
    assert report.edits == (("0", Reset([1])),)
    assert [(type(i), i.layers) for i in report.interventions] == [(Shrink, ["0"]), (Renew, ["2"])]


def test_one_layer_is_changed_once_an_event() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    recycler = watched(net, [ShrinkPerturb(), LayerReset()], sgd)
    train(net, sgd, recycler)
    report = recycler.step()
    assert [type(i) for i in report.interventions] == [Shrink]
    assert report.note == "Renew of 2: changed at this event already"


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ([ReDo(), ContinualBackprop()], "ReDo and ContinualBackprop both edit single units"),
        ([ReDo(), Widen()], "ReDo and Widen both edit single units"),
        ([L2Init(), L2Init(strength=1e-2)], "L2Init is named twice"),
        ([], "needs a method"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(methods: list[Any], reason: str) -> None:
    net = mlp()
    with pytest.raises(ValueError, match=reason):
        watched(net, methods, torch.optim.SGD(net.parameters(), lr=0.1))


def test_units_do_not_come_or_go_while_weights_are_pulled_to_where_they_began() -> None:
    net = mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recycler = watched(net, [Widen(), L2Init()], sgd)
    train(net, sgd, recycler)
    group = recycler.step().groups["0"]
    assert group.width == 4 and "units cannot come or go" in group.note


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ShrinkPerturb(shrink=1.1), "0 <= shrink <= 1 .*shrink=1.1"),
        (lambda: ShrinkPerturb(perturb=-1), "perturb >= 0, got .*perturb=-1"),
        (lambda: ShrinkPerturb(moments="zero"), "no moments 'zero': there are fresh, keep"),  # type: ignore[arg-type]
        (lambda: L2Init(strength=-1e-3), "strength >= 0, got strength=-0.001"),
        (lambda: L2Init(mode="exact"), "no mode 'exact': there are penalty, decoupled"),  # type: ignore[arg-type]
        (lambda: LayerReset(last=0), "last >= 1 .*got last=0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_pulls_name_what_they_pull() -> None:
    layers = NetworkLayers({"a": 2, "b": 1, "c": 0})
    assert L2Init(heads=False).at_updates([layers]) == [Pull(["a", "c"], strength=1e-3)]
    assert L2Init().on_networks([layers], {}) == []
