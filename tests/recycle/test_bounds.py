"""Certificates: bounds hold for every input of the box, are tight where they can be, and say nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recycle
from recycle.bounds import Intervals, unit_bounds
from recycle.intervals import RULES

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "celu": lambda x: F.celu(x, 0.7),
    "selu": F.selu,
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.1),
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.7, 0.1),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "softplus": F.softplus,
    "softplus, low threshold": lambda x: F.softplus(x, 1.0, 2.0),
    "exp": lambda x: torch.exp(x / 4),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "logsigmoid": F.logsigmoid,
    "square": torch.square,
    "cube": lambda x: x**3,
    "abs": torch.abs,
    "neg": torch.neg,
    "reciprocal": lambda x: 1 / (x.abs() + 0.5),
    "root": lambda x: (x.abs() + 0.1).sqrt(),
    "floor": torch.floor,
    "gate": lambda x: torch.where(x > 0.2, x, 0.1 * x),
    "masked": lambda x: x.masked_fill(x < -0.1, 0.3),
    "compared": lambda x: (x > 0).to(x.dtype) * x,
    "in place": lambda x: x.clone().mul_(0.1).add_(0.7).relu_(),
    "half": lambda x: x.half().float() if x.dtype == torch.float32 else x,
    "sine": torch.sin,  # no rule
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.1, dtype=x.dtype)),
    "glu": lambda x: F.glu(torch.cat([x, -x], 1), 1),
    "softmax": lambda x: x.softmax(1),
    "self attention": lambda x: (x @ x.t()).softmax(1) @ x,
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "extremes": lambda x: torch.maximum(x, -x) - torch.minimum(x, x.roll(1, 1)),
    "reduced": lambda x: x - x.mean(1, keepdim=True) + x.amax(1, keepdim=True) - x.sum(1, keepdim=True),
    "moved": lambda x: torch.cat([x.flip(1)[:, 1:], x[:, :1]], 1)[:, torch.arange(x.shape[1])],
    "written": lambda x: torch.zeros_like(x).index_copy(1, torch.arange(2), x[:, :2]),
}


class Layers(nn.Module):
    """Linear layers with any function between them."""

    def __init__(self, widths: list[int], between: list[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairwise(widths))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer, name in zip(self.layers, ["", *self.between], strict=True):
            x = layer(SMOOTH[name](x) if name else x)
        return x


class Watch:
    """The input of every layer, as the bounds and as a pass sees it."""

    def __init__(self, net: nn.Module) -> None:
        self.layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    def inputs(self, run: Callable[[], Any]) -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for m in self.layers]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return seen


@torch.no_grad()
def assert_sound(net: nn.Module, low: Tensor, high: Tensor, generator: torch.Generator) -> None:
    """Whatever a layer reads, on corners and inside of the box, lies within its bounds."""
    net.eval()
    watch = Watch(net)
    x = low.clone()
    intervals = Intervals(net)
    intervals.put(x, low.double(), high.double())
    bounds: list[tuple[Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        least, most = intervals.of(args[0])
        bounds.append((least.clone(), most.clone()))

    handles = [m.register_forward_pre_hook(note) for m in watch.layers]
    with intervals:
        net(x)
    for handle in handles:
        handle.remove()
    assert intervals.complete()
    points = [low, high, *(torch.where(torch.rand(low.shape, generator=generator) < 0.5, low, high) for _ in range(8))]
    points += [low + (high - low) * torch.rand(low.shape, generator=generator, dtype=low.dtype) for _ in range(8)]
    for point in points:
        for seen, (least, most) in zip(watch.inputs(lambda p=point: net(p.clamp(low, high))), bounds, strict=True):
            value = seen.double()
            unknown = least.isinf() & most.isinf()  # NaN too, perhaps
            assert bool((unknown | ((least <= value) & (value <= most))).all()), (least - value).max().item()


@given(
    widths=st.lists(st.integers(2, 9), min_size=3, max_size=5),
    names=st.lists(st.sampled_from(sorted(SMOOTH)), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 30.0]),
    gain=st.sampled_from([0.3, 1.0, 10.0]),
)
@settings(max_examples=300, deadline=None)
def test_bounds_hold_for_random_networks_and_boxes(
    widths: list[int], names: list[str], dtype: torch.dtype, seed: int, scale: float, gain: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = Layers(widths, names[: len(widths) - 2], dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(gain * torch.randn(p.shape, generator=generator))
    low = 5 * torch.randn(3, widths[0], generator=generator, dtype=dtype)
    high = low + scale * torch.rand(low.shape, generator=generator, dtype=dtype)
    assert_sound(net, low, high, generator)


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_every_operation_is_sound_on_a_fine_grid(name: str) -> None:
    """One element at a time, narrow and wide boxes, both precisions; pieces and minima of every function."""
    for dtype in (torch.float32, torch.float64):
        for width in (0.0, 1e-3, 0.5, 4.0):
            low = torch.linspace(-12, 12, 400, dtype=dtype).reshape(100, 4)
            net = Layers([4, 4, 4], [name], dtype)
            with torch.no_grad():
                net.layers[0].weight.copy_(torch.eye(4))
                net.layers[0].bias.zero_()
            assert_sound(net, low, low + width, torch.Generator().manual_seed(0))


class Plane(nn.Module):
    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.one = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4) if variant == "group" else nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        pools: dict[str, Callable[[Tensor], Tensor]] = {
            "max": lambda x: F.max_pool2d(x, 3, 1, 1),
            "average": lambda x: F.avg_pool2d(x, 3, 1, 1),
            "adaptive": lambda x: F.adaptive_avg_pool2d(x, 4),
            "bilinear": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"),
            "nearest": lambda x: F.interpolate(x, size=(4, 4)),
            "pad": lambda x: F.pad(x, (1, -1, 0, 0)),
        }
        return self.head(self.two(pools.get(self.variant, F.relu)(x)).relu().flatten(1))


@pytest.mark.parametrize("variant", ["max", "average", "adaptive", "bilinear", "nearest", "pad", "group"])
def test_bounds_hold_for_convolutions_pools_and_norms(variant: str) -> None:
    torch.manual_seed(0)
    net = Plane(variant)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    generator = torch.Generator().manual_seed(1)
    for width in (0.0, 1e-3, 2.0):
        low = torch.randn(2, 2, 4, 4, generator=generator)
        assert_sound(net, low, low + width, generator)


def mlp() -> nn.Sequential:
    """x in [0, 1]^2: pre-activations x0 - 2 x1 + 1, -x0 - x1, x0 + x1 - 2.5, x0 - .5."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2], [-1, -1], [1, 1], [1, 0]]))
        net[0].bias.copy_(torch.tensor([1.0, 0, -2.5, -0.5]))
        net[2].weight.copy_(torch.tensor([[1.0, 1, 1, -2], [-1, 0, 0, 0], [0, 0, 0, 1]]))
        net[2].bias.copy_(torch.tensor([0.0, -0.5, -0.25]))
    return net


def box(size: int, low: float, high: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.full((1, size), low, dtype=dtype), torch.full((1, size), high, dtype=dtype)


def test_bounds_are_tight_where_intervals_can_be() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(torch.rand(5, 2).double()))
    bounds = unit_bounds(graph, net, *box(2, 0, 1))
    torch.testing.assert_close(bounds["0"][0], torch.zeros(4).double(), atol=1e-13, rtol=0)
    torch.testing.assert_close(bounds["0"][1], torch.tensor([2, 0, 0, 0.5]).double(), atol=1e-13, rtol=0)
    torch.testing.assert_close(bounds["2"][1], torch.tensor([2, 0, 0.25]).double(), atol=1e-13, rtol=0)


def test_certified_is_not_observed() -> None:
    """Unit 2 never fires in the box; unit 3 only where x0 > .5, which the data may never show."""
    net = mlp()
    with torch.no_grad():
        net[0].bias[1] = -1e3
    graph = recycle.trace(net, lambda: net(torch.rand(5, 2).double()))
    certified = recycle.certify(graph, net, *box(2, 0, 1))
    data = net[1](net[0](torch.rand(64, 2).double() * 0.5))
    assert (data == 0).all(0).tolist() == [False, True, True, True]
    assert certified["0"].tolist() == [False, True, True, False]
    assert certified["2"].tolist() == [False, True, False]
    assert recycle.certify(graph, net, *box(2, 0, 3))["0"].tolist() == [False, True, False, False]


def test_rounding_cannot_wake_a_certified_unit() -> None:
    """x - x' of a float32 sum that cancels to rounding noise: mathematically never positive, in float32 it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[0].weight[:, :500] = torch.rand(8, 500)
        net[0].weight[:, 500:] = -net[0].weight[:, :500].flip(1)
        net[0].bias.zero_()
        x = torch.full((1, 1000), 0.7)
        exact = x.double() @ net[0].weight.double().t()
        assert bool((exact.abs() < 1e-12).all()), "nothing but rounding is left"
    graph = recycle.trace(net, lambda: net(torch.rand(4, 1000)))
    assert not recycle.certify(graph, net, x, x)["0"].any()


def test_convolutions_and_a_constant_behind_batch_norm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
        nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    with torch.no_grad():
        net[0].bias[2] = net[3].bias[1] = net[6].bias[4] = -1e3
        net[2].bias.uniform_(-1, 1)
    graph = recycle.trace(net, lambda: net(torch.rand(2, 3, 6, 6)))
    certified = recycle.certify(graph, net, torch.zeros(1, 3, 6, 6), torch.ones(1, 3, 6, 6))
    assert {name: units.nonzero()[:, 0].tolist() for name, units in certified.items()} == {"0": [2], "3": [1], "6": [4]}


def test_images_as_bytes_and_dicts_of_inputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.vector = nn.Linear(4, 3), nn.Linear(2, 3)
            self.head = nn.Linear(6, 1)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            image = self.image(x["image"].flatten(1).float() / 255)
            return self.head(torch.cat([image, self.vector(x["vector"])], 1).relu())

    net = Both()
    with torch.no_grad():
        net.image.weight.fill_(1)
        net.image.bias.copy_(torch.tensor([-4.1, -3.9, 0]))
        net.vector.weight.fill_(1)
        net.vector.bias.copy_(torch.tensor([-1e3, -2.1, -1.9]))
    low = {"image": torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "vector": torch.zeros(1, 2)}
    high = {"image": torch.full((1, 1, 2, 2), 255, dtype=torch.uint8), "vector": torch.ones(1, 2)}
    graph = recycle.trace(net, lambda: net(high))
    certified = recycle.certify(graph, net, low, high)
    assert certified["image"].tolist() == [True, False, False]
    assert certified["vector"].tolist() == [True, True, False]


class Odd(nn.Module):
    """A network with something in it that bounds do not follow."""

    def __init__(self, middle: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 1)
        self.middle = middle
        self.register_buffer("kept", torch.zeros(1, 4))
        with torch.no_grad():
            self.one.bias.fill_(-1e3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.middle(self, self.one(x).relu() + 0 * x.mean()))


def _branch(net: Odd, h: Tensor) -> Tensor:
    return h if h.sum() < 1 else h + 1


def _keep(net: Odd, h: Tensor) -> Tensor:
    net.kept = h[:1] + net.kept
    return net.kept.expand_as(h)


def _outside(net: Odd, h: Tensor) -> Tensor:
    return h + torch.from_numpy(h.detach().numpy() + 0)


@pytest.mark.parametrize(
    "middle",
    [_branch, _keep, _outside, lambda net, h: h + torch.randn_like(h), lambda net, h: h[h == 0].sum() + h,
     lambda net, h: torch.fft.rfft(h, dim=1).real.mean() + h],
    ids=["branch", "state", "numpy", "noise", "mask", "no rule"],
)  # fmt: skip
def test_what_cannot_be_followed_is_not_certified(middle: Callable[[Odd, Tensor], Tensor]) -> None:
    plain, odd = Odd(lambda net, h: h), Odd(middle)
    for net, dead in ((plain, True), (odd, False)):
        graph = recycle.trace(plain, lambda: plain(torch.rand(3, 2)))
        graph.module = net
        for group in graph:
            group.module = net
        certified = recycle.certify(graph, net, *box(2, 0, 1, torch.float32))
        assert bool(certified["one"].all()) is dead and bool(certified["one"].any()) is dead


def test_nothing_is_changed_by_certifying() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 1))
    graph = recycle.trace(net, lambda: net(torch.rand(3, 2)))
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    recycle.certify(graph, net, *box(2, 0, 1, torch.float32))
    assert torch.equal(before, torch.get_rng_state())
    assert net.training and net[2].training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_bad_boxes_are_refused() -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(torch.rand(3, 2).double()))
    low, high = box(2, 0, 1)
    with pytest.raises(ValueError, match="low <= high"):
        recycle.certify(graph, net, high, low)
    with pytest.raises(ValueError, match="finite"):
        recycle.certify(graph, net, low, high / 0)
    with pytest.raises(ValueError, match="same shape"):
        recycle.certify(graph, net, low, high[0])
    with pytest.raises(recycle.NotRecyclable, match="certify fails"):
        recycle.certify(graph, net, low[:, :1], high[:, :1])


def test_every_rule_names_an_operation() -> None:
    missing = [name for name in RULES if not hasattr(torch.ops.aten, name)]
    assert not missing
