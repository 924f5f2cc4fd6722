"""Grow by folding: each step against a case worked out by hand, and the whole on traced networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from agents.experiments.folding import initial, train
from agents.experiments.folding import mistakes as experiment
from recycle.clusters import weighted_kmeans
from recycle.folding import (
    Creases,
    Direction,
    Examples,
    Mistakes,
    boundary,
    fold,
    fold_point,
    segment,
    steepest,
    typical,
    unexplained,
)
from recycle.graph import NotRecyclable
from recycle.methods.folding import Folding
from recycle.methods.grow import Growth
from recycle.methods.l2_init import L2Init
from recycle.methods.together import check_together
from recycle.mistakes import _Outgoing, _unexplained, mistakes_of
from recycle.track import Tracker


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.double)


def mlp(*widths: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b, bias=bias or i > 0), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def classified(net: nn.Module, x: Tensor, y: Tensor) -> Examples:
    def examples() -> tuple[Tensor, Tensor, Tensor]:
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y, reduction="none"), y

    return examples


X = rand(60, 2)
Y = (X[:, 1] > (2 * X[:, 0]).sin()).long()


# ---------------------------------------------------------------- weighted k-means


def test_centroids_are_weighted_means_and_weightless_points_say_nothing() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [500.0]], dtype=torch.double)[None]
    weights = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]], dtype=torch.double)
    members, centroids = weighted_kmeans(points, weights, 2, generator=seeded())
    assert sorted(centroids[0, :, 0].tolist()) == pytest.approx([0.25, 10.5])
    first = members[0].tolist()
    assert first[0] == first[1] != first[2] == first[3]


def test_clouds_are_clustered_each_for_itself_and_end_at_a_fixed_point() -> None:
    points, weights = rand(3, 40, 2), rand(3, 40, seed=1).abs()
    members, centroids = weighted_kmeans(points, weights, 4, generator=seeded())
    for cloud in range(3):
        for cluster in range(4):
            inside = members[cloud] == cluster
            mean = (weights[cloud, inside, None] * points[cloud, inside]).sum(0) / weights[cloud, inside].sum()
            assert torch.allclose(centroids[cloud, cluster], mean)
        gaps = torch.cdist(points[cloud], centroids[cloud])
        assert torch.equal(gaps.argmin(1), members[cloud])


def test_a_cluster_without_weight_begins_anew_where_most_is_to_win() -> None:
    points = torch.tensor([[0.0], [0.0], [0.0], [5.0]], dtype=torch.double)[None]
    weights = torch.tensor([[1.0, 1.0, 1.0, 1e-300]], dtype=torch.double)  # all chances on one point
    _, centroids = weighted_kmeans(points, weights, 2, generator=seeded())
    assert sorted(centroids[0, :, 0].tolist()) == [0.0, 5.0]


@pytest.mark.parametrize(("clusters", "weight"), [(0, 1.0), (4, 1.0), (2, -1.0), (2, math.nan)])
def test_kmeans_refuses_what_it_cannot_do(clusters: int, weight: float) -> None:
    with pytest.raises(ValueError, match="weighted_kmeans needs"):
        weighted_kmeans(torch.zeros(1, 3, 2), torch.tensor([[1.0, 1.0, weight]]), clusters)


def test_the_typical_instance_is_the_mispredicted_one_in_the_middle_of_the_worst_cluster() -> None:
    """Two clouds, the right one with the larger losses; its middle point is predicted rightly."""
    left = torch.tensor([[-10.0, 0.0], [-10.1, 0.0], [-9.9, 0.0]])
    right = torch.tensor([[10.0, 0.0], [9.0, 0.0], [11.5, 0.0]])
    x = torch.cat([left, right])[None].double()
    losses = torch.tensor([[0.2, 0.1, 0.1, 1.0, 1.0, 1.0]])
    wrong = torch.tensor([[True, False, False, False, True, True]])
    rows, there = typical(x, losses, wrong, clusters=2, generator=seeded())
    assert rows.tolist() == [[4, 0]] and there.all()
    _, none = typical(x, losses, torch.zeros_like(wrong), clusters=2, generator=seeded())
    assert not none.any()


# ---------------------------------------------------------------- segment, boundary, fold point


@pytest.mark.parametrize("widths", [(2, 3, 2), (3, 5, 4, 3, 2)])
def test_a_segment_is_the_affine_map_that_is_active_at_the_point(widths: tuple[int, ...]) -> None:
    net, x = mlp(*widths), rand(6, widths[0], seed=2)
    weight, bias = segment(net, x)
    for i, point in enumerate(x):
        assert torch.allclose(weight[i], torch.autograd.functional.jacobian(net, point))  # type: ignore[no-untyped-call]
    assert torch.allclose((weight @ x[:, :, None])[:, :, 0] + bias, net(x))
    near = x + 1e-9 * rand(6, widths[0], seed=3)
    assert torch.allclose((weight @ near[:, :, None])[:, :, 0] + bias, net(near), atol=1e-12)


def test_a_segment_of_a_shallow_network_is_the_documents_formula() -> None:
    net, x = mlp(2, 4, 2), rand(5, 2)
    (wa, ba), (wb, bb) = [(net[i].weight, net[i].bias) for i in (0, 2)]
    weight, bias = segment(net, x)
    for i, point in enumerate(x):
        active = torch.diag((wa @ point + ba > 0).double())
        assert torch.allclose(weight[i], wb @ active @ wa) and torch.allclose(bias[i], wb @ active @ ba + bb)


def test_boundaries_of_classes_logits_and_regressions() -> None:
    outputs = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    a, offset, wrong = boundary(outputs, torch.tensor([1, 1]))
    assert a.tolist() == [[1, -1, 0], [0, 1, -1]] and offset.tolist() == [0, 0] and wrong.tolist() == [True, False]
    a, offset, wrong = boundary(torch.tensor([[2.0], [-1.0]]), torch.tensor([0, 0]))
    assert a.tolist() == [[1], [1]] and offset.tolist() == [0, 0] and wrong.tolist() == [True, False]
    a, offset, wrong = boundary(outputs, torch.tensor([[3.0, 0.0, 2.0], [0.0, 5.0, 1.0]]))
    assert a[0].tolist() == [0, 1, 0] and offset[0] == 0 and wrong.tolist() == [True, False]
    a, offset, _ = boundary(outputs[:, :1], torch.tensor([[1.5], [0.0]]))
    assert ((a * outputs[:, :1]).sum(1) + offset).tolist() == [1.5, 0]


def test_the_fold_point_is_the_nearest_zero_of_the_segment() -> None:
    normal, offset = torch.tensor([[3.0, 4.0]]).double(), 5.0
    instance = torch.tensor([[2.0, 1.0]]).double()
    point, reached, alive = fold_point(lambda x: (normal * x).sum(1) + offset, instance)
    assert torch.allclose(point, torch.tensor([[0.2, -1.4]]).double()) and reached.all() and alive.all()


def test_a_boundary_that_comes_before_the_segments_zero_is_the_fold_point() -> None:
    """The function falls faster behind its hinge at x = 1, so it is zero at 1.25, not at 2."""
    slope = torch.tensor([[1.0, 0.0]]).double()

    def margin(x: Tensor) -> Tensor:
        first = (slope * x).sum(1)
        return 2 - first - 3 * (first - 1).relu()

    point, reached, _ = fold_point(margin, torch.zeros(1, 2).double())
    assert torch.allclose(point, torch.tensor([[1.25, 0.0]]).double(), atol=1e-9) and reached.all()


def test_a_segment_whose_zero_is_none_is_flagged_and_a_dead_one_too() -> None:
    def margin(x: Tensor) -> Tensor:  # stays above 0.5 in the first net, is constant in the second
        return torch.stack([(1 - x[0, 0]).clamp_min(0.5), 1 + 0 * x[1, 0]])

    point, reached, alive = fold_point(margin, torch.zeros(2, 1).double())
    assert point[0].item() == 1 and reached.tolist() == [False, False] and alive.tolist() == [True, False]


@pytest.mark.parametrize("seed", range(5))
def test_fold_points_of_networks_lie_on_their_boundaries(seed: int) -> None:
    net, x = mlp(2, 8, 6, 2, seed=seed), rand(200, 2, seed=seed)
    outputs = net(x)

    def margin(points: Tensor) -> Tensor:
        out = net(points)
        return out[:, 0] - out[:, 1]

    point, reached, alive = fold_point(margin, x)
    assert reached.any() and (alive | ~reached).all()
    assert margin(point)[reached].abs().max() < 1e-7 * (outputs[:, 0] - outputs[:, 1]).abs().max()
    straight = torch.linspace(0, 1, 50)[1:-1]  # no other zero on the way, but for what the grid of 32 may miss
    before = torch.stack([margin(x + t * (point - x)) * margin(x) > -1e-9 for t in straight])
    assert before.all(0)[reached].double().mean() > 0.97


# ---------------------------------------------------------------- the direction


def hinge_score(x: Tensor, slopes: Tensor, point: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda u: (((x - point) @ u.mT).relu().mT @ slopes / len(x)).square().sum(2)


@pytest.mark.parametrize("seed", range(4))
def test_the_direction_in_the_plane_is_as_good_as_a_fine_scan_and_active_at_the_instance(seed: int) -> None:
    x, slopes = rand(80, 2, seed=seed), rand(80, 2, seed=seed + 9) + 1
    toward = rand(1, 2, seed=seed + 5)
    score = hinge_score(x, slopes, rand(1, 2, seed=seed + 7))
    found = steepest(score, toward)
    angle = torch.linspace(0, 2 * torch.pi, 20_001).double()
    scanned = torch.stack([angle.cos(), angle.sin()], 1)[None]
    facing = (scanned @ toward[0])[0] / toward.norm()
    best = torch.where(facing > 0.05, score(scanned)[0], -1).max()  # the scan's step is 2.8 degrees, sin 2.8 = .05
    assert (found * toward).sum() > 0 and found.norm().item() == pytest.approx(1)
    assert score(found[:, None])[0, 0] >= 0.97 * best


def test_the_ascent_in_more_dimensions_beats_thousands_of_random_directions() -> None:
    x, slopes, toward = rand(100, 6), rand(100, 3, seed=1) + 0.5, rand(1, 6, seed=2)
    score = hinge_score(x, slopes, rand(1, 6, seed=3))
    found = steepest(score, toward, generator=seeded())
    tried = F.normalize(rand(1, 20_000, 6, seed=4), dim=2)
    best = torch.where((tried @ toward[0])[0] > 0, score(tried)[0], -1).max()
    assert (found * toward).sum() > 0
    assert score(found[:, None])[0, 0] >= 0.999 * best


def test_directions_within_a_hyperplane_stay_in_it() -> None:
    x, slopes, normal = rand(50, 5), rand(50, 2, seed=1), rand(1, 5, seed=2)
    found = steepest(hinge_score(x, slopes, torch.zeros(1, 5)), normal, within=normal, active=False, generator=seeded())
    assert (found * normal).sum().abs() < 1e-12 and found.norm().item() == pytest.approx(1)


# ---------------------------------------------------------------- several units at one event


def test_what_is_unexplained_is_the_rest_of_the_least_squares() -> None:
    slopes, acts = rand(3, 40, 2), rand(3, 40, 4, seed=1).relu()
    acts[1, :, 2] = acts[1, :, 0]  # twins
    acts[2, :, 3] = 0  # no unit at all
    left = unexplained(slopes, acts)
    assert (acts.mT @ left).abs().max() < 1e-10 and (slopes.mT @ left - left.mT @ left).abs().max() < 1e-8
    assert torch.equal(unexplained(slopes, acts[:, :, :0]), slopes)
    best = torch.linalg.lstsq(acts[0], slopes[0]).solution
    assert torch.allclose(left[0], slopes[0] - acts[0] @ best)


def side_by_side(seed: int = 0) -> tuple[Mistakes, Tensor, Tensor]:
    """Twelve small networks at once, their points and the slopes of their losses."""
    x = rand(80, 2, seed=seed)
    y = (x[:, 1] > (2 * x[:, 0]).sin()).long()
    nets = train(initial(12, 2, seeded(seed)), x.float(), y, 60).of(slice(None))
    slopes = (nets(x).softmax(2) - F.one_hot(y, 2)) / len(x)
    return experiment(nets, x, y), x, slopes


def explained(x: Tensor, slopes: Tensor, made: Creases) -> Tensor:
    """Part of each network's slopes that its new units explain together."""
    acts = (x @ made.weight.mT + made.bias[:, None]).relu()
    return 1 - unexplained(slopes, acts).square().sum((1, 2)) / slopes.square().sum((1, 2))


def test_units_of_one_cluster_do_not_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same typical instance for both, the second one is the best for what the first leaves."""
    seen, x, slopes = side_by_side()
    one = fold(seen, generator=seeded())
    worst = one.typical[:, 0].clamp_min(0)
    monkeypatch.setattr(
        "recycle.folding.typical", lambda *_, **__: (torch.stack([worst] * 2, 1), torch.stack([one.found[:, 0]] * 2, 1))
    )
    apart = fold(seen, 2, generator=seeded())
    alike = fold(dataclasses.replace(seen, beside=lambda rows: seen.score), 2, generator=seeded())
    found = apart.found.all(1)
    assert found.sum() >= 10 and torch.equal(apart.weight[:, 0], one.weight[:, 0])
    assert torch.equal(alike.weight[found, 0], alike.weight[found, 1])  # what it was for
    first, second = apart.weight[found].unbind(1)
    assert (F.cosine_similarity(first, second) < 0.999).double().mean() > 0.8  # one direction may be best for both
    assert (explained(x, slopes, apart) >= explained(x, slopes, alike) - 1e-9)[found].all()
    rest = unexplained(slopes, (x @ apart.weight[:, :1].mT + apart.bias[:, None, :1]).relu())
    directions = F.normalize(apart.weight[:, 1:], dim=2)
    points = apart.point[:, 1]
    told = seen.beside(torch.cat([apart.weight[:, :1], apart.bias[:, :1, None]], 2))(points, directions)
    acts = ((x - points[:, None]) @ directions.mT).relu()
    assert torch.allclose(told, (acts.mT @ rest).square().sum(2))


def test_the_second_unit_is_the_best_for_what_the_first_leaves() -> None:
    """The first is as before, and so is the fold point of the second: another direction goes through it."""
    seen, _, _ = side_by_side()
    apart = fold(seen, 2, generator=seeded())
    alike = fold(dataclasses.replace(seen, beside=lambda rows: seen.score), 2, generator=seeded())
    both = apart.found.all(1)
    assert torch.equal(apart.weight[:, 0], alike.weight[:, 0]) and torch.equal(apart.point, alike.point)
    left = seen.beside(torch.cat([apart.weight[:, :1], apart.bias[:, :1, None]], 2))
    ours, theirs = (left(apart.point[:, 1], F.normalize(made.weight[:, 1:], dim=2))[both, 0] for made in (apart, alike))
    assert (ours >= theirs * (1 - 1e-9)).all() and (ours > 1.01 * theirs).any() and both.sum() >= 6


# ---------------------------------------------------------------- on traced networks


def mistakes(net: nn.Module, examples: Examples, name: str = "0", x: Tensor = X) -> Mistakes:
    return mistakes_of(recycle.trace(net, lambda: net(x))[name], examples)


def test_scores_and_margins_of_a_traced_network_are_the_formulas() -> None:
    net = mlp(2, 3, 2)
    seen = mistakes(net, classified(net, X, Y))
    outputs = net(X)
    assert torch.equal(seen.inputs[0], X)
    assert torch.allclose(seen.losses[0], F.cross_entropy(outputs, Y, reduction="none"))
    assert torch.equal(seen.wrong[0], outputs.argmax(1) != Y)
    slopes = (outputs.softmax(1) - F.one_hot(Y, 2)).detach()
    point, directions = rand(1, 2, seed=4), F.normalize(rand(1, 7, 2, seed=5), dim=2)  # more than the layer has units
    assert torch.allclose(seen.score(point, directions), hinge_score(X, slopes, point)(directions))
    row = torch.tensor([7])
    a, _, _ = boundary(outputs, Y)
    assert seen.margin(row, point).item() == pytest.approx(float((a[7] @ net(point)[0]).detach()))
    assert seen.length.item() == pytest.approx(float(net[0].weight.detach().norm(dim=1).mean()))


def conv_case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = rand(12, 1, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    ).double()  # fmt: skip
    return net, x, torch.arange(12) % 2


@pytest.mark.parametrize("name", ["0", "3"])
def test_a_convolutions_score_is_the_gradient_that_the_grown_network_has(name: str) -> None:
    """By growing the unit for good, and reading the gradient of its outgoing weights."""
    net, x, y = conv_case()
    graph = recycle.trace(net, lambda: net(x))
    seen = mistakes_of(graph[name], classified(net, x, y))
    point = seen.inputs[:, 11]
    direction = F.normalize(rand(1, 1, seen.inputs.shape[2], seed=3), dim=2)
    told = seen.score(point, direction)
    group = graph[name]

    def birth(newborns: Any) -> tuple[Tensor, ...]:
        rows = {"weight": direction, "bias": -(direction[0, 0] * point[0]).sum().reshape(1, 1, 1)}
        return tuple(rows[axis.role] for axis in newborns.axes)

    recycle.apply(recycle.Grow(1, birth), group)
    F.cross_entropy(net(x), y).backward()
    (axis,) = group.outgoing
    grad = group.tensor(axis.name).grad
    assert grad is not None
    assert told.item() == pytest.approx(float(axis.read(grad, torch.tensor([group.width - 1])).square().sum()))
    assert told.item() > 0


def test_a_unit_beside_others_is_scored_on_what_they_leave() -> None:
    net = mlp(2, 3, 2)
    seen = mistakes(net, classified(net, X, Y))
    slopes = (net(X).softmax(1) - F.one_hot(Y, 2)).detach()
    rows = rand(1, 4, 3, seed=7)  # more than the layer has units
    acts = (X @ rows[0, :, :2].T + rows[0, :, 2]).relu()
    rest = slopes - acts @ torch.linalg.lstsq(acts, slopes).solution
    point, directions = rand(1, 2, seed=4), F.normalize(rand(1, 7, 2, seed=5), dim=2)
    told = seen.beside(rows)(point, directions)
    assert torch.allclose(told, hinge_score(X, rest, point)(directions), rtol=1e-4)
    assert torch.allclose(seen.beside(torch.zeros(1, 2, 3).double())(point, directions), seen.score(point, directions))


@pytest.mark.parametrize("name", ["0", "3"])
def test_beside_a_convolutions_unit_its_copy_is_worth_nothing(name: str) -> None:
    """The next layer is a convolution with a weight for each place of the kernel, or reads the channel flattened."""
    net, x, y = conv_case()
    seen = mistakes(net, classified(net, x, y), name, x)
    point = seen.inputs[:, 11]
    directions = F.normalize(rand(1, 3, seen.inputs.shape[2], seed=3), dim=2)
    first = torch.cat([directions[:, :1], -(directions[:, :1] * point[:, None]).sum(2, keepdim=True)], 2)
    alone, beside = seen.score(point, directions)[0], seen.beside(2.5 * first)(point, directions)[0]
    assert beside[0] < 1e-12 * alone[0]
    assert (beside[1:] > 1e-3 * alone[1:]).all() and not torch.allclose(beside[1:], alone[1:], rtol=1e-3)


def test_what_a_convolution_leaves_is_the_rest_of_the_least_squares() -> None:
    net, x, _ = conv_case()
    graph = recycle.trace(net, lambda: net(x))
    (axis,), read = graph["0"].outgoing, rand(12, 3, 4, 4, seed=5)
    outgoing = _Outgoing(net[3], axis, read, 2)
    shape = axis.read(net[3].weight.detach(), torch.arange(2)).shape
    every = torch.eye(shape.numel(), dtype=torch.double).view(-1, *shape)
    images = torch.stack([outgoing.image(one).flatten() for one in every], 1)
    slope = rand(12, 4, 2, 2, seed=6)
    assert torch.allclose(outgoing.gradient(slope).flatten(), images.T @ slope.flatten())
    wanted = slope.flatten() - images @ torch.linalg.lstsq(images, slope.flatten()[:, None]).solution[:, 0]
    assert torch.allclose(_unexplained(slope, [outgoing]).flatten(), wanted, atol=1e-6)


def test_a_convolutions_margin_moves_one_patch() -> None:
    net, x, y = conv_case()
    seen = mistakes(net, classified(net, x, y), x=x)
    a, _, _ = boundary(net(x), y)
    row = torch.tensor([64 * 5 + 9])
    same = seen.margin(row, seen.inputs[:, row[0]])
    assert same.item() == pytest.approx(float((a[5] @ net(x)[5]).detach()))
    far = seen.margin(row, seen.inputs[:, row[0]] + 50)
    z = net[0](x[5:6]).detach()
    z[0, :, 1, 1] += net[0].weight.flatten(1).sum(1).detach() * 50
    assert far.item() == pytest.approx(float((a[5] @ net[1:](z)[0]).detach()))


def trained(net: nn.Module, examples: Examples, method: Folding, steps: int = 3) -> tuple[recycle.Recycler, Any]:
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    recycler = recycle.Recycler(recycle.trace(net, examples), method, optimizers=[adam], sample_every=1)
    for _ in range(steps):
        with recycler.listening():
            examples()[1].mean().backward()
        adam.step()
        adam.zero_grad()
    return recycler, adam


@pytest.mark.parametrize("direction", ["gradient", "toward", "tangent", "origin"])
def test_a_fold_leaves_the_output_as_it_was_and_puts_the_hinge_through_the_fold_point(direction: Direction) -> None:
    net = mlp(2, 3, 2)
    examples = classified(net, X, Y)
    recycler, _ = trained(net, examples, Folding(examples, direction=direction))
    made = fold(mistakes(net, examples), direction=direction, generator=seeded())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    before = net(X)
    report = recycler.step()
    assert report.edits and net[0].out_features == 4
    assert (net(X) - before).abs().max() <= 1e-15
    weight, bias = net[0].weight[3].detach(), net[0].bias[3].detach()
    assert not net[2].weight[:, 3].any()
    assert torch.equal(net[0].weight[:3], state["0.weight"]) and torch.equal(net[2].weight[:, :3], state["2.weight"])
    assert made.found.all() and made.reached.all()
    point, instance = made.point[0, 0], made.instance[0, 0]
    assert abs(float(weight @ point + bias)) < 1e-7
    assert weight.norm().item() == pytest.approx(float(state["0.weight"].norm(dim=1).mean()))
    active = float(weight @ instance + bias)
    assert abs(active) < 1e-7 if direction == "tangent" else active > 0
    assert direction != "origin" or abs(float(bias)) == 0


def test_training_goes_on_and_the_newborn_learns() -> None:
    net = mlp(2, 2, 2)
    examples = classified(net, X, Y)
    recycler, adam = trained(net, examples, Folding(examples, most=3))
    recycler.step()
    for _ in range(2):
        with recycler.listening():
            examples()[1].mean().backward()
        adam.step()
        adam.zero_grad()
    assert net[2].weight[:, 2].abs().min() > 0
    assert recycler.step().groups["0"].note == "'0' has 3 units, and most=3"


def test_every_layer_of_a_deep_network_and_of_a_convolutional_one_can_be_folded() -> None:
    deep = mlp(2, 4, 3, 2)
    net, x, y = conv_case()
    for each, examples in ((deep, classified(deep, X, Y)), (net, classified(net, x, y))):
        recycler, _ = trained(each, examples, Folding(examples, count=2, sample=64), steps=1)
        before = examples()[0].detach()
        report = recycler.step()
        assert [name for name, _ in report.edits] == [group.name for group in recycler.graph]
        assert all(isinstance(edit, recycle.Grow) and edit.count in (1, 2) for _, edit in report.edits)
        assert (examples()[0] - before).abs().max() <= 1e-14


def test_a_critic_is_folded_where_its_td_error_is() -> None:
    net = mlp(2, 4, 1)
    target = (3 * X[:, 0]).sin()

    def examples() -> tuple[Tensor, Tensor, Tensor]:
        value = net(X)[:, 0]
        return value, (value - target).abs(), target

    seen = mistakes(net, examples)
    made = fold(seen, generator=seeded())
    row = int(made.typical[0, 0])
    assert torch.allclose(seen.margin(made.typical[0], X[row][None]), net(X[row]) - target[row])
    if bool(made.reached):
        assert net(made.point[0, 0]).item() == pytest.approx(float(target[row]), abs=1e-6)
    assert made.found.all()


class ActorAndCritics(nn.Module):
    """A shared layer, an actor that reads it, and twin critics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.actor, self.act = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.critics = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(2))
        self.double()

    def values(self, x: Tensor) -> Tensor:
        seen = self.shared(x).relu()
        return torch.cat([critic(seen) for critic in self.critics], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(self.actor(self.shared(x).relu()).relu()), self.values(x)


def test_each_of_twin_critics_is_folded_by_its_own_error_and_an_actor_not_at_all() -> None:
    net = ActorAndCritics()
    targets = torch.stack([(3 * X[:, 0]).sin(), 100 + X[:, 1]], 1)  # the second is always further off

    def examples() -> tuple[Tensor, Tensor, Tensor]:
        values = net.values(X)
        return values, (values - targets).abs().mean(1), targets

    graph = recycle.trace(net, lambda: net(X))
    for column in (0, 1):
        seen = mistakes_of(graph[f"critics.{column}.0"], examples)
        row = torch.tensor([3])
        error = net.values(X)[3, column] - targets[3, column]
        assert seen.margin(row, seen.inputs[:, 3]).item() == pytest.approx(float(error.detach()))
        assert fold(seen, generator=seeded()).found.all()
    assert fold(mistakes_of(graph["shared"], examples), generator=seeded()).found.all()  # the actor reads it too
    with pytest.raises(NotRecyclable, match="no example is mispredicted because of 'actor'"):
        mistakes_of(graph["actor"], examples)


def test_looking_for_a_fold_leaves_no_mark() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    examples = classified(net, X, Y)
    graph = recycle.trace(net, lambda: net(X))
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in net.state_dict().items()}
    fold(mistakes_of(graph["0"], examples), generator=seeded())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())
    assert not net[0]._forward_hooks and not net[3]._forward_hooks


# ---------------------------------------------------------------- deepening behind a fold


def test_a_layer_that_is_folded_gets_an_identity_behind_it_as_often_as_allowed() -> None:
    net = mlp(2, 3, 2)
    examples = classified(net, X, Y)
    recycler, adam = trained(net, examples, Folding(examples, deepen=2))
    depths: list[list[str]] = []
    for _ in range(3):
        before = examples()[0].detach()
        report = recycler.step()
        assert report.edits and (examples()[0] - before).abs().max() <= 1e-14
        assert report.interventions == (
            (recycle.Deepen([name for name, _ in report.edits]),) if len(depths) < 2 else ()
        )
        depths.append([group.name for group in recycler.graph])
        with recycler.listening():
            examples()[1].mean().backward()
        adam.step()
    assert depths == [["0", "2"], ["0", "2", "4", "6"], ["0", "2", "4", "6"]]
    assert [layer.out_features for layer in net[::2]] == [6, 6, 6, 6, 2]  # what is inserted is folded next time
    assert recycler.deepened == 2


def test_only_layers_that_were_folded_are_deepened_and_a_resumed_run_knows_how_many_there_are() -> None:
    net = mlp(2, 4, 3, 2)
    examples = classified(net, X, Y)
    recycler, adam = trained(net, examples, Folding(examples, most=4, deepen=1))
    report = recycler.step()
    assert [name for name, _ in report.edits] == ["2"] and report.interventions == (recycle.Deepen(["2"]),)
    assert [layer.out_features for layer in net[::2]] == [4, 4, 4, 2]
    method = Folding(examples, deepen=1)
    resumed = recycle.Recycler(recycle.trace(net, examples), method, optimizers=[adam], sample_every=1)
    resumed.load_state_dict(recycler.state_dict())
    with resumed.listening():
        examples()[1].mean().backward()
    adam.step()
    report = resumed.step()
    assert len(report.edits) == 3 and not report.interventions and not report.note


def test_a_fold_that_was_not_made_deepens_nothing() -> None:
    net = mlp(2, 3, 2)
    examples = classified(net, X, Y)
    adam, other = torch.optim.Adam(net.parameters()), torch.optim.LBFGS(net.parameters())
    recycler = recycle.Recycler(
        recycle.trace(net, examples), Folding(examples, deepen=1), optimizers=[adam, other], sample_every=1
    )
    with recycler.listening():
        examples()[1].mean().backward()
    other.state[net[0].weight]["d"] = torch.zeros(5)  # a history that cannot be resized
    report = recycler.step()
    assert report.groups["0"].note and not report.edits and not report.interventions and net[0].out_features == 3


def test_where_no_identity_can_be_the_fold_stays_and_the_report_says_why() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(), nn.Linear(3, 2)).double()
    examples = classified(net, X, Y)
    recycler, _ = trained(net, examples, Folding(examples, deepen=1))
    report = recycler.step()
    assert net[0].out_features == 4 and len(net) == 3
    assert not report.interventions and "LeakyReLU is not the identity" in report.note


def test_deepening_is_refused_where_it_would_be_ignored_or_undone() -> None:
    for options in ({"deepen": -1}, {"deepen": True}):
        with pytest.raises((ValueError, TypeError), match="deepen"):
            Folding(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deepen of Folding would be ignored"):
        Growth(Folding(deepen=1))
    with pytest.raises(ValueError, match="inserted ones begin later"):
        check_together([Folding(deepen=1), L2Init()])
    check_together([Folding(), L2Init()])


# ---------------------------------------------------------------- what cannot be folded, and says so


def test_looking_for_a_fold_is_no_training_pass() -> None:
    net = mlp(2, 8, 8, 3)
    examples = classified(net, X, Y)
    graph = recycle.trace(net, lambda: net(X))
    sgd = torch.optim.SGD(net.parameters())
    with Tracker(graph, optimizers=[sgd], sample_every=1) as tracker:
        examples()[1].mean().backward()
        before = [tracker.stats(group) for group in graph]
        assert fold(mistakes_of(graph["0"], examples)).found.any()
        after = [tracker.stats(group) for group in graph]
    assert [seen.samples for seen in before] == [seen.samples for seen in after] == [len(X)] * 2
    assert all(torch.equal(one.gradient, other.gradient) for one, other in zip(before, after, strict=True))


def note(net: nn.Module, examples: Examples, **options: Any) -> str:
    recycler, _ = trained(net, examples, Folding(examples, **options))
    report = recycler.step()
    assert not report.edits
    return report.groups["0"].note


def test_without_examples_it_says_what_is_missing_and_does_nothing() -> None:
    net = mlp(2, 3, 2)
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(X)), Folding(), sample_every=1)
    with recycler.listening():
        net(X)
    report = recycler.step()
    assert report.edits == ()
    assert report.groups["0"].note == (
        "needs mistakes, which was not observed: pass examples=..., a function that returns outputs, losses and targets"
    )


def test_a_recycler_has_examples_for_a_method_that_was_given_none() -> None:
    net = mlp(2, 3, 2)
    examples = classified(net, X, Y)
    called: list[str] = []

    def said(name: str) -> Examples:
        return lambda: called.append(name) or examples()  # type: ignore[func-returns-value]

    for method in (Folding(), Folding(said("the method's"))):
        recycler = recycle.Recycler(recycle.trace(net, lambda: net(X)), method, sample_every=1, examples=said("own"))
        with recycler.listening():
            net(X)
        width, before = net[0].out_features, net(X)
        with pytest.warns(UserWarning, match="optimizer"):
            assert len(recycler.step().edits) == 1
        assert net[0].out_features == width + 1 and (net(X) - before).abs().max() <= 1e-15
        assert set(called) == {"own" if method.examples is None else "the method's"}
        called.clear()


def test_examples_that_cannot_be_had_say_why() -> None:
    def none() -> Any:
        raise NotRecyclable("nobody has seen anything")

    net = mlp(2, 3, 2)
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(X)), Folding(), sample_every=1, examples=none)
    with recycler.listening():
        net(X)
    assert recycler.step().groups["0"].note == "nobody has seen anything"


def test_nothing_mispredicted_is_nothing_to_fold() -> None:
    net = mlp(2, 3, 2)
    x = X[:8]

    def examples() -> tuple[Tensor, Tensor, Tensor]:
        outputs = net(x)
        y = outputs.argmax(1)
        return outputs, F.cross_entropy(outputs, y, reduction="none"), y

    assert note(net, examples) == "none of the 8 examples looked at is mispredicted: there is nothing to fold"


def test_a_dead_segment_has_no_fold_point() -> None:
    net = mlp(2, 3, 2)
    with torch.no_grad():
        net[0].bias.fill_(-1e3)
    assert note(net, classified(net, X, Y)).startswith("no fold point: ") and net[0].out_features == 3


def tanh() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (tanh, "folding needs units with a hinge"),
        (normalised, "folding needs units with one weight and at most a bias; '0' has 0.weight"),
        (lambda: mlp(2, 3, 2, bias=False), "'0' has no bias to put a hinge on the boundary: pass direction='origin'"),
    ],
)
def test_layers_that_cannot_be_folded_are_refused_by_reason(net: Callable[[], nn.Sequential], reason: str) -> None:
    made = net()
    assert note(made, classified(made, X, Y)).startswith(reason)


def test_examples_that_are_not_as_expected_are_refused_by_reason() -> None:
    net = mlp(2, 3, 2)

    def others() -> tuple[Tensor, Tensor, Tensor]:
        return classified(net, torch.rand(9, 2).double(), torch.arange(9) % 2)()

    seen = mistakes(net, others)  # drawn from torch's global generator: the same each time, since it is put back
    assert seen.score(torch.zeros(1, 2).double(), torch.ones(1, 1, 2).double()).shape == (1, 1)
    calls = iter(range(100))
    moving = mistakes(net, lambda: classified(net, X + next(calls), Y)())
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: moving.margin(torch.tensor([0]), X[:1]), "must run the same ones"),
        (lambda: mistakes(net, lambda: (net(X), net(X).sum(1), Y)), "runs '0' 2 times"),
        (lambda: mistakes(net, lambda: (torch.ones(3, 2), torch.ones(3), Y[:3])), "because of '0': examples"),
        (lambda: mistakes(net, lambda: net(X)), "must return three tensors"),
        (lambda: mistakes(net, lambda: (net(X), torch.tensor(1.0), Y)), "losses \\(examples,\\), got"),
        (lambda: mistakes(net, lambda: (net(X), X.exp()[:, 0], Y.double())), "targets are integers"),
        (lambda: mistakes(net, lambda: (net(X), -X[:, 0].exp(), Y)), "finite and not negative"),
        (lambda: mistakes(net, lambda: (net(X), X[:, 0].exp(), Y)), "requires_grad=False"),
    ]
    for call, reason in wrong:
        with pytest.raises(NotRecyclable, match=reason):
            call()


@pytest.mark.parametrize("options", [{"direction": "up"}, {"count": 0}, {"clusters": 0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"folding (has|needs)"):
        Folding(**options)
