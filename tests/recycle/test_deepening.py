"""Inserted hidden layers: the output stays, they are trained like any other, and what cannot be exact is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Deepen, Grow, NotRecyclable, Recycler, deepen
from recycle.deepening import gaps_of, insert_again
from recycle.inserted import Blend, Branch
from recycle.methods.l2_init import L2Init
from recycle.methods.net2deeper import Net2Deeper
from recycle.methods.redo import ReDo
from recycle.outputs import difference, outputs
from tests.nets import ZOO, Wire

KINDS: tuple[Any, ...] = ("identity", "pair", "blend", "residual")
X = torch.randn(16, 5, generator=torch.Generator().manual_seed(3), dtype=torch.double)
IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.double)


def seeded(*layers: Any) -> nn.Sequential:
    """The same weights each time, whatever was drawn before."""
    net = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            elif len(parameter) > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


def mlp(activation: Any = nn.ReLU) -> nn.Sequential:
    return seeded(nn.Linear(5, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 3))


def traced(net: nn.Module, x: Tensor = X) -> recycle.Graph:
    return recycle.trace(net, lambda: net(x))


def state(net: nn.Module, *optimizers: torch.optim.Optimizer) -> Any:
    """Everything that an undone insertion must leave as it was, the very objects included."""
    held = [[(id(p), p.detach().clone(), p.requires_grad) for p in net.parameters()]]
    held += [[(name, b.clone()) for name, b in net.named_buffers()]]
    entries = [(name, id(m), m.training) for name, m in net.named_modules()]
    inside = [[id(p) for g in o.param_groups for p in g["params"]] for o in optimizers]
    return held, entries, inside, [copy.deepcopy(o.state_dict()) for o in optimizers]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def deeper(
    net: nn.Module, layers: Sequence[str], x: Tensor = X, *, optimizers: Any = (), targets: Any = (), **options: Any
) -> None:
    """Insert, and compare what the network says."""
    before = net(x).detach()
    old = {name: p.detach().clone() for name, p in net.named_parameters()}
    parameters = list(net.parameters())
    deepen(Deepen(layers, **options), traced(net, x), optimizers=optimizers, targets=targets)
    after = net(x).detach()
    assert float((after - before).abs().max()) <= 1e-12 * float(before.abs().max())
    assert all(torch.equal(p, value) for p, value in zip(parameters, old.values(), strict=True))
    assert len(list(net.parameters())) > len(parameters)


# -- exact -------------------------------------------------------------------------------------------------


EXACT = [
    (nn.ReLU, "identity"), (nn.ReLU6, "identity"), (nn.Hardtanh, "identity"), (nn.PReLU, "identity"),
    (lambda: nn.LeakyReLU(1.0), "identity"), (lambda: nn.ReLU(inplace=True), "identity"),
    *((activation, kind) for activation in (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.PReLU, nn.LeakyReLU)
      for kind in ("pair", "blend", "residual")),
    (lambda: nn.ReLU(inplace=True), "blend"), (lambda: nn.ReLU(inplace=True), "residual"),
]  # fmt: skip


@pytest.mark.parametrize(("activation", "kind"), EXACT)
def test_the_output_stays_behind_every_layer_of_a_perceptron(activation: Any, kind: Any) -> None:
    for layers in (["0"], ["2"], ["0", "2"]):
        deeper(mlp(activation), layers, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_output_stays_behind_convolutions(kind: Any, kernel: int, dims: int) -> None:
    conv: Any = (nn.Conv1d, nn.Conv2d)[dims - 1]
    pool: Any = (nn.AvgPool1d, nn.AvgPool2d)[dims - 1]
    x = IMAGES if dims == 2 else IMAGES.flatten(2)
    size = 4 * (x.shape[-1] - 2) ** dims // 2**dims
    net = seeded(conv(2, 3, 3), nn.ReLU(), conv(3, 4, 1), nn.ReLU(), pool(2), nn.Flatten(), nn.Linear(size, 3))
    deeper(net, ["0", "2"], x, kind=kind, kernel=kernel)
    new: Any = net[2].into if kind == "residual" else net[2]
    assert new.weight.shape[2:] == (kernel,) * dims and new.padding == (kernel // 2,) * dims
    assert net(x).shape == (4, 3)


MANY = ["residual_bottleneck", "residual_of_the_input", "residual_convolutions", "functional_relu", "nature_cnn",
        "conv_batchnorm_maxpool", "actor_critic", "dueling", "deep_supervision", "layernorm_over_units", "group_norm",
        "depthwise", "transposed_convolution", "mlp_mixer", "embedding", "dropout", "no_bias"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MANY)
def test_the_output_stays_in_every_gap_of_many_networks(name: str, kind: Any) -> None:
    """Residual streams, functional activations, normalisations, convolutions: wherever there is a place."""
    case = ZOO[name]
    net = case.build().eval()
    x = case.inputs(torch.Generator().manual_seed(0))
    graph = recycle.trace(net, *case.calls(net, x))
    found = gaps_of(graph)
    assert found or name == "actor_critic"
    before = outputs(graph.calls)
    adam = torch.optim.Adam(net.parameters())
    made = deepen(Deepen(found, kind=kind), graph, optimizers=[adam])
    assert len(made) == len(found) and difference(before, outputs(graph.calls)) <= 1e-12
    assert [id(p) for p in adam.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    again = graph.again()
    assert len(gaps_of(again)) >= len(found)


def test_what_is_inserted() -> None:
    net = mlp()
    deeper(net, ["0"])
    assert [type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(net[2].weight, torch.eye(8, dtype=torch.double)) and not net[2].bias.any()
    net = mlp()
    deeper(net, ["0"], kind="pair")
    assert torch.equal(net[2].weight, torch.cat([torch.eye(8), -torch.eye(8)]).double()) and type(net[3]) is nn.ReLU
    net = mlp(nn.GELU)
    deeper(net, ["2"], kind="blend")
    assert isinstance(net[5], Blend) and type(net[5].activation) is nn.GELU and not net[5].p.any()
    net = mlp(nn.Tanh)
    deeper(net, ["2"], kind="residual", activation="SiLU")
    branch = net[4]
    assert isinstance(branch, Branch) and type(branch.activation) is nn.SiLU
    assert not branch.out.weight.any() and float(branch.into.weight.detach().abs().min()) > 0


def test_named_entries_keep_their_names_and_a_wrapped_reader_its_hooks() -> None:
    from collections import OrderedDict

    parts = OrderedDict(fc=nn.Linear(5, 4), act=nn.ReLU(), out=nn.Linear(4, 3))
    net = nn.Sequential(parts).double()
    deeper(net, ["fc"])
    assert list(net._modules) == ["fc", "act", "inserted0", "inserted1", "out"]
    wired = ZOO["functional_relu"].build()
    seen: list[Tensor] = []
    wired.out.register_forward_hook(lambda layer, args, output: seen.append(output))
    deeper(wired, ["fc2"])
    assert isinstance(wired.out, nn.Sequential) and len(wired.out) == 3
    seen.clear()
    wired(X)
    assert len(seen) == 1


def test_a_normalised_layer_is_exact_in_evaluation_and_a_branch_always() -> None:
    net = mlp().eval()
    for kind in ("identity", "pair", "blend"):
        deeper(net, ["0"], kind=kind, batch_norm=True)
    images = seeded(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval()
    deeper(images, ["0"], IMAGES, batch_norm=True)
    deeper(mlp(), ["0"], kind="residual", batch_norm=True)


def test_single_precision() -> None:
    net = mlp().float()
    graph = traced(net, X.float())
    before = net(X.float())
    deepen(Deepen(["0"]), graph)
    assert net[2].weight.dtype == torch.float32 and torch.equal(net(X.float()), before)


# -- refused -----------------------------------------------------------------------------------------------


def _signed() -> nn.Module:
    return Wire(lambda m, x: m.out(torch.tanh(m.fc(x))), fc=nn.Linear(5, 4), out=nn.Linear(4, 3)).double()


def _looks_into_it() -> nn.Module:
    return Wire(lambda m, x: F.linear(F.relu(m.fc(x)), m.out.weight), fc=nn.Linear(5, 4), out=nn.Linear(4, 3)).double()


def _by_number() -> nn.Module:
    return Wire(lambda m, x: m.s[2](m.s[1](m.s[0](x))), s=nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))


def _twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.a(h) + m.b(h)

    return Wire(forward, fc=nn.Linear(5, 4), a=nn.Linear(4, 3), b=nn.Linear(4, 3)).double()


def _in_parts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.cat([F.relu(m.a(x)), m.b(x)], 1))

    return Wire(forward, a=nn.Linear(5, 4), b=nn.Linear(5, 3), out=nn.Linear(7, 3)).double()


REFUSED: list[tuple[Any, str, dict[str, Any], str]] = [
    (lambda: mlp(nn.Tanh), "0", {}, "Tanh is not the identity on what Tanh gives, such as -1.*kind='pair' or 'blend'"),
    (lambda: mlp(nn.GELU), "0", {}, "GELU is not the identity on what GELU gives"),
    (lambda: mlp(nn.SiLU), "2", {}, "SiLU is not the identity on what SiLU gives"),
    (lambda: mlp(nn.LeakyReLU), "0", {}, "LeakyReLU is not the identity on what LeakyReLU gives"),
    (lambda: mlp(nn.Softmax), "0", {}, "Softmax is not the identity"),
    (lambda: mlp(nn.Tanh), "0", {"activation": "ReLU"}, "ReLU is not the identity on what Tanh gives"),
    (lambda: mlp(nn.ReLU), "0", {"activation": "ReLU6"}, "ReLU6 is not the identity on what ReLU gives"),
    (lambda: mlp(nn.PReLU), "0", {"activation": "ReLU"}, "the output would change by"),
    (lambda: mlp(), "0", {"batch_norm": True}, "BatchNorm in training mode computes statistics of each batch"),
    (lambda: mlp(nn.Tanh), "0", {"kind": "blend", "batch_norm": True}, "BatchNorm in training mode"),
    (lambda: mlp(), "0", {"kernel": 2}, "a kernel of even size has no middle"),
    (lambda: mlp(), "0", {"activation": "Relu"}, "no activation 'Relu'.*there are .*ReLU"),
    (lambda: mlp(), "0", {"activation": "Threshold"}, "Threshold needs arguments"),
    (lambda: mlp(), "7", {}, "no layer '7' to insert one behind"),
    (lambda: mlp(), "4", {}, "no activation stands behind '4' in its nn.Sequential, and reaches the module's output"),
    (_signed, "fc", {}, "the output would change by"),
    (ZOO["no_bias"].build, "0", {"activation": "ReLU6"}, "ReLU6 is not the identity on what ReLU gives"),
    (ZOO["functional_relu"].build, "fc1", {"activation": "Hardtanh"}, "Hardtanh is not the identity on what ReLU"),
    (_looks_into_it, "fc", {}, "which no hook|no Linear layer or convolution that is called as such"),
    (lambda: _by_number().double(), "s.0", {}, "the output would change by|the call fails"),
    (_twice, "fc", {}, "a and b read its units"),
    (_in_parts, "a", {}, "'out.weight' reads other units too"),
    (ZOO["transformer_layer"].build, "1.linear1", {"kind": "blend"}, "TransformerEncoderLayer, which may look into it"),
    (ZOO["lstm"].build, "lstm", {}, "no activation stands behind 'lstm'"),
]


@pytest.mark.parametrize(("build", "layer", "options", "reason"), REFUSED)
def test_what_cannot_be_exact_is_refused_and_nothing_changes(
    build: Any, layer: str, options: dict[str, Any], reason: str
) -> None:
    torch.manual_seed(0)
    net = build()
    case = next((case for case in ZOO.values() if build == case.build), None)
    x = X if case is None else case.inputs(torch.Generator().manual_seed(0))[0]
    adam = torch.optim.Adam(net.parameters())
    net(x).sum().backward()
    adam.step()
    graph, target = traced(net, x), copy.deepcopy(net)
    before, there, rng = state(net, adam), state(target), torch.get_rng_state()
    with pytest.raises(NotRecyclable, match=reason):
        deepen(Deepen([layer], **options), graph, optimizers=[adam], targets=[target])
    assert same(state(net, adam), before) and same(state(target), there) and torch.equal(torch.get_rng_state(), rng)


def test_all_layers_or_none_and_targets_too() -> None:
    net = seeded(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    target, other = copy.deepcopy(net), seeded(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    adam = torch.optim.Adam(net.parameters())
    before, there = state(net, adam), state(target)
    with pytest.raises(NotRecyclable, match="Tanh is not the identity"):
        deepen(Deepen(["0", "2"]), traced(net), optimizers=[adam], targets=[target])
    with pytest.raises(NotRecyclable, match="a target network is built otherwise"):
        deepen(Deepen(["0"]), traced(net), optimizers=[adam], targets=[target, other])
    assert same(state(net, adam), before) and same(state(target), there)
    with pytest.raises(NotRecyclable, match="names a layer twice"):
        deepen(Deepen(["0", "0"]), traced(net))
    with pytest.raises(NotRecyclable, match="LBFGS keeps one flat history"):
        deepen(Deepen(["0"]), traced(net), optimizers=[torch.optim.LBFGS(net.parameters())])


# -- optimizers, targets, training -------------------------------------------------------------------------


OPTIMIZERS: list[Any] = [
    lambda p: torch.optim.Adam(p, lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda p: torch.optim.RMSprop(p, lr=0.01),
    lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1), lambda p: torch.optim.NAdam(p, lr=0.01),
]  # fmt: skip


def learn(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, recycler: Any = None) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((net(X) - X[:, :3].sin()) ** 2).mean()
        if recycler is None:
            loss.backward()
        else:
            with recycler.listening():
                loss = ((net(X) - X[:, :3].sin()) ** 2).mean()
                loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", OPTIMIZERS)
def test_optimizers_hold_what_a_fresh_one_would_and_training_moves_the_new_layer(build: Any, kind: Any) -> None:
    net = mlp()
    optimizer = build(net.parameters())
    learn(net, optimizer)
    kept = {p: copy.deepcopy(optimizer.state[p]) for p in net.parameters()}
    deeper(net, ["0"], kind=kind, optimizers=[optimizer])
    fresh = build(net.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for group in fresh.param_groups for p in group["params"]]
    for parameter in held:
        own = optimizer.state.get(parameter, {})
        assert same(own, kept[parameter]) if parameter in kept else same(own, fresh.state.get(parameter, {}))
    born = [(p, p.detach().clone()) for p in net.parameters() if p not in kept]
    before = learn(net, optimizer, 1)
    assert learn(net, optimizer, 60) < 0.9 * before
    assert all(float((p - then).detach().abs().max()) > 1e-3 for p, then in born)
    state_dict = copy.deepcopy(optimizer.state_dict())
    fresh.load_state_dict(state_dict)  # parameters are told apart by their places
    assert all(same(fresh.state[p], optimizer.state[p]) for p in held)


def test_new_parameters_join_the_group_of_their_neighbours() -> None:
    net = mlp()
    groups = [{"params": net[:2].parameters(), "lr": 0.1}, {"params": net[2:].parameters(), "lr": 0.2}]
    sgd, other = torch.optim.SGD(groups), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    deeper(net, ["0"], optimizers=[sgd, other])
    first, second = ([id(p) for p in group["params"]] for group in sgd.param_groups)
    assert first == [id(p) for p in net[:4].parameters()] and second == [id(p) for p in net[4:].parameters()]
    assert len(other.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_network_says_what_it_said_and_is_copied_as_ever(kind: Any) -> None:
    net, target = mlp(), mlp()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(1.5).requires_grad_(False)
    said = target(X)
    deeper(net, ["0", "2"], kind=kind, targets=[target])
    assert torch.equal(target(X), said) and not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in target.named_parameters()}
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), target.parameters(), strict=True):
            assert mine is not theirs
            theirs.copy_(mine)
    assert torch.equal(net(X), target(X))


def test_a_branch_is_drawn_from_the_generator_as_the_network_begins() -> None:
    weights = []
    for seed in (1, 1, 2):
        net, target = mlp(), mlp()
        rng = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        deepen(Deepen(["0"], kind="residual"), traced(net), generator=generator, targets=[target])
        assert torch.equal(torch.get_rng_state(), rng) and torch.equal(net[2].into.weight, target[2].into.weight)
        weights.append(net[2].into.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0 < float(weights[0].abs().max()) <= 8**-0.5
    net = mlp()
    deepen(Deepen(["0"], kind="residual"), traced(net), init=lambda name, tensor, generator: tensor.fill_(len(name)))
    assert torch.equal(net[2].into.bias, torch.full((8,), float(len("2.into.bias")), dtype=torch.double))


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_built_again_for_a_saved_state(kind: Any) -> None:
    for build, layers in ((mlp, ["0", "2"]), (ZOO["functional_relu"].build, ["fc1", "fc2"])):
        net = build()
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        made = deepen(Deepen(layers, kind=kind), traced(net), optimizers=[adam])
        learn(net, adam)
        again = build()
        other = torch.optim.Adam(again.parameters(), lr=0.01)
        for insertion in made:
            insert_again(again, insertion, [other])
        assert str(again) == str(net)
        again.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(adam.state_dict()))
        assert learn(net, adam) == learn(again, other) and torch.equal(net(X), again(X))


# -- the method --------------------------------------------------------------------------------------------


def recycling(net: nn.Module, optimizer: torch.optim.Optimizer, method: Any, **options: Any) -> Recycler:
    options = {"sample_every": 1, "generator": torch.Generator().manual_seed(0)} | options
    return Recycler(traced(net), method, optimizers=[optimizer], **options)


def test_net2deeper_inserts_before_the_output_until_there_are_enough() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    recycler = recycling(net, adam, Net2Deeper(most=2))
    for event, layer in ((1, "2"), (2, "4"), (3, "")):
        learn(net, adam, 3, recycler)
        said = net(X).detach()
        report = recycler.step()
        assert report.interventions == ((Deepen([layer]),) if layer else ()) and not report.note
        assert float((net(X) - said).detach().abs().max()) <= 1e-12
        assert [g.name for g in recycler.graph] == [str(2 * i) for i in range(min(event, 2) + 2)]
    learn(net, adam, 3, recycler)
    assert recycler.report().groups["6"].samples == 3 * len(X)
    assert recycler.report().groups["6"].dead < 1 and recycler.tracker.passes == 12


def test_named_layers_are_inserted_once_and_a_refusal_is_a_note() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    recycler = recycling(net, adam, Net2Deeper(layers=("0",), kind="blend", most=5))
    for inserted in (1, 0):
        learn(net, adam, 2, recycler)
        assert len(recycler.step().interventions) == inserted
    tanh = mlp(nn.Tanh)
    sgd = torch.optim.SGD(tanh.parameters(), lr=0.01)
    recycler = recycling(tanh, sgd, Net2Deeper())
    before = str(tanh)
    learn(tanh, sgd, 2, recycler)
    report = recycler.step()
    assert "Tanh is not the identity" in report.note and not report.interventions and str(tanh) == before
    learn(tanh, sgd, 2, recycler)
    assert recycler.step().groups["0"].samples == 2 * len(X)  # it watches on


def test_ages_and_what_is_watched_outlive_an_insertion() -> None:
    """The layers behind the new one have other paths; they are the same units."""
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    graph = traced(net).select(exclude=["0"])
    recycler = Recycler(graph, [ReDo(), Net2Deeper(layers=("0",))], optimizers=[adam], sample_every=1)
    with torch.no_grad():
        net[2].weight[1] = 0.0
        net[2].bias[1] = -1.0
    learn(net, adam, 4, recycler)
    report = recycler.step()
    assert report.groups["2"].recycled >= 1 and isinstance(report.interventions[0], Deepen)
    assert [g.name for g in recycler.graph] == ["2", "4"]  # the new layer, and what was "2"; "0" stays excluded
    assert recycler.tracker.born["4"].tolist()[1] == 4 and recycler.tracker.born["4"].tolist().count(0) >= 1
    assert recycler.tracker.born["2"].tolist() == [4] * 8
    learn(net, adam, 4, recycler)
    assert recycler.step().groups["4"].samples == 4 * len(X)


class Halves(nn.Module):
    """One layer makes two groups of as many units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = seeded(nn.Linear(5, 8), nn.Linear(4, 3), nn.Linear(4, 3))
        self.beside = mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.a(h[:, :4]) + self.b(h[:, 4:]) + self.beside(x)


@pytest.mark.parametrize("excluded", [[], ["first[0:4]"], ["first[4:8]"]])
def test_groups_of_one_layer_keep_each_its_own_ages_and_stay_excluded_behind_an_insertion(excluded: list[str]) -> None:
    net = Halves()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    graph = traced(net).select(exclude=excluded)
    recycler = Recycler(graph, Net2Deeper(layers=("beside.0",)), optimizers=[adam], sample_every=1)
    learn(net, adam, 3, recycler)
    born = {group.name: number for number, group in enumerate(graph, 1)}
    for name, at in born.items():
        recycler.tracker.born[name].fill_(at)
    assert recycler.step().interventions
    now = {group.name: recycler.tracker.born[group.name].unique().tolist() for group in recycler.graph}
    halves = {name: [at] for name, at in born.items() if name.startswith("first")}
    assert {name: at for name, at in now.items() if name.startswith("first")} == halves
    assert len(halves) == 2 - len(excluded) and len(now) == len(born) + 1


def test_a_recycler_goes_on_from_its_state() -> None:
    net = mlp()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    recycler = recycling(net, adam, Net2Deeper())
    learn(net, adam, 2, recycler)
    recycler.step()
    again = mlp()
    other = torch.optim.Adam(again.parameters(), lr=0.01)
    for insertion in recycler.insertions:
        insert_again(again, insertion, [other])
    again.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(adam.state_dict()))
    resumed = recycling(again, other, Net2Deeper())
    resumed.load_state_dict(recycler.state_dict())
    for module, optimizer, who in ((net, adam, recycler), (again, other, resumed)):
        learn(module, optimizer, 2, who)
    assert torch.equal(net(X), again(X)) and recycler.step() == resumed.step() and resumed.deepened == 1


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="net2deeper needs most >= 1 events, got most=0"):
        Net2Deeper(most=0)
    with pytest.raises(ValueError, match="net2deeper has no kind 'deep': there are identity, pair, blend, residual"):
        Net2Deeper(kind="deep")  # type: ignore[arg-type]
    sgd = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="inserted ones begin later"):
        recycling(mlp(), sgd, [Net2Deeper(), L2Init()])


# -- what the forum thread says of wider layers ------------------------------------------------------------


@pytest.mark.parametrize(("activation", "order"), [(nn.ReLU, 2), (nn.Tanh, 2), (nn.Sigmoid, 1)])
def test_weights_near_zero_are_not_exact_and_the_first_layer_can_be_widened(activation: Any, order: int) -> None:
    change = {}
    for eps in (1e-2, 1e-4):
        net = mlp(activation)
        before, parameters = net(X).detach(), net[0].weight
        recycle.apply(Grow(4), traced(net)["0"])
        assert net[0].weight.shape == (12, 5) and net[0].weight is not parameters
        assert float((net(X) - before).detach().abs().max()) <= 1e-12
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for part in (net[0].weight[8:], net[0].bias[8:], net[2].weight[:, 8:]):
                part.copy_(eps * torch.randn(part.shape, generator=generator))
            change[eps] = float((net(X) - before).abs().max())
    ratio = change[1e-2] / change[1e-4]
    assert change[1e-4] > 1e-10 and 0.5 < ratio / 100**order < 2
