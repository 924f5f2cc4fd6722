"""What is found in a network, under which name, and why the rest is left alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recycle
from recycle import NotRecyclable, Split


class Wire(nn.Module):
    """A network whose forward pass is a plain function of its named parts."""

    def __init__(self, wiring: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.wiring = wiring

    def forward(self, *inputs: Any) -> Any:
        return self.wiring(self, *inputs)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(rand(*shape, seed=sum(shape)))


X = rand(6, 3)
IMAGE = rand(3, 1, 5, 5)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def mlp(activation: nn.Module | None = None) -> nn.Module:
    act = nn.ReLU() if activation is None else activation
    return built(lambda: nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2)))


def traced(net: nn.Module, *inputs: Any) -> Any:
    return recycle.trace(net, lambda: net(*(inputs or (X,))))


def widths(graph: Any) -> dict[str, int]:
    return {group.name: group.width for group in graph}


def columns(group: Any) -> dict[str, list[list[int]]]:
    return {axis.name: axis.index.tolist() for axis in group.outgoing}


# ---------------------------------------------------------------- what is found


def test_the_printed_table() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(m.trunk(x))
        return m.actor(F.relu(m.norm(m.pi(h)))), m.critic(torch.sort(F.relu(m.vf(h)), 1).values)

    net = built(lambda: Wire(forward, trunk=nn.Linear(3, 8), pi=nn.Linear(8, 6), norm=nn.LayerNorm(6),
                             vf=nn.Linear(8, 4), actor=nn.Linear(6, 2), critic=nn.Linear(4, 1)))  # fmt: skip
    assert str(traced(net)).splitlines() == [
        "group  width  producers                                   consumers             edits",
        "trunk  8      trunk.weight, trunk.bias                    pi.weight, vf.weight  exact",
        "pi     6      pi.weight, pi.bias, norm.weight, norm.bias  actor.weight          LayerNorm mixes the units",
        "",
        "frozen",
        "  actor   reaches the module's output",
        "  vf      no rule for aten.sort",
        "  critic  reaches the module's output",
    ]
    assert repr(traced(net)) == "Graph(2 groups, 14 units, 3 frozen)"


def test_a_graph_is_a_collection_in_forward_order() -> None:
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    graph = traced(net)
    assert [group.name for group in graph] == ["0", "2"]
    assert (len(graph), "0" in graph, "4" in graph, graph["2"].width) == (2, True, False, 5)
    with pytest.raises(KeyError, match="'4' is frozen: reaches the module's output"):
        graph["4"]
    with pytest.raises(KeyError, match="no group '7'; there are 0, 2"):
        graph["7"]


def test_select_takes_names_and_all_below_them() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    net = built(lambda: Wire(lambda m, x: m.body2(m.body(x)), body=body, body2=nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))))  # fmt: skip
    graph = traced(net)
    assert list(widths(graph.select(include=["body"]))) == ["body.0", "body.2"]  # and not body2
    assert list(widths(graph.select(exclude=["body.0"]))) == ["body.2", "body2.0"]
    assert list(widths(graph.select(include=["body"], exclude=["body.0"]))) == ["body.2"]
    told = r"no group is called 'bod'; did you mean 'body.2'. there are body.0, body.2, body2.0"
    with pytest.raises(ValueError, match=told):
        graph.select(include=["bod"])


def test_parts_of_a_layer_are_named_by_their_units() -> None:
    def halves(m: Any, x: Tensor) -> Tensor:
        one, two = m.fc(x).chunk(2, 1)
        return m.a(F.relu(one)) + m.b(torch.tanh(two))

    def stripes(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.a(h[:, ::2]) + m.b(h[:, 1::2])

    for wiring, expected in ((halves, {"fc[0:3]": 3, "fc[3:6]": 3}), (stripes, {"fc[0,2,4]": 3, "fc[1,3,5]": 3})):
        net = built(lambda w=wiring: Wire(w, fc=nn.Linear(3, 6), a=nn.Linear(3, 2), b=nn.Linear(3, 2)))
        graph = traced(net)
        assert widths(graph) == expected
        second = list(graph)[1]
        assert columns(second) == {"b.weight": [[0], [1], [2]]}
        assert graph.select(include=["fc"])["fc" + second.name[2:]] is second


def test_two_groups_of_one_module_have_different_names() -> None:
    net = built(lambda: nn.GRUCell(3, 4))
    head = built(lambda: nn.Linear(4, 2))
    both = Wire(lambda m, x: m.head(m.cell(x)), cell=net, head=head)
    graph = traced(both)
    names = [*widths(graph), *graph.frozen]
    assert len(set(names)) == len(names)


def test_columns_behind_a_flatten_are_height_times_width_to_a_channel() -> None:
    net = built(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1), nn.ReLU(),
                                      nn.Flatten(), nn.Linear(2, 2)))  # fmt: skip
    graph = traced(net, IMAGE)
    assert columns(graph["0"]) == {"3.weight": [[0], [1], [2]]}
    assert columns(graph["3"]) == {"6.weight": [[0], [1]]}
    wide = built(lambda: nn.Sequential(nn.Conv2d(1, 2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)))
    assert columns(traced(wide, IMAGE)["0"]) == {"3.weight": [[0, 1, 2, 3], [4, 5, 6, 7]]}


def test_units_that_are_added_or_multiplied_are_one() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out((F.relu(m.a(x)) + m.b(x)) * torch.sigmoid(m.gate(x)))

    parts = {n: nn.Linear(3, 4) for n in ("a", "b", "gate")}
    graph = traced(built(lambda: Wire(forward, **parts, out=nn.Linear(4, 2))))
    assert widths(graph) == {"a": 4}
    owned = {axis.name: axis.role for axis in graph["a"].incoming}
    assert owned == {f"{n}.{kind}": kind for n in ("a", "b", "gate") for kind in ("weight", "bias")}


def test_calls_that_agree_add_their_consumers() -> None:
    net = built(lambda: Wire(lambda m, x: m.pi(F.relu(m.fc(x))), fc=nn.Linear(3, 4), pi=nn.Linear(4, 2),
                             vf=nn.Linear(4, 1)))  # fmt: skip
    graph = recycle.trace(net, lambda: net(X), lambda: net.vf(F.relu(net.fc(X[:2]))))
    assert list(columns(graph["fc"])) == ["pi.weight", "vf.weight"]
    assert list(columns(recycle.trace(net, lambda: net(X))["fc"])) == ["pi.weight"]


def test_calls_that_disagree_freeze_the_units() -> None:
    net = mlp()
    flipped = lambda: net[2](F.relu(net[0](X)).flip(1))  # noqa: E731
    graph = recycle.trace(net, lambda: net(X), flipped)
    assert graph.frozen["0"] == "the calls disagree about what column 1 of '2.weight' reads"
    assert recycle.trace(net, flipped)["0"].outgoing[0].index.tolist() == [[3], [2], [1], [0]]


def test_an_output_of_one_call_is_frozen_for_all() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(X), lambda: {"features": [net[1](net[0](X))]})
    assert (len(graph), graph.frozen["0"]) == (0, "reaches the module's output")


# ---------------------------------------------------------------- what is refused, and why


def _computed(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w * m.scale)), m.out)


_REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "sorted": (
        lambda: Wire(lambda m, x: m.o(torch.sort(F.relu(m.fc(x)), 1).values), fc=nn.Linear(3, 4), o=nn.Linear(4, 2)),
        "fc", "aten.sort"),
    "transformed": (
        lambda: Wire(lambda m, x: m.o(torch.fft.fft(F.relu(m.fc(x))).real), fc=nn.Linear(3, 4), o=nn.Linear(4, 2)),
        "fc", "aten._fft"),
    "summed over": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x)).sum(1, keepdim=True)), fc=nn.Linear(3, 4), o=nn.Linear(1, 2)),
        "fc", "aten.sum reduces over the units"),
    "running sum": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x)).cumsum(1)), fc=nn.Linear(3, 4), o=nn.Linear(4, 2)),
        "fc", "aten.cumsum runs over the units"),
    "tied": (
        lambda: Wire(lambda m, x: F.relu(m.fc(x)) @ m.fc.weight, fc=nn.Linear(3, 4)),
        "fc", "'fc.weight' is tied"),
    "frozen producer": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x))), fc=nn.Linear(3, 4).requires_grad_(False), o=nn.Linear(4, 2)),
        "fc", "'fc.weight' has requires_grad=False"),
    "frozen consumer": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x))), fc=nn.Linear(3, 4), o=nn.Linear(4, 2).requires_grad_(False)),
        "fc", "'o.weight' has requires_grad=False"),
    "buffer as producer": (
        lambda: Wire(lambda m, x: m.o(F.relu(x @ m.w)), w=rand(3, 4), o=nn.Linear(4, 2)),
        "w", "'w' is a buffer, which no optimizer trains"),
    "buffer as consumer": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x)) @ m.w), fc=nn.Linear(3, 4), w=rand(4, 5), o=nn.Linear(5, 2)),
        "fc", "'w' is a buffer, which no optimizer trains"),
    "output": (
        lambda: Wire(lambda m, x: (m.o(F.relu(m.fc(x))), F.relu(m.fc(x))), fc=nn.Linear(3, 4), o=nn.Linear(4, 2)),
        "fc", "reaches the module's output"),
    "head": (mlp, "2", "reaches the module's output"),
    "nothing consumes it": (
        lambda: Wire(lambda m, x: m.o(x) * F.relu(m.fc(x)).mean(), fc=nn.Linear(3, 4), o=nn.Linear(3, 2)),
        "fc", "reduces over the units"),
    "one unit": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x))), fc=nn.Linear(3, 1), o=nn.Linear(1, 2)),
        "fc", "one unit alone"),
    "weight penalty": (
        lambda: Wire(lambda m, x: (m.o(F.relu(m.fc(x))), m.fc.weight.square().sum()), fc=nn.Linear(3, 4),
                     o=nn.Linear(4, 2)),
        "fc", "'fc.weight' is also used by aten."),
    "transposed convolution in groups": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, groups=2)),
        "0", "a transposed aten.convolution with '2.weight' in 2 groups"),
    "matrix that is no parameter": (
        lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x)) @ F.relu(m.fc(x)).t()), fc=nn.Linear(3, 4), o=nn.Linear(6, 2)),
        "fc", "multiplies it by a matrix that is no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_REFUSED))
def test_refused_with_the_operation_or_the_parameter_by_name(kind: str) -> None:
    make, name, reason = _REFUSED[kind]
    net = built(make)
    graph = traced(net, IMAGE if "convolution" in kind else X)
    found = {n: why for n, why in graph.frozen.items() if n == name or n.startswith(f"{name}[")}
    assert found and not any(n == name or n.startswith(f"{name}[") for n in widths(graph))
    assert any(reason in why for why in found.values()), found


def test_a_value_that_python_reads_freezes_that_unit_alone() -> None:
    net = built(lambda: Wire(lambda m, x: m.o(F.relu(m.fc(x))) * m.fc(x).detach()[0, 0].item(), fc=nn.Linear(3, 4),
                             o=nn.Linear(4, 2)))  # fmt: skip
    graph = traced(net)
    assert widths(graph) == {"fc[1:4]": 3}
    assert graph.frozen["fc[0:1]"] == "its value is read by Python"


def test_a_weight_computed_from_parameters_is_refused_by_name() -> None:
    plain = built(lambda: Wire(_computed, w=free(4, 3), scale=nn.Parameter(rand(1)), out=free(2, 4)))
    normed = built(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(),
                                         nn.Linear(4, 2)))  # fmt: skip
    for net, part in ((plain, "w"), (normed, "0")):
        graph = traced(net)
        assert len(graph) == 0
        assert any(name.split(".")[0] == part for name in graph.frozen), graph.frozen


def test_a_consumer_computed_from_parameters_freezes_what_it_reads() -> None:
    net = built(lambda: Wire(lambda m, x: F.linear(F.relu(m.fc(x)), m.w * 2), fc=nn.Linear(3, 4), w=free(2, 4)))
    assert "fc" in traced(net).frozen


@pytest.mark.parametrize("where", ["beside", "instead"])
def test_wiring_that_labels_cannot_see_is_caught_by_the_trial(where: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        there_and_back = torch.from_numpy(h.detach().numpy() * 1.0)
        return m.a(h) + m.b(there_and_back) if where == "beside" else m.a(there_and_back)

    net = built(lambda: Wire(forward, fc=nn.Linear(3, 4), a=nn.Linear(4, 2), b=nn.Linear(4, 2)))
    graph = traced(net)
    assert len(graph) == 0
    if where == "beside":
        assert graph.frozen["fc"].startswith("trial split changed the output by ")
    else:
        assert "fc" in graph.frozen


def test_a_worn_network_does_not_hide_wrong_wiring() -> None:
    """All units are dead, so on these weights even a wrong split would change nothing."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.fc(x))
        return m.a(h) + m.b(torch.from_numpy(h.detach().numpy() * 1.0))

    net = built(lambda: Wire(forward, fc=nn.Linear(3, 4), a=nn.Linear(4, 2), b=nn.Linear(4, 2)))
    with torch.no_grad():
        net.fc.bias.fill_(-1e3)
    assert traced(net).frozen["fc"].startswith("trial split changed the output by ")


def test_an_index_that_depends_on_the_data_is_not_taken_for_wiring() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x.sum(0).argsort()  # another batch, another order
        return m.o(F.relu(m.fc(x))[:, order])

    net = built(lambda: Wire(forward, fc=nn.Linear(3, 3), o=nn.Linear(3, 2)))
    assert "fc" in traced(net).frozen


def test_what_is_no_module_or_no_call_is_refused() -> None:
    with pytest.raises(TypeError, match=r"trace needs a torch.nn.Module, got function"):
        recycle.trace(F.relu, lambda: 0)  # type: ignore[arg-type]
    for calls in ((), (X,)):
        with pytest.raises(TypeError, match="at least one zero-argument call"):
            recycle.trace(mlp(), *calls)  # type: ignore[arg-type]
    with pytest.raises(NotRecyclable, match="the traced call fails: RuntimeError: mat1 and mat2"):
        traced(mlp(), rand(2, 9))


# ---------------------------------------------------------------- tracing leaves no trace


def _everything(net: nn.Module) -> dict[str, Any]:
    return {
        **{f"parameter {n}": (id(p), p.data_ptr(), p.detach().clone()) for n, p in net.named_parameters()},
        **{f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()},
        **{f"buffer {n}": b.detach().clone() for n, b in net.named_buffers()},
        "flags": [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "enabled": (torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()),
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) or bool((one.isnan() & other.isnan()).any())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _noisy() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.drop(F.relu(m.norm(m.fc(x))))
        noise = torch.randn_like(h[:1, :1]) + 0 * random.random() * np.random.rand()
        return m.out(F.dropout(h, 0.3, m.training)) + noise

    return Wire(forward, fc=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), drop=nn.Dropout(0.5), out=nn.Linear(4, 2))


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_tracing_leaves_everything_as_it_was(mode: str) -> None:
    net = built(_noisy)
    net(rand(8, 3, seed=1)).square().sum().backward()
    net.train(mode != "eval")
    if mode == "mixed":
        net.norm.eval()
    before = _everything(net)
    assert widths(traced(net)) == {"fc": 4}
    assert _same(before, _everything(net))


def test_a_call_that_fails_leaves_everything_as_it_was() -> None:
    net = built(_noisy)
    before = _everything(net)
    with pytest.raises(NotRecyclable):
        recycle.trace(net, lambda: net(X), lambda: net(X).view(99))
    assert _same(before, _everything(net))


def test_worn_parameters_come_back_bit_for_bit() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].weight[0], net[0].weight[1, 0], net[0].bias[2] = float("nan"), -0.0, float("-inf")
    before = [p.detach().clone().view(torch.int64) for p in net.parameters()]
    traced(net)
    after = [p.detach().view(torch.int64) for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_buffers_that_a_call_replaces_are_put_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count = m.count + 1  # replaced, not written in place
        return m.out(F.relu(m.fc(x)))

    net = built(lambda: Wire(forward, fc=nn.Linear(3, 4), out=nn.Linear(4, 2), count=torch.zeros(())))
    assert widths(traced(net)) == {"fc": 4}
    assert net.count == 0
    assert traced(net)["fc"].homogeneous
    assert net.count == 0


def test_gradients_of_a_pending_graph_survive_a_trace_or_are_refused_loudly() -> None:
    net = mlp()
    loss = net(X).square().sum()
    traced(net)
    expected = torch.autograd.grad(net(X).square().sum(), list(net.parameters()))
    try:
        found = torch.autograd.grad(loss, list(net.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dropout_and_batchnorm_in_training_mode_are_exact() -> None:
    net = built(_noisy).train()
    assert traced(net)["fc"].exact


# ---------------------------------------------------------------- homogeneous units


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Identity(), nn.PReLU(), nn.PReLU(4)])
def test_homogeneous_is_proved(activation: nn.Module) -> None:
    assert traced(mlp(activation))["0"].homogeneous


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Sigmoid(), nn.ELU(),
                                        nn.ReLU6(), nn.Hardtanh(), nn.Hardshrink(0.01),
                                        nn.Threshold(0.01, 0.0)], ids=lambda a: type(a).__name__)  # fmt: skip
def test_homogeneous_is_refused(activation: nn.Module, scale: float) -> None:
    assert not traced(mlp(activation), X * scale)["0"].homogeneous


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_homogeneous_is_refused_behind_a_normalisation(norm: Any) -> None:
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), norm(4), nn.ReLU(), nn.Linear(4, 2)))
    assert not traced(net)["0"].homogeneous


def test_a_unit_with_two_values_is_homogeneous_only_if_both_are() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.a(F.relu(h)) + m.b(m.other(h))

    for other, expected in ((nn.LeakyReLU(), True), (nn.Tanh(), False)):
        net = built(lambda o=other: Wire(forward, fc=nn.Linear(3, 4), a=nn.Linear(4, 2), b=nn.Linear(4, 2), other=o))
        assert traced(net)["fc"].homogeneous is expected


def test_asking_whether_units_are_homogeneous_leaves_no_trace() -> None:
    net = built(_noisy).train()
    group = traced(net)["fc"]
    before = _everything(net)
    assert not group.homogeneous
    assert _same(before, _everything(net))


# ---------------------------------------------------------------- any small network

_ACTS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.Tanh, nn.GELU, lambda: nn.LeakyReLU(0.2), lambda: nn.ReLU(inplace=True), nn.PReLU, nn.Sigmoid,
]  # fmt: skip


class Drawn(nn.Module):
    """A random network: a stack of blocks that end in a head, and some side heads."""

    def __init__(self, inputs: int, blocks: list[tuple[str, int, int]], image: bool) -> None:
        super().__init__()
        self.kinds = [kind for kind, _, _ in blocks]
        self.parts, self.acts, self.sides = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        size = inputs
        self.flat = False
        for kind, width, act in blocks:
            conv = image and kind in ("conv", "bn", "pool")
            layer = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if conv else nn.Linear
            if not conv and image:
                size, image = size * 16, False
            self.acts.append(_ACTS[act]())
            inner = {
                "linear": lambda n, w, make=layer: [make(n, w)],
                "conv": lambda n, w, make=layer: [make(n, w)],
                "pool": lambda n, w, make=layer: [make(n, w)],
                "bn": lambda n, w, make=layer, c=conv: [make(n, w), (nn.BatchNorm2d if c else nn.BatchNorm1d)(w)],
                "residual": lambda n, w: [nn.Linear(n, w), nn.Linear(w, n)],
                "concat": lambda n, w: [nn.Linear(n, w), nn.Linear(n, w + 1)],
                "gate": lambda n, w: [nn.Linear(n, 2 * w)],
                "side": lambda n, w: [nn.Linear(n, w)],
                "stripes": lambda n, w: [nn.Linear(n, 2 * w), nn.Linear(w, 2)],
            }[kind]
            self.parts.append(nn.ModuleList(inner(size, width)))
            size = {"residual": size, "concat": 2 * width + 1}.get(kind, width)
            self.sides.append(nn.Linear(size, 2) if kind == "side" else nn.Identity())
        self.image_end = image
        self.head = nn.Linear(size * 16 if image else size, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for kind, part, act, side in zip(self.kinds, self.parts, self.acts, self.sides, strict=True):
            if x.dim() == 4 and not isinstance(part[0], nn.Conv2d):
                x = x.flatten(1)
            if kind == "residual":
                x = x + part[1](act(part[0](x)))
            elif kind == "concat":
                x = torch.cat([act(part[0](x)), torch.tanh(part[1](x))], 1)
            elif kind == "gate":
                value, gate = part[0](x).chunk(2, 1)
                x = act(value) * torch.sigmoid(gate)
            elif kind == "stripes":
                h = act(part[0](x))
                outputs.append(part[1](h[:, 1::2]))
                x = h[:, ::2]
            else:
                for layer in part:
                    x = layer(x)
                x = act(x)
                if kind == "pool" and x.dim() == 4:
                    x = F.max_pool2d(x, 3, stride=1, padding=1)
            if kind == "side":
                outputs.append(side(x))
        return [*outputs, self.head(x.flatten(1))]


_FLAT = st.tuples(
    st.sampled_from(["linear", "bn", "residual", "concat", "gate", "side", "stripes"]), st.integers(2, 5),
    st.integers(0, len(_ACTS) - 1),
)  # fmt: skip
_SPATIAL = st.tuples(st.sampled_from(["conv", "bn", "pool"]), st.integers(2, 4), st.integers(0, len(_ACTS) - 1))


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, int]:
    seed = draw(st.integers(0, 2**16))
    front = draw(st.lists(_SPATIAL, max_size=2))
    blocks = front + draw(st.lists(_FLAT, min_size=0 if front else 1, max_size=3))
    x = rand(3, 2, 4, 4, seed=seed) if front else rand(4, 3, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Drawn(x.shape[1], blocks, bool(front)).double()
        for parameter in net.parameters():  # lively: no layer is at its quiet start
            nn.init.normal_(parameter, 0.0, 0.7)
    return net.train(draw(st.booleans())), x, seed


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from([0.0, 0.3, 0.5]))
def test_a_split_into_a_silent_slot_keeps_any_small_network(drawn: tuple[nn.Module, Tensor, int], share: float) -> None:
    net, x, seed = drawn
    graph = recycle.trace(net, lambda: net(x))
    assert len(graph) + len(graph.frozen) > 0
    generator = torch.Generator().manual_seed(seed)
    unseen = rand(*x.shape, seed=seed + 1)
    buffers = {n: b.clone() for n, b in net.named_buffers()}

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = [y.clone() for batch in (x, unseen) for y in net(batch)]
            for name, buffer in net.named_buffers():
                if "num_batches" in name or not net.training:
                    continue
                buffer.copy_(buffers[name])
        return found

    for group in graph:
        assert group.exact
        parent, slot = torch.randperm(group.width, generator=generator)[:2].tolist()
        with torch.no_grad():
            for axis in group.outgoing:
                tensor = group.tensor(axis.name)
                tensor.index_fill_(axis.dim, axis.index[slot], 0.0)
        before = outputs()
        recycle.apply(Split([parent], into=[slot], share=share), group)
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        for mine, other in zip(outputs(), before, strict=True):
            assert (mine - other).abs().max() <= 1e-10 * max(1.0, float(other.abs().max())), group.name
        assert torch.equal(*(group.incoming[0].read(group.tensor(group.incoming[0].name), torch.tensor([u]))
                             for u in (parent, slot)))  # fmt: skip


class Standardised(nn.Module):
    """Divides by the root of a running variance, written by hand; of the inputs, the hidden units, or both."""

    def __init__(self, inputs: bool, hidden: bool):
        super().__init__()
        self.inputs, self.hidden = inputs, hidden
        self.fc, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("seen", torch.rand(3) + 0.5)
        self.register_buffer("variance", torch.rand(5) + 0.5)

    def forward(self, x):
        if self.inputs:
            x = x / (self.seen[None] + 1e-3).sqrt()
        x = self.fc(x).relu()
        if self.hidden:
            x = x / (self.variance[None] + 1e-3).sqrt()
        return self.head(x)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_statistics_computed_from_a_buffer_belong_to_the_units_they_meet(inputs, hidden):
    net, x = Standardised(inputs, hidden), torch.randn(7, 3)
    graph = recycle.trace(net, lambda: net(x))
    (group,) = graph
    held = {axis.name: axis.role for axis in group.incoming}
    assert held == {"fc.weight": "weight", "fc.bias": "bias", **({"variance": "buffer"} if hidden else {})}
    assert group.width == 5 and group.exact and graph.frozen == {"head": "reaches the module's output"}


def wrapped(how: str) -> nn.Module:
    """A network of which a part, or all, runs through something other than eager modules."""
    inner: Any = built(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()))
    if how == "scripted part":
        inner = torch.jit.script(inner)
    elif how == "traced part":
        inner = torch.jit.trace(inner, X)
    elif how == "compiled part":
        inner = torch.compile(inner, backend="aot_eager")
    net = built(lambda: Wire(lambda m, x: m.head(m.body(x)), body=inner, head=nn.Linear(4, 2)))
    return torch.compile(net, backend="aot_eager") if how == "compiled" else net  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["scripted part", "traced part", "compiled part", "compiled"])
def test_scripted_and_compiled_networks_are_traced_and_split(how: str) -> None:
    net = wrapped(how)
    net(X)  # compiled before it is traced
    graph = traced(net, X)
    first, second = (name.replace("_orig_mod.", "") for name in (group.name for group in graph))
    assert (first, second) == ("body.0", "body.2")
    assert [(g.width, g.exact) for g in graph] == [(6, True), (4, True)]
    for group in graph:
        recycle.apply(recycle.Reset([1]), group)
        before = net(X)
        recycle.apply(Split([0], into=[1], share=0.3), group)
        torch.testing.assert_close(net(X), before, rtol=1e-12, atol=1e-12)
        assert group.resizable == ("compiled" in how)
        if group.resizable:
            recycle.apply(recycle.Prune([group.width - 1]), group)
            recycle.apply(Split([0], share=0.5), group)
            assert net(X).isfinite().all()
        else:
            assert "is scripted, and its sizes are constants of the script" in group.why_fixed


def test_a_network_that_is_scripted_as_a_whole_is_refused() -> None:
    net = torch.jit.script(mlp())
    with pytest.raises(NotRecyclable, match="a scripted module names no layers; trace the network that was scripted"):
        recycle.trace(net, lambda: net(X))


@pytest.mark.parametrize("kind", ["linear", "convolution", "lstm"])
def test_units_are_the_same_under_autocast(kind: str) -> None:
    makes: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "linear": (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)), X),
        "convolution": (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2),
                                  nn.Flatten(), nn.Linear(36, 2)), IMAGE),
        "lstm": (
            lambda: Wire(lambda m, x: m.head(m.lstm(x)[0]), lstm=nn.LSTM(3, 4), head=nn.Linear(4, 2)), X[None]),
    }  # fmt: skip
    net, x = built(makes[kind][0]).float(), makes[kind][1].float()

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = net(x)
        return found

    mixed, plain = recycle.trace(net, call), recycle.trace(net, lambda: net(x))
    assert call().dtype == torch.bfloat16

    def described(graph: Any) -> list[Any]:
        return [(g.name, g.exact, [(a.name, a.dim, a.index.tolist()) for a in (*g.incoming, *g.outgoing)])
                for g in graph]  # fmt: skip

    assert described(mixed) == described(plain)
    assert len(mixed) and mixed.frozen == plain.frozen
    for group in mixed:
        recycle.apply(recycle.Reset([1]), group)
        before = net(x)
        recycle.apply(Split([0], into=[1]), group)
        torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def _lstm_step(gates, hidden, state, bias=None, hidden_bias=None):
    total = gates + hidden if bias is None else (gates + bias) + (hidden + hidden_bias)
    i, f, c, o = total.chunk(4, 1)
    after = f.sigmoid() * state + i.sigmoid() * c.tanh()
    return o.sigmoid() * after.tanh(), after, total.clone()


def _gru_step(gates, hidden, state, bias=None, hidden_bias=None):
    gates, hidden = (gates, hidden) if bias is None else (gates + bias, hidden + hidden_bias)
    (r, z, n), (hr, hz, hn) = gates.chunk(3, 1), hidden.chunk(3, 1)
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return n + (z + hz).sigmoid() * (state - n), gates.new_zeros(len(gates), 5 * state.shape[1])


@pytest.fixture
def fused_kernels():
    """What torch has for a GPU alone, on the CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_thnn_fused_lstm_cell", _lstm_step, "CPU")
    library.impl("_thnn_fused_gru_cell", _gru_step, "CPU")
    yield
    library._destroy()


class _Fused(nn.Module):
    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, *, fused: bool) -> torch.Tensor:
        cell, h, s = self.cell, x.new_zeros(len(x), 5), x.new_zeros(len(x), 5)
        biases = () if cell.bias_ih is None else (cell.bias_ih, cell.bias_hh)
        for step in x.unbind(1):
            products = step @ cell.weight_ih.t(), h @ cell.weight_hh.t()
            if isinstance(cell, nn.LSTMCell):
                h, s, *_ = (torch.ops.aten._thnn_fused_lstm_cell if fused else _lstm_step)(*products, s, *biases)
            else:
                h, *_ = (torch.ops.aten._thnn_fused_gru_cell if fused else _gru_step)(*products, h, *biases)
        return self.out(h)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_gpus_fused_recurrent_cells_have_the_units_of_those_written_out(fused_kernels, kind, bias) -> None:
    net, x = _Fused(kind(3, 5, bias=bias)).double(), torch.randn(4, 3, 3).double()
    assert torch.allclose(net(x, fused=True), net(x, fused=False))
    (fused,) = graph = recycle.trace(net, lambda: net(x, fused=True))
    (plain,) = recycle.trace(net, lambda: net(x, fused=False))
    for one, other in zip(fused.incoming + fused.outgoing, plain.incoming + plain.outgoing, strict=True):
        assert (one.name, one.dim, one.role, one.bias) == (other.name, other.dim, other.role, other.bias)
        assert torch.equal(one.index, other.index)
    with torch.no_grad():
        net.out.weight[:, 3] = net.cell.weight_hh[:, 3] = 0.0
    before = net(x, fused=True)
    recycle.apply(recycle.Split([1], into=[3]), graph["cell"])
    assert torch.allclose(before, net(x, fused=True), rtol=0, atol=1e-12)
    assert not torch.equal(net.cell.weight_hh[:, 3], torch.zeros_like(net.cell.weight_hh[:, 3]))
