"""Bugs that published recyclers shipped with: one test each that would have caught it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Fold, Recycler, Reset, Split
from recycle.methods.redo import ReDo

METHODS = sorted(name for name in recycle.METHODS if callable(recycle.find(name)()))  # those that edit units
RECYCLING = [
    name for name in METHODS if name not in ("monitor", "replay", "folding")
]  # these act on a file's or examples' word alone
EAGER = {
    "gradient_cutoff": {"split": 0.02},
    "cbp": {"rate": 0.25, "maturity": 0},
    "snr": {"eta": 0.5},
}  # options with which a method acts wherever a unit is dead


def after_one_update(net: nn.Module, method: str) -> Recycler:
    """A recycler whose network has seen one batch, with gradients, and not moved."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    method_object = recycle.find(method)(**EAGER.get(method, {}))
    recycler = Recycler(recycle.trace(net, lambda: net(X)), method_object, optimizers=[optimizer], sample_every=1)
    with recycler.listening():
        net(X).square().mean().backward()
    optimizer.step()
    return recycler


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


X = rand(32, 3)


def mlp(*, alive: bool = False, bias: bool = True) -> nn.Module:
    net = built(lambda: nn.Sequential(nn.Linear(3, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(),
                                      nn.Linear(5, 2)))  # fmt: skip
    if alive:
        with torch.no_grad():
            net[0].bias.fill_(2.0)
            net[2].bias.fill_(6.0)
    return net


def nature_like() -> nn.Module:
    """Convolutions, a flatten, a dense layer: the shape of the Atari networks."""
    return built(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(3 * 9, 7), nn.ReLU(), nn.Linear(7, 2)))  # fmt: skip


def train(net: nn.Module, optimizer: Any, x: Tensor = X, steps: int = 3, listen: Recycler | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        if listen is None:
            net(x).square().mean().backward()
        else:
            with listen.listening():
                net(x).square().mean().backward()
        optimizer.step()


def everything(net: nn.Module, *optimizers: Any) -> dict[str, Tensor]:
    names = {p: name for name, p in net.named_parameters()}
    state = {
        f"{names[p]} {key}": torch.as_tensor(value).clone()
        for optimizer in optimizers
        for p, held in optimizer.state.items()
        for key, value in held.items()
        if value is not None
    }
    return {**{n: t.clone() for n, t in net.state_dict().items()}, **state}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where anything differs: ``{name: mask}``."""
    assert before.keys() == after.keys()
    return {k: before[k] != after[k] for k in before if not torch.equal(before[k], after[k])}


def randomness() -> Iterator[Any]:
    yield torch.get_rng_state().tolist()
    yield random.getstate()
    yield np.random.get_state()[1].tolist()


# ---------------------------------------------------------------- which elements


def test_a_dead_filter_resets_exactly_its_own_columns() -> None:
    """Dopamine's ReDo repeats the mask in the other order, so it zeroes mostly rows of live filters."""
    net, x = nature_like(), rand(5, 1, 6, 6)
    with torch.no_grad():
        net[2].bias[1] = -1e3
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    train(net, adam, x)
    recycler = Recycler(recycle.trace(net, lambda: net(x)), ReDo(tau=0.0), optimizers=[adam], sample_every=1)
    recycler.graph = recycler.graph.select(include=["2"])
    with recycler.listening():
        net(x)
    before, output = everything(net, adam), net(x)
    assert recycler.step().groups["2"].recycled == 1
    where = changed(before, everything(net, adam))
    only_filter = torch.zeros(27, dtype=torch.bool)
    only_filter[9:18] = True
    for name, mask in where.items():
        owner = name.split()[0]
        if owner == "5.weight":
            assert not mask[:, ~only_filter].any(), name
        else:
            assert owner in ("2.weight", "2.bias") and not mask[[0, 2]].any(), name
    assert (net[5].weight[:, 9:18] == 0).all() and "5.weight" in where and "2.weight" in where
    assert torch.equal(net(x), output)


@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_a_dead_filter_is_found_behind_either_order_of_flattening(order: str) -> None:
    """One repetition order is right for NCHW, the other for NHWC: the network says which."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 3, 3), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv(x))
            return self.out((h if order == "channels first" else h.permute(0, 2, 3, 1)).flatten(1))

    net, x = built(Net), rand(5, 1, 4, 4)
    with torch.no_grad():
        net.conv.bias[1] = -1e3
    before, output = net.out.weight.clone(), net(x)
    recycle.apply(Reset([1]), recycle.trace(net, lambda: net(x))["conv"], generator=seeded())
    zeroed = ((net.out.weight == 0).all(0)).nonzero()[:, 0].tolist()
    assert zeroed == ([4, 5, 6, 7] if order == "channels first" else [1, 4, 7, 10])
    keep = [i for i in range(12) if i not in zeroed]
    assert torch.equal(net.out.weight[:, keep], before[:, keep])
    assert torch.equal(net(x), output)


def test_live_units_and_their_state_are_untouched() -> None:
    """Wrong masks on the outgoing side edited live units for weeks before anybody noticed."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[4] = -1e3
    adam = torch.optim.Adam(net.parameters())
    graph = recycle.trace(net, lambda: net(X))
    recycler = Recycler(graph, ReDo(tau=0.0), optimizers=[adam], sample_every=1)
    train(net, adam, listen=recycler)
    before = everything(net, adam)
    recycler.step()
    where = changed(before, everything(net, adam))
    assert {name.split()[0] for name in where} == {"0.weight", "0.bias", "2.weight"}
    for name, mask in where.items():
        rest = mask[:, [0, 1, 2, 3, 5]] if name.startswith("2.") else mask[[0, 1, 2, 3, 5]]
        assert not rest.any(), name


def test_a_reset_really_lowers_the_count_of_dead_units() -> None:
    """Out-of-place reinitialisation resets a copy: the count of dead units never goes down."""
    net = mlp()
    with torch.no_grad():
        net[0].bias[:3] = -1e3
    recycler = Recycler(recycle.trace(net, lambda: net(X)), ReDo(tau=0.0), sample_every=1)
    counts = []
    for _ in range(2):
        with recycler.listening():
            net(X)
        counts.append(recycler.step().groups["0"].dead)
    assert counts[0] == 0.5 and counts[1] < 0.5


def test_an_optimizer_is_addressed_by_parameter_and_not_by_position() -> None:
    """``optimizer.state`` by index i * 2 breaks when an optimizer holds its parameters in another order."""
    net = mlp()
    parameters = list(net.parameters())
    adam = torch.optim.Adam([{"params": parameters[::-1][:3]}, {"params": parameters[::-1][3:], "lr": 1e-4}])
    train(net, adam)
    recycle.apply(Reset([2]), recycle.trace(net, lambda: net(X))["0"], optimizers=[adam], generator=seeded())
    for key in ("exp_avg", "exp_avg_sq"):
        assert (adam.state[net[0].weight][key][2] == 0).all() and (adam.state[net[0].bias][key][2] == 0).all()
        assert (adam.state[net[2].weight][key][:, 2] == 0).all()
        assert (adam.state[net[0].weight][key][[0, 1, 3, 4, 5]] != 0).any()
        assert (adam.state[net[2].bias][key] != 0).any()


def test_the_bias_of_a_reset_unit_and_its_moments_are_reset_too() -> None:
    """Several ports leave the incoming bias, or its moments, as they were: the unit stays dead."""
    net = mlp()
    with torch.no_grad():
        net[0].bias[2] = -1e3
    adam = torch.optim.Adam(net.parameters())
    train(net, adam)
    adam.state[net[0].bias]["exp_avg"].fill_(7.0)
    recycle.apply(Reset([2]), recycle.trace(net, lambda: net(X))["0"], optimizers=[adam], generator=seeded())
    assert abs(net[0].bias[2].item()) <= 3**-0.5
    assert adam.state[net[0].bias]["exp_avg"].tolist() == [7, 7, 0, 7, 7, 7]


@pytest.mark.parametrize("name", [name for name in RECYCLING if name != "s2d"])  # which waits if no split would help
def test_layers_of_different_widths_in_one_network(name: str) -> None:
    """Stacking the layers' scores needs equal widths."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[1] = net[2].bias[3] = -1e3
    report = after_one_update(net, name).step()
    assert {n: g.recycled for n, g in report.groups.items()} == {"0": 1, "2": 1}


def test_layers_without_bias_and_convolutions_without_bias() -> None:
    """Code that expects a bias in every layer crashes or edits the wrong optimizer state."""
    flat = mlp(bias=False)
    conv = built(lambda: nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                                       nn.Conv2d(4, 2, 2, bias=False)))  # fmt: skip
    for net, x in ((flat, X), (conv, rand(4, 1, 5, 5))):
        adam = torch.optim.Adam(net.parameters())
        train(net, adam, x)
        group = recycle.trace(net, lambda net=net, x=x: net(x))["0"]
        before = net(x)
        recycle.apply(Split([0], into=[1], share=0.0), group, optimizers=[adam])
        recycle.apply(Reset([1]), group, optimizers=[adam], generator=seeded())
        assert all((axis.read(group.tensor(axis.name), torch.tensor([1])) == 0).all() for axis in group.outgoing)
        assert net(x).shape == before.shape and "bias" not in " ".join(
            a.name for a in group.incoming if a.name[0] == "0"
        )


def test_a_layer_norm_behind_the_activation_is_called_inexact() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 2)))
    group = recycle.trace(net, lambda: net(X))["0"]
    assert (group.exact, group.why) == (False, "LayerNorm mixes the units")


def test_containers_are_no_layers() -> None:
    """A list of named modules also holds the containers: nn.Sequential made the reference crash with hooks left on."""
    net = built(lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 2))))
    graph = recycle.trace(net, lambda: net(X))
    assert [g.name for g in graph] == ["0.0"] and list(graph.frozen) == ["1.0"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_order_of_registration_is_not_the_order_of_the_forward_pass() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.second, self.first = nn.Linear(4, 2), nn.Linear(5, 4), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.second(F.relu(self.first(x)))))

    net = built(Net)
    graph = recycle.trace(net, lambda: net(X))
    consumers = {g.name: [a.name for a in g.outgoing] for g in graph}
    assert consumers == {"first": ["second.weight"], "second": ["last.weight"]}
    assert list(graph.frozen) == ["last"]


def test_every_consumer_of_a_shared_trunk_is_silenced() -> None:
    """ "The next layer" is one of several: the value head keeps reading the unit that was reset."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.pi, self.vf = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.trunk(x))
            return self.pi(h), self.vf(h)

    net = built(Net)
    with torch.no_grad():
        net.trunk.bias[4] = -1e3
    before = net(X)
    recycle.apply(Reset([4]), recycle.trace(net, lambda: net(X))["trunk"], generator=seeded())
    assert (net.pi.weight[:, 4] == 0).all() and (net.vf.weight[:, 4] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(net(X), before, strict=True))


def test_a_skip_connection_is_a_consumer_too() -> None:
    """Zeroing only "the next convolution" leaves the skip path open."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            return self.out(h + F.relu(self.block(h)))

    net = built(Net)
    with torch.no_grad():
        net.stem.bias[4] = net.block.bias[4] = -1e3
    graph = recycle.trace(net, lambda: net(X))
    before = net(X)
    assert {a.name for a in graph["stem"].outgoing} == {"block.weight", "out.weight"}
    recycle.apply(Reset([4]), graph["stem"], generator=seeded())
    assert torch.equal(net(X), before)


# ---------------------------------------------------------------- the optimizer's step count


@pytest.mark.parametrize("name", METHODS)
def test_a_check_with_nothing_dead_touches_no_step_count(name: str) -> None:
    """Zeroing every tensor's ``step`` at every check trained "ReDo on" runs at a third of the learning rate."""
    net = mlp(alive=True)
    adam = torch.optim.Adam(net.parameters())
    recycler = Recycler(recycle.trace(net, lambda: net(X)), recycle.find(name)(), optimizers=[adam], sample_every=1)
    train(net, adam, listen=recycler)
    before = everything(net, adam)
    assert recycler.step().edits == ()
    assert not changed(before, everything(net, adam))
    assert all(s["step"] == 3 for s in adam.state.values())


@pytest.mark.parametrize("edit", [Split([0], into=[1]), Reset([1]), Fold([1], [0.0])])
def test_a_recycled_unit_touches_no_step_count_either(edit: Any) -> None:
    """The count is one for a whole tensor: resetting it slows every other unit of the layer."""
    net = mlp()
    adam = torch.optim.Adam(net.parameters())
    train(net, adam)
    recycle.apply(edit, recycle.trace(net, lambda: net(X))["0"], optimizers=[adam])
    assert all(s["step"] == 3 for s in adam.state.values())


def test_warm_units_keep_their_learning_rate_after_an_event() -> None:
    """The next update of every unit that was not recycled is the one that it would have been."""
    nets = [mlp() for _ in range(2)]
    updates = []
    for number, net in enumerate(nets):
        with torch.no_grad():
            net[0].bias[4] = -1e3
        adam = torch.optim.Adam(net.parameters())
        train(net, adam, steps=20)
        if number:
            recycle.apply(Reset([4]), recycle.trace(net, lambda net=net: net(X))["0"], optimizers=[adam],
                          generator=seeded())  # fmt: skip
        before = net[0].weight.detach().clone()
        train(net, adam, steps=1)
        updates.append((net[0].weight.detach() - before)[[0, 1, 2, 3, 5]])
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-12, atol=1e-18)


# ---------------------------------------------------------------- fresh weights


@pytest.mark.parametrize("kind", ["linear", "conv", "orthogonal"])
def test_fresh_weights_have_the_scale_of_a_new_layer(kind: str) -> None:
    """A gain for ReLU where PyTorch uses a = sqrt(5) made fresh weights 2.449 times too large."""

    def init(name: str, tensor: Tensor, generator: torch.Generator | None) -> None:
        if name == "0.weight":
            nn.init.orthogonal_(tensor, 2**0.5, generator=generator)
        elif name == "0.bias":
            tensor.zero_()

    def make() -> nn.Module:
        if kind == "conv":
            return nn.Sequential(nn.Conv2d(2, 400, 3), nn.ReLU(), nn.Conv2d(400, 1, 1))
        return nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 2))

    net, new = built(make, 1), built(make, 2)
    if kind == "orthogonal":
        nn.init.orthogonal_(new[0].weight, 2**0.5)
        nn.init.zeros_(new[0].bias)
    x = rand(4, 2, 5, 5) if kind == "conv" else rand(4, 64)
    with torch.no_grad():
        net[0].weight.mul_(50)  # worn
    group = recycle.trace(net, lambda: net(x))["0"]
    recycle.apply(Reset(range(400)), group, generator=seeded(), init=init if kind == "orthogonal" else None)
    for name in ("weight", "bias"):
        mine, other = getattr(net[0], name), getattr(new[0], name)
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.1)


def test_the_new_unit_is_different_at_every_event() -> None:
    """A seed set inside the recycler repeats the same fresh rows, and everybody else's noise with them."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[1] = -1e3
    recycler = Recycler(recycle.trace(net, lambda: net(X)), ReDo(tau=0.0), sample_every=1)
    rows = []
    for _ in range(3):
        with torch.no_grad():
            net[0].bias[1] = -1e3
        with recycler.listening():
            net(X)
        recycler.step()
        rows.append(net[0].weight[1].detach().clone())
    assert all((a != b).all() for a, b in ((rows[0], rows[1]), (rows[1], rows[2]), (rows[0], rows[2])))


# ---------------------------------------------------------------- watching


def test_watching_leaves_gradients_and_random_numbers_alone() -> None:
    """A gradient analyser ran its own backward passes into ``.grad`` and reset the global seeds."""
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    net = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)))
    twin = copy.deepcopy(net)
    recycler = Recycler(recycle.trace(net, lambda: net(X)), recycle.find("monitor")(), sample_every=1,
                        optimizers=[torch.optim.SGD(net.parameters(), lr=0.1)])  # fmt: skip
    for model in (net, twin):
        torch.manual_seed(5)
        if model is net:
            with recycler.listening():
                model(X).square().mean().backward()
            state = list(randomness())
            gradients = [p.grad.clone() for p in net.parameters()]
            recycler.report(), recycler.step()
            assert list(randomness()) == state
            assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
        else:
            model(X).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert next(randomness()) == state[0]


@pytest.mark.parametrize("name", RECYCLING)
def test_recycling_draws_from_its_own_random_numbers(name: str) -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[1] = -1e3
    state = list(randomness())
    recycler = after_one_update(net, name)
    assert recycler.step().groups["0"].recycled == 1
    assert list(randomness()) == state


def test_gradients_below_are_right_with_hooks_attached() -> None:
    """Reinitialising inside a backward hook made the gradients of the layer below wrong by 16 %."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[2].bias[3] = -1e3
    twin = copy.deepcopy(net)
    adams = [torch.optim.Adam(m.parameters()) for m in (net, twin)]
    recycler = Recycler(recycle.trace(net, lambda: net(X)), ReDo(tau=0.0), optimizers=adams[:1], sample_every=1)
    recycler.attach()
    for model, adam in zip((net, twin), adams, strict=True):
        model(X).square().mean().backward()
        adam.step()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad) and torch.equal(mine, other)
    assert recycler.step().recycled == 1  # and only now


def test_outgoing_weights_that_were_zeroed_are_not_moved_by_an_update_that_was_pending() -> None:
    """Edited before optimizer.step(), the zeroed weights moved at once: the edit did not preserve the function."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[4] = -1e3
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    recycler = Recycler(recycle.trace(net, lambda: net(X)), ReDo(tau=0.0), optimizers=[adam], sample_every=1)
    train(net, adam, steps=20, listen=recycler)
    before = net(X)
    recycler.step()
    assert (net[2].weight[:, 4] == 0).all()
    assert torch.equal(net(X), before)


def test_varying_batch_sizes_and_evaluation_passes_do_not_change_statistics() -> None:
    """Statistics of the last batch crashed on another batch size, and a rollout of one sample overwrote them."""
    net = mlp()
    graph = recycle.trace(net, lambda: net(X))
    recyclers = [Recycler(graph, recycle.find("monitor")(), sample_every=1) for _ in range(2)]
    with recyclers[0].listening():
        net(X)
    with recyclers[1].listening():
        for part in X.split([1, 20, 1, 10]):
            net(part)
            net.eval()
            net(part[:1] * 100)
            net.train()
            with torch.no_grad():
                net(part[:1] * 100)
    for name in ("0", "2"):
        one, other = (r.tracker.stats(graph[name]) for r in recyclers)
        assert one.samples == other.samples == 32
        for key in ("firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum"):
            torch.testing.assert_close(getattr(one, key), getattr(other, key), rtol=1e-12, atol=1e-14)


def test_a_unit_that_fires_once_in_the_window_is_not_dead() -> None:
    """Judged by the last minibatch alone, a rarely firing unit is killed."""
    net = built(lambda: nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.copy_(torch.tensor([0.0, -10.0]))
    recycler = Recycler(recycle.trace(net, lambda: net(rand(4, 1))), ReDo(tau=0.0), sample_every=1)
    with recycler.listening():
        net(torch.tensor([[11.0], [1.0]]).double())
        for _ in range(20):
            net(torch.tensor([[1.0], [2.0]]).double())
    report = recycler.step()
    assert (report.recycled, report.groups["0"].dead) == (0, 0)


def test_a_dead_unit_is_judged_after_its_nonlinearity_and_its_gradient_before_it() -> None:
    """The output of a dead ReLU has a gradient, so a gradient test there finds nothing."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[4] = -1e3
    recycler = Recycler(recycle.trace(net, lambda: net(X)), recycle.find("monitor")(), sample_every=1)
    with recycler.listening():
        net(X).square().mean().backward()
    group = recycler.report().groups["0"]
    assert (group.dead, group.gradient_silent) == (pytest.approx(1 / 6), pytest.approx(1 / 6))


def test_a_tanh_layer_is_not_judged_as_if_a_relu_followed() -> None:
    """F.relu(output) in the hook of every layer calls a negative tanh unit dead."""
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    with torch.no_grad():
        net[0].bias.fill_(-3.0)
        net[0].weight.mul_(0.5)
    recycler = Recycler(recycle.trace(net, lambda: net(X)), ReDo(), sample_every=1)
    with recycler.listening():
        net(X)
    report = recycler.step()
    assert (report.recycled, report.groups["0"].dead, report.groups["0"].dormant) == (0, 0, 0)


def test_nothing_is_hung_on_the_module() -> None:
    """Layers kept inside a recycler module doubled the state dict, and statistics appeared among the parameters."""
    net = mlp()
    keys, parameters = list(net.state_dict()), [id(p) for p in net.parameters()]
    attributes = [set(vars(m)) for m in net.modules()]
    adam = torch.optim.Adam(net.parameters())
    recycler = Recycler(recycle.trace(net, lambda: net(X)), recycle.find("split")(), optimizers=[adam], sample_every=1)
    train(net, adam, listen=recycler)
    recycler.step()
    assert list(net.state_dict()) == keys
    assert [id(p) for p in net.parameters()] == parameters
    assert [set(vars(m)) for m in net.modules()] == attributes
    copy.deepcopy(net), torch.save(net.state_dict(), "/dev/null")


# ---------------------------------------------------------------- heads, targets, folds


@pytest.mark.parametrize("name", RECYCLING)
def test_output_heads_are_never_recycled(name: str) -> None:
    """Q-heads of actions that no batch had sampled were reinitialised."""
    net = mlp()
    with torch.no_grad():
        net[4].weight[1], net[4].bias[1] = 0.0, 0.0  # an output that is always zero
        net[0].bias[2] = -1e3
    graph = recycle.trace(net, lambda: net(X))
    assert graph.frozen == {"4": "reaches the module's output"}
    recycler = Recycler(graph, recycle.find(name)(), sample_every=1)
    with recycler.listening():
        net(X)
    assert recycler.step().groups.keys() == {"0", "2"}
    assert net[4].weight[1].tolist() == [0] * 5 and net[4].bias[1] == 0


def test_a_reset_silences_the_outgoing_weights() -> None:
    """Fresh incoming weights with the old outgoing ones changed the output by 200 %."""
    net = mlp()
    recycle.apply(Reset([0, 3]), recycle.trace(net, lambda: net(X))["0"], generator=seeded())
    assert (net[2].weight[:, [0, 3]] == 0).all() and (net[2].weight[:, [1, 2, 4, 5]] != 0).all()


def test_the_mean_of_a_removed_unit_reaches_the_next_bias() -> None:
    """The reference cleared the running mean before it read it: the documented correction was never made."""
    net = mlp(alive=True)
    hidden = net[1](net[0](X)).detach()
    column, bias = net[2].weight[:, 2].detach().clone(), net[2].bias.detach().clone()
    mean = float(hidden[:, 2].mean())
    before = net[2](hidden).detach()
    recycle.apply(Fold([2], [mean]), recycle.trace(net, lambda: net(X))["0"])
    torch.testing.assert_close(net[2].bias.detach(), bias + column * mean, rtol=1e-14, atol=0)
    shift = (net[2](hidden).detach() - before).mean(0)
    torch.testing.assert_close(shift, torch.zeros(5).double(), rtol=0, atol=1e-14)  # E[dy] = 0
    assert mean > 0.5 and float(column.abs().max()) > 0.1  # there was something to correct


@pytest.mark.parametrize("name", ["split", "mirror"])
def test_a_dormant_unit_takes_no_mean_with_it(name: str) -> None:
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = net[0].weight[2] * 1e-3, 1e-3
    recycler = Recycler(recycle.trace(net, lambda: net(X)), recycle.find(name)(tau=0.01), sample_every=1)
    recycler.graph = recycler.graph.select(include=["0"])
    recycler.generator = seeded(1)
    with recycler.listening():
        net(X)
    before = net[2](net[1](net[0](X))).detach()
    bias = net[2].bias.detach().clone()
    report = recycler.step()
    ((_, fold), (_, edit)) = report.edits
    assert isinstance(fold, Fold) and fold.units == (2,) and list(edit.slots) == [2]
    assert (net[2].bias != bias).all()
    if name == "mirror":  # exact but for the unit's own tiny variation
        after = net[2](net[1](net[0](X))).detach()
        assert float((after - before).mean(0).abs().max()) < 1e-12


def test_every_recycled_target_is_edited_from_its_own_weights() -> None:
    """A donor's row copied from the online network into the target is another unit there."""
    net, target = mlp(), built(lambda: nn.Sequential(*mlp()), 1)
    with torch.no_grad():
        target[0].weight.mul_(-1.5)
        for module in (net, target):
            module[0].bias[4] = -1e3
    before = target(X)
    recycle.apply(Split([1], into=[4]), recycle.trace(net, lambda: net(X))["0"], targets=[(target, 0.005)])
    assert torch.equal(target[0].weight[4], target[0].weight[1])
    assert not torch.equal(target[0].weight[4], net[0].weight[4])
    torch.testing.assert_close(target(X), before, rtol=1e-13, atol=1e-14)


def test_ages_and_books_survive_a_restart() -> None:
    """Checkpoints without utilities and ages made every unit young again on resume."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[1] = -1e3
    graph = recycle.trace(net, lambda: net(X))
    recycler = Recycler(graph, ReDo(tau=0.0), sample_every=1, cooldown=3)
    for _ in range(2):
        with recycler.listening():
            net(X)
        recycler.step()
    again = Recycler(graph, ReDo(tau=0.0), sample_every=1, cooldown=3)
    again.load_state_dict(recycler.state_dict())
    assert torch.equal(again.histograms()["0/age"], recycler.histograms()["0/age"])
    assert again.histograms()["0/age"].tolist() == [2, 1, 2, 2, 2, 2]
    with torch.no_grad():
        net[0].bias[1] = -1e3
    with again.listening():
        net(X)
    report = again.step()
    assert report.event == 3 and report.groups["0"].re_died == 1
    assert report.groups["0"].note == "1 cooling down"


@pytest.mark.parametrize("name", METHODS)
def test_a_check_prints_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[1] = -1e3
    recycler = Recycler(recycle.trace(net, lambda: net(X)), recycle.find(name)(), sample_every=1)
    with recycler.listening():
        net(X)
    recycler.step()
    assert capsys.readouterr() == ("", "")


def test_the_newborn_half_of_a_split_moves_as_far_as_its_parent_if_asked_to() -> None:
    """With stale or zero moments a child moved 50 times farther than its donor in its first dozen updates."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[4], net[2].weight[:, 4] = -1e3, 0.0
    adam = torch.optim.Adam(net.parameters(), eps=1e-12)
    train(net, adam, steps=60)
    edit = Split([1], into=[4], moments="transform")
    recycle.apply(edit, recycle.trace(net, lambda: net(X))["0"], optimizers=[adam])
    start = net[0].weight.detach().clone()
    train(net, adam, steps=12)
    moved = (net[0].weight.detach() - start).norm(dim=1)
    assert moved[4].item() == pytest.approx(moved[1].item(), rel=1e-6)


def test_copies_of_copies_do_not_grow() -> None:
    """Relative noise without renormalisation compounds from split to split: norms of 10^7 were seen."""
    net = mlp(alive=True)
    group = recycle.trace(net, lambda: net(X))["0"]
    longest = net[0].weight.norm(dim=1).max().item()
    generator = seeded()
    for event in range(60):
        recycle.apply(Split([event % 6], into=[(event + 1) % 6], noise=0.5), group, generator=generator)
    assert net[0].weight.norm(dim=1).max().item() <= longest * (1 + 1e-9)


def test_a_split_without_noise_and_with_transformed_moments_shows_up_as_a_duplicate() -> None:
    """Such copies never part: a dead fraction of zero that is no capacity."""
    net = mlp(alive=True)
    with torch.no_grad():
        net[0].bias[4] = -1e3
    adam = torch.optim.Adam(net.parameters())
    method = recycle.find("split")(noise=0.0, moments="transform")
    recycler = Recycler(recycle.trace(net, lambda: net(X)), method, optimizers=[adam], sample_every=1)
    train(net, adam, listen=recycler)
    ((_, edit),) = recycler.step().edits
    train(net, adam, steps=50, listen=recycler)
    group = recycler.step().groups["0"]
    assert edit.into == (4,)
    assert (group.dead, group.duplicates >= 2 / 6) == (0, True)
