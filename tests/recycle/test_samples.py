"""What a sampled pass shows of a layer, and the splitting matrix of its units."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import NotRecyclable, Split
from recycle.rows import stride
from recycle.samples import Sample, as_sample, steepest
from recycle.track import Tracker


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def hinge(z: float) -> float:
    """Second derivative of softplus."""
    return math.exp(z) / (1 + math.exp(z)) ** 2


# ---------------------------------------------------------------- the splitting matrix


def test_the_smallest_eigenvalue_by_hand() -> None:
    """Pre-activations 1, -1, 0 have a standard deviation of 1, so with a softness of 1 the hinge is softplus's own."""
    x = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.double)
    z = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.double)
    gradient = torch.tensor([[2.0], [-1.0], [-0.5]], dtype=torch.double)
    # S = 2 s''(1) [1 0; 0 0] - s''(1) [0 0; 0 1] - .5 s''(0) [1 1; 1 1]
    a, b, d = 2 * hinge(1) - 0.5 * 0.25, -0.5 * 0.25, -hinge(1) - 0.5 * 0.25
    least = ((a + d) - math.sqrt((a - d) ** 2 + 4 * b**2)) / 2
    values, directions = steepest(Sample(x, z, gradient), softness=1.0)
    assert values.tolist() == pytest.approx([least], rel=1e-12) and least < -0.3
    expected = torch.tensor([b, least - a], dtype=torch.double)
    assert abs(torch.cosine_similarity(directions[0], expected, 0).item()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("count", "size"), [(64, 5), (40, 300), (300, 40)])
def test_the_lanczos_iteration_finds_what_the_whole_matrix_has(count: int, size: int) -> None:
    sample = Sample(rand(count, size), rand(count, 7, seed=1), rand(count, 7, seed=2))
    wide = 0.3 * sample.outputs.std(0)
    p = torch.sigmoid(sample.outputs / wide)
    matrices = torch.einsum("nu,na,nb->uab", sample.gradient * p * (1 - p) / wide, sample.inputs, sample.inputs)
    exact, vectors = torch.linalg.eigh(matrices)
    values, directions = steepest(sample, 0.3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(values, exact[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(7).double())
    assert float((directions * vectors[:, :, 0]).sum(1).abs().min()) > 1 - 1e-5


def test_units_without_a_gradient_or_a_hinge_have_nothing_to_gain() -> None:
    outputs = torch.stack([rand(20), torch.zeros(20).double(), rand(20, seed=1).abs()], 1)
    gradient = torch.stack([torch.zeros(20), torch.full((20,), -1.0), torch.ones(20)], 1).double()
    values, _ = steepest(Sample(rand(20, 3), outputs, gradient), 0.3)
    assert values.tolist()[:2] == [0, 0] and values[2] >= 0


def test_a_split_along_the_steepest_direction_lowers_the_loss_and_along_the_other_end_raises_it() -> None:
    """Literally a ReLU's second derivative is zero, so that no split would ever help."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    x = rand(256, 3)
    y = x[:, :1].abs() + x[:, 1:2] * x[:, 2:]
    graph = recycle.trace(net, lambda: net(x))
    with torch.no_grad():
        net[0].bias[0], net[2].weight[:, 0] = -1e3, 0.0  # the slot

    def loss() -> Tensor:
        return (net(x) - y).square().mean()

    with Tracker(graph, sample_every=1, sample=True) as tracker:
        loss().backward()
    sample = tracker.stats(graph["0"]).sample
    assert sample is not None
    down = steepest(sample, 0.3)
    up = steepest(Sample(sample.inputs, sample.outputs, -sample.gradient), 0.3)
    start = loss().item()
    first = copy.deepcopy(net.state_dict())
    changes = []
    for values, directions in (down, up):
        unit = int(values[1:].argmin()) + 1
        assert values[unit] < 0
        recycle.apply(Split([unit], into=[0], noise=0.1, along=directions[[unit]].tolist()), graph["0"])
        changes.append(loss().item() - start)
        net.load_state_dict(first)
    assert changes[0] < 0 < changes[1]


# ---------------------------------------------------------------- what is kept


def seen(layer: nn.Module, x: Tensor, units: Tensor) -> Sample | None:
    """What is kept of a pass whose loss is half the sum of squares: gradients are the outputs."""
    output = layer(x)
    output.retain_grad()
    (output.square().sum() / 2).backward()
    every = stride(x)
    return as_sample(layer, units, x[::every], output.detach()[::every], output.grad[::every])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 5), (9, 4)),
        (lambda: nn.Linear(4, 5, bias=False), (3, 7, 4)),
        (lambda: nn.Conv1d(2, 5, 3, stride=2, padding=1, dilation=2), (3, 2, 11)),
        (lambda: nn.Conv2d(2, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (3, 2, 6, 7)),
        (lambda: nn.Conv2d(2, 5, 1, bias=False), (3, 2, 6, 7)),
        (lambda: nn.Conv3d(2, 5, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    ],
)
def test_rows_are_what_the_weights_met(make: Callable[[], nn.Linear], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = make().double()
    units = torch.tensor([1, 4])
    sample = seen(layer, rand(*shape), units)
    assert sample is not None
    weight = layer.weight.detach().flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias.detach()[:, None]], 1)
    torch.testing.assert_close(sample.inputs @ weight[units].T, sample.outputs)
    torch.testing.assert_close(sample.gradient, sample.outputs)
    assert layer.weight.grad is not None
    own = (sample.gradient.T @ sample.inputs)[:, : layer.weight[0].numel()]
    torch.testing.assert_close(own, layer.weight.grad.flatten(1)[units])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 4, 3, groups=2), (3, 2, 6, 7)),
        (nn.Conv2d(2, 4, 3, padding="same"), (3, 2, 6, 7)),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (3, 2, 6, 7)),
        (nn.ConvTranspose2d(2, 4, 3), (3, 2, 6, 7)),
        (nn.Conv2d(2, 4, 3), (2, 6, 7)),
    ],
)
def test_other_layers_show_nothing(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert seen(layer.double(), rand(*shape), torch.arange(4)) is None


def test_large_passes_are_thinned() -> None:
    x = torch.arange(1000.0).double()[:, None]
    sample = seen(nn.Linear(1, 2).double(), x, torch.arange(2))
    assert sample is not None and len(sample.inputs) == 250
    assert sample.inputs[:3, 0].tolist() == [0, 4, 8]
    images = seen(nn.Conv2d(1, 2, 1).double(), rand(100, 1, 20, 20), torch.arange(2))
    assert images is not None and len(images.inputs) == 25 * 400 // 5


def test_the_latest_pass_of_the_window_is_kept_if_asked_for() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    graph = recycle.trace(net, lambda: net(rand(5, 3)))
    with Tracker(graph, sample_every=1, sample=True) as tracker, Tracker(graph, sample_every=1) as other:
        for seed in range(3):
            x = rand(6, 3, seed=seed)
            net(x).square().sum().backward()
        x_then = x.clone()
        x.zero_()  # a batch's memory may be used again
    sample = tracker.stats(graph["0"]).sample
    assert sample is not None
    assert torch.equal(sample.inputs[:, :3], x_then) and (sample.inputs[:, 3] == 1).all()
    torch.testing.assert_close(sample.outputs, net[0](x_then).detach())  # before the ReLU, which works in place
    assert other.stats(graph["0"]).sample is None
    again = Tracker(graph, sample_every=1, sample=True)
    again.load_state_dict(tracker.state_dict())
    loaded = again.stats(graph["0"]).sample
    assert loaded is not None and torch.equal(loaded.gradient, sample.gradient)
    tracker.clear()
    assert tracker.stats(graph["0"]).sample is None


def test_a_normalisation_behind_the_layer_shows_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    graph = recycle.trace(net, lambda: net(rand(5, 3)))
    with Tracker(graph, sample_every=1, sample=True) as tracker:
        net(rand(6, 3)).square().sum().backward()
    assert tracker.stats(graph["0"]).sample is None


def test_keeping_a_sample_changes_nothing() -> None:
    found = []
    for watch in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
        graph = recycle.trace(net, lambda: net(torch.ones(2, 1, 3, 3)))  # noqa: B023
        tracker = Tracker(graph, sample_every=1, sample=True, firing=True)
        if watch:
            tracker.attach()
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(4, 1, 3, 3)).square().mean().backward()
            optimizer.step()
        found.append([*net.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------- moving apart along a direction


def parts(along: list[float], bias: bool = True) -> list[tuple[list[float], float | None]]:
    """Row and bias of parent and newborn: the parent's were (3, 4) and 1, the noise is a tenth."""
    net = nn.Sequential(nn.Linear(2, 3, bias=bias), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight[0] = torch.tensor([3.0, 4.0])
        if bias:
            net[0].bias[0] = 1.0
        net[2].weight[0] = torch.tensor([6.0, 0.5, 0.0])
    kept = net[0].weight[1].clone()
    adam = torch.optim.Adam(net.parameters())
    net(rand(4, 2)).sum().backward()
    adam.step()
    with torch.no_grad():
        net[0].weight[0] = torch.tensor([3.0, 4.0])
        if bias:
            net[0].bias[0] = 1.0
        net[2].weight[0] = torch.tensor([6.0, 0.5, 0.0])
        net[0].weight[1] = kept
    group = recycle.trace(net, lambda: net(rand(4, 2)))["0"]
    recycle.apply(Split([0], into=[2], noise=0.1, along=[along]), group, optimizers=[adam])
    assert net[2].weight[0].tolist() == [3.0, 0.5, 3.0]
    assert torch.equal(net[0].weight[1], kept)
    assert not adam.state[net[0].weight]["exp_avg"][2].any() and adam.state[net[0].weight]["step"] == 1
    return [(net[0].weight[u].tolist(), net[0].bias[u].item() if bias else None) for u in (0, 2)]


def test_halves_move_apart_along_the_direction_by_hand() -> None:
    """A tenth of the row's length of 5 is .5; along (.8, -.6) it comes to (.4, -.3)."""
    expected = [[2.6, 4.3], [3.4, 3.7]]
    for (row, bias), by_hand in zip(parts([4.0, -3.0, 0.0]), expected, strict=True):
        assert row == pytest.approx(by_hand) and bias == 1
    assert parts([0.0, 0.0, -7.0]) == [([3, 4], 1.5), ([3, 4], 0.5)]
    assert [row for row, _ in parts([4.0, -3.0], bias=False)] == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(
    ("along", "reason"),
    [
        ([[1.0, 2.0]], "1 directions of 3 numbers for '0', got \\[2\\]"),
        ([[1.0, 2.0, 3.0]] * 2, "1 directions of 3 numbers for '0', got \\[3, 3\\]"),
        ([[0.0, 0.0, 0.0]], "not zero"),
        ([[math.nan, 0.0, 1.0]], "finite"),
    ],
)
def test_directions_that_do_not_fit_are_refused(along: list[list[float]], reason: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    group = recycle.trace(net, lambda: net(torch.ones(1, 2)))["0"]
    with pytest.raises(NotRecyclable, match=reason):
        recycle.apply(Split([0], into=[2], noise=0.1, along=along), group)


def test_directions_of_units_with_more_than_a_weight_and_a_bias_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    group = recycle.trace(net, lambda: net(torch.ones(4, 2)))["0"]
    with pytest.raises(NotRecyclable, match="one weight and at most a bias; '0' has more"):
        recycle.apply(Split([0], into=[2], noise=0.1, along=[[1.0, 1.0, 1.0]]), group)


def test_a_split_along_a_direction_is_data() -> None:
    edit = Split([0, 1], into=[2, 3], noise=0.1, along=torch.eye(2).tolist())
    assert edit == Split([0, 1], into=[2, 3], noise=0.1, along=[[1, 0], [0, 1]])
    assert edit.only({3}) == Split([1], into=[3], noise=0.1, along=[[0, 1]])
    assert recycle.edits.describe(edit)["along"] == "given"
