"""Self-expanding networks: what is kept of a pass, which layer widens, and that the output stays."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Deepen, Grow, NotRecyclable, Recycler
from recycle.activations import KNOWN, recognised
from recycle.births import Given
from recycle.growth_sample import GrowthSample, why_not_sampled
from recycle.methods.grow import Growth
from recycle.methods.l2_init import L2Init
from recycle.methods.senn import SelfExpanding
from recycle.methods.together import check_together
from recycle.natural_gradient import ExpansionTest, Proposal, deepening, inserted, precision, score, widening
from recycle.track import Tracker
from tests.nets import ZOO
from tests.test_laws import distance, leaves, trace


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(*layers).double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return net


X = rand(300, 3)
WIDE = torch.relu(X @ rand(3, 8, seed=5) + rand(8, seed=6)) @ rand(8, 3, seed=8)  # of eight units
Y = torch.relu(X[:, :1] - 2 * X[:, 1:2] + 0.3) + torch.relu(X[:, 2:] - 1)


GROWS = {"mlp", "functional_relu", "one_relu_for_all", "tanh", "gelu", "no_bias", "actor_critic", "dueling", "sliced",
         "residual_bottleneck", "mlp_mixer", "layer_scale"}  # fmt: skip
"""Networks of the zoo in which a layer does widen; in others some may."""


def mlp(width: int = 3) -> nn.Sequential:
    return built(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))


def watched(net: nn.Module, *, every: int = 1, method: Any = None, rate: float = 0.0) -> Recycler:
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    return Recycler(
        recycle.trace(net, lambda: net(X)), method or SelfExpanding(), optimizers=[optimizer], sample_every=every
    )


def update(net: nn.Module, recycler: Recycler, x: Tensor = X, y: Tensor = Y) -> None:
    with recycler.listening():
        (net(x) - y).square().mean().backward()
    recycler.optimizers[0].step()
    recycler.optimizers[0].zero_grad()


def sample_of(net: nn.Module, recycler: Recycler, group: str = "0") -> GrowthSample:
    sample = recycler.tracker.stats(recycler.graph[group]).growth
    assert sample is not None
    return sample


# ---------------------------------------------------------------- what is kept of a pass


def test_rows_are_what_the_layers_read_and_were_told() -> None:
    net = mlp()
    recycler = watched(net)
    with recycler.listening():
        (net(X) - Y).square().sum().backward()
    sample = sample_of(net, recycler)
    by_input = X[:, 0].argsort()
    order = sample.inputs[:, 0].argsort()
    with torch.no_grad():
        before, after = net[0](X)[by_input], net[1](net[0](X))[by_input]
        told = 2 * (net(X) - Y)[by_input]
    assert sample.biased and sample.inputs.shape == (300, 4) and (sample.inputs[:, 3] == 1).all()
    for found, expected in (
        (sample.inputs[:, :3], X[by_input]),
        (sample.preactivations, before),
        (sample.activations, after),
        (sample.gradients, told),
        (sample.beside, torch.ones(300, 1).double()),
    ):
        torch.testing.assert_close(found[order], expected)
    assert net[2].weight.grad is not None
    torch.testing.assert_close(sample.gradients.T @ sample.activations, net[2].weight.grad)


def test_each_example_counts_once_as_it_was_seen_last() -> None:
    """A rollout buffer, or a small data set, that is passed over again and again is not larger than it is."""
    net = mlp()
    recycler = watched(net, rate=0.05)
    for _ in range(3):
        for part in X[:60].split(20):
            update(net, recycler, part, part[:, :1])
    here = {tuple(row[:3].tolist()) for row in sample_of(net, recycler).inputs}
    assert len(sample_of(net, recycler).inputs) == 60 and here == {tuple(row.tolist()) for row in X[:60]}
    weights = copy.deepcopy(net.state_dict())
    last = X[:20]
    update(net, recycler, last, last[:, :1])
    sample = sample_of(net, recycler)
    assert len(sample.inputs) == 60
    net.load_state_dict(weights)
    with torch.no_grad():
        now = net[0](sample.inputs[:, :3])
    seen_now = (sample.preactivations - now).abs().amax(1) < 1e-12
    assert int(seen_now.sum()) == 20


def test_an_example_that_is_seen_again_has_the_mean_of_its_gradients() -> None:
    """The same observation, with another action and another reward."""
    net = mlp()
    recycler = watched(net)
    for y in (Y[:20], Y[:20] + 1, Y[:20] - 4):
        update(net, recycler, X[:20], y)
    sample = sample_of(net, recycler)
    with torch.no_grad():
        expected = 2 * (net(sample.inputs[:, :3]) - (Y[:20].mean(1, keepdim=True)[_places(sample.inputs)] - 1)) / 20
    torch.testing.assert_close(sample.gradients, expected)


def _places(inputs: Tensor) -> Tensor:
    """Which of the first rows of ``X`` these are."""
    return (inputs[:, None, :3] - X[None, :20]).abs().amax(2).argmin(1)


def test_deeper_layers_know_the_examples_by_what_the_first_layer_reads() -> None:
    net = built(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    recycler = watched(net, rate=0.05)
    for _ in range(4):
        update(net, recycler, X[:50], Y[:50])
    assert {len(sample_of(net, recycler, name).inputs) for name in ("0", "2")} == {50}


def test_no_more_than_the_latest_2048_rows_are_kept() -> None:
    net = mlp()
    recycler = watched(net)
    for seed in range(9):
        x = rand(300, 3, seed=seed)
        update(net, recycler, x, x[:, :1])
    inputs = sample_of(net, recycler).inputs
    assert len(inputs) == 2048
    kept = {tuple(row[:3].tolist()) for row in inputs}
    assert all(tuple(row.tolist()) in kept for row in rand(300, 3, seed=8))
    big = rand(5000, 3, seed=99)
    update(net, recycler, big, big[:, :1])
    assert 1600 < len(sample_of(net, recycler).inputs) <= 2048


def test_several_consumers_and_features_that_stand_beside_the_units() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)
            self.first, self.second = nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)
            self.third = nn.Linear(2 + 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.a(x))
            return torch.cat([self.first(h), self.second(h)], 1), self.third(torch.cat([x, torch.tanh(self.b(x))], 1))

    net = Two().double()
    recycler = watched(net)
    with recycler.listening():
        (sum(out.square().sum() for out in net(X)) / 2).backward()
    shared, beside = sample_of(net, recycler, "a"), sample_of(net, recycler, "b")
    assert shared.gradients.shape == (300, 5) and shared.beside.shape == (300, 0)
    for row, told in zip(shared.inputs[:5, :3], shared.gradients, strict=False):
        torch.testing.assert_close(net(row[None])[0][0], told)
    assert beside.activations.shape == (300, 2)
    torch.testing.assert_close(beside.beside[:, :3], beside.inputs[:, :3])
    assert (beside.beside[:, 3] == 1).all() and beside.beside.shape == (300, 4)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)), "'1.weight' stands between"),
        ((nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)), "one Linear layer"),
        ((nn.Linear(3, 4), nn.ReLU(), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 1, 1), nn.Flatten()), "is no Linear"),
        ((nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 1)), "'1.weight' stands between"),
    ],
)
def test_layers_that_give_no_rows_say_why(layers: tuple[nn.Module, ...], reason: str) -> None:
    net = built(*layers)
    recycler = watched(net)
    (group,) = recycler.graph
    assert reason in why_not_sampled(group)
    update(net, recycler)
    report = recycler.step()
    assert not report.edits and reason in report.groups[group.name].note


def test_watching_for_growth_changes_nothing() -> None:
    found = []
    for growth in (False, True):
        net = mlp()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        graph = recycle.trace(net, lambda net=net: net(X))
        torch.manual_seed(3)
        with Tracker(graph, optimizers=[optimizer], sample_every=1, growth=growth):
            for _ in range(4):
                (net(X) - Y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append([*net.parameters(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------- which activation it is


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_activation_is_known_by_what_it_does(name: str, dtype: torch.dtype) -> None:
    z = 6 * rand(200, 4).to(dtype)
    found = recognised(z, KNOWN[name](z))
    assert found is not None
    assert torch.equal(found[1](z), KNOWN[name](z)) and (found[0] == name or name == "celu")  # with alpha 1 celu is elu


def test_leaky_relus_of_any_slope_and_what_is_no_activation() -> None:
    z = rand(50, 4)
    found = recognised(z, F.leaky_relu(z, 0.2))
    assert found is not None and found[0] == "leaky relu (0.2)"
    for other in (F.layer_norm(z, (4,)), F.dropout(torch.relu(z), 0.5), torch.relu(z) * 2, z.flip(1)):
        assert recognised(z, other) is None


# ---------------------------------------------------------------- growing


def test_a_layer_widens_without_a_change_of_the_output_and_the_loss_falls_faster() -> None:
    net = mlp(2)
    recycler = watched(net, rate=0.02)
    for _ in range(400):
        update(net, recycler)
    before, width = net(X), net[0].out_features
    report = recycler.step()
    ((name, edit),) = report.edits
    assert name == "0" and isinstance(edit, Grow) and net[0].out_features == width + edit.count
    assert (net(X) - before).abs().max().item() <= 1e-12 * before.abs().max().item()
    assert (net[2].weight[:, width:] == 0).all() and net[0].weight[width:].norm(dim=1).min() > 0
    assert edit.birth == Given(edit.birth.rows, usual_length=True) and "Given" in report.to_json()
    plain = built(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    control = watched(plain, rate=0.02, method=recycle.find("monitor")())
    for _ in range(400):
        update(plain, control)
    losses = []
    for one, of in ((net, recycler), (plain, control)):
        for _ in range(300):
            update(one, of)
        losses.append((one(X) - Y).square().mean().item())
    assert losses[0] < 0.5 * losses[1]


def test_a_layer_that_explains_the_gradient_or_sees_only_noise_stays() -> None:
    net = mlp(8)
    recycler = watched(net, method=SelfExpanding(certainty=2))
    with torch.no_grad():
        wanted = net(X)
    update(net, recycler, X, wanted + 0.3 * rand(300, 1, seed=7))
    report = recycler.step()
    note = report.groups["0"].note
    assert not report.edits and "not above relative=0.03, absolute=0.0025 and certainty=2 standard errors" in note


def test_the_layer_that_gains_most_is_widened_and_only_that() -> None:
    """The first layer lacks a unit that the target needs; what the second one could add is little."""
    net = built(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 1))
    recycler = watched(net, method=SelfExpanding(relative=0, absolute=0, certainty=0), rate=0.01)
    for _ in range(500):
        update(net, recycler)
    method = recycler.method
    stats = {group.name: recycler.tracker.stats(group, seeded(), 1) for group in recycler.graph}
    scores = {group.name: method.score(group, stats[group.name])[0] for group in recycler.graph}
    report = recycler.step()
    assert len(report.edits) == 1 and report.edits[0][0] == max(scores, key=lambda name: scores[name])
    other = min(scores, key=lambda name: scores[name])
    assert f"a unit of {report.edits[0][0]!r} gains more" in report.groups[other].note


def test_an_event_adds_units_until_one_fails_or_there_are_as_many_as_allowed() -> None:
    counts = []
    for most in (1, 3):
        net = built(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
        recycler = watched(net, method=SelfExpanding(most=most))
        update(net, recycler, X, WIDE)
        ((_, edit),) = recycler.step().edits
        counts.append(edit.count)
    assert counts[0] == 1 < counts[1] <= 3


def test_after_a_growth_it_waits_for_the_cooldown_also_over_a_save() -> None:
    net = built(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    recycler = watched(net, method=SelfExpanding(cooldown=2, most=1))
    widths = []
    for event in range(5):
        update(net, recycler, X, WIDE)
        report = recycler.step()
        widths.append(net[0].out_features)
        if event == 1:
            assert "an event expanded it 1 events ago" in report.groups["0"].note
            state = recycler.state_dict()
            recycler = watched(net, method=SelfExpanding(cooldown=2, most=1))
            recycler.load_state_dict(state)
    assert widths == [3, 3, 3, 4, 4]


@pytest.mark.parametrize("name", ZOO)
def test_every_network_says_what_it_said_or_the_report_why_it_does_not_grow(name: str) -> None:
    case, spec = trace(name), ZOO[name]
    optimizer = torch.optim.SGD([p for p in case.net.parameters() if p.requires_grad], lr=0.0)
    method = SelfExpanding(relative=0, absolute=0, certainty=0, proposals=4, steps=4)
    recycler = Recycler(case.graph, method, optimizers=[optimizer], sample_every=1)
    for seed in range(30):
        calls = spec.calls(case.net, spec.inputs(seeded(seed)))
        with recycler.listening():
            said = [y for call in calls for y in leaves(call()) if y.requires_grad]
            sum(torch.cos(3 * y).sum() for y in said).backward()
        optimizer.step()
        optimizer.zero_grad()
    before, widths = case.outputs(), {group.name: group.width for group in case.graph}
    report = recycler.step()
    grown = {group for group, _ in report.edits}
    assert len(grown) <= 1
    assert distance(before, case.outputs()) <= 1e-12
    for group in case.graph:
        assert (group.width > widths[group.name]) == (group.name in grown) != bool(report.groups[group.name].note)
    assert not grown or not spec.inexact.get(next(iter(grown)))
    assert grown or name not in GROWS


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.LeakyReLU(0.1)])
def test_newborns_say_what_was_proposed(activation: nn.Module) -> None:
    """Of ReLU-like units up to a positive factor: their rows are as long as others are."""
    net = built(nn.Linear(3, 2), activation, nn.Linear(2, 1))
    recycler = watched(net)
    update(net, recycler)
    inputs = sample_of(net, recycler).inputs
    ((_, edit),) = recycler.step().edits
    with torch.no_grad():
        said = net[:2](inputs[:, :3])[:, 2:]
    proposed = activation(inputs @ edit.birth.rows.T)
    if isinstance(activation, (nn.ReLU, nn.LeakyReLU)):
        assert net[0].weight[2:].norm(dim=1).max() < 2 * net[0].weight[:2].norm(dim=1).max()
        said, proposed = said / said.norm(dim=0), proposed / proposed.norm(dim=0)
    torch.testing.assert_close(said, proposed)


def test_without_a_gradient_nothing_is_done_and_the_report_says_why() -> None:
    net = mlp(2)
    recycler = watched(net)
    assert recycler.step().groups["0"].note == "no training pass was seen since the last event"
    with recycler.listening():
        net(X)
    report = recycler.step()
    assert not report.edits
    assert report.groups["0"].note == (
        "needs growth, which was not observed: no gradient has come back to its consumers yet"
    )
    with pytest.raises(NotRecyclable, match="no gradient at what reads '0' was seen yet"):
        SelfExpanding().score(recycler.graph["0"], recycler.tracker.stats(recycler.graph["0"]))


def test_few_examples_unknown_functions_and_fixed_widths_are_refused_by_name() -> None:
    net = mlp(2)
    recycler = watched(net)
    update(net, recycler, X[:11], Y[:11])
    assert "11 different examples were seen since the last event, at least 12" in recycler.step().groups["0"].note

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    odd = built(nn.Linear(3, 2), Odd(), nn.Linear(2, 1))
    recycler = watched(odd)
    update(odd, recycler)
    assert "is no activation that is known" in recycler.step().groups["0"].note

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).reshape(-1, 4))

    fixed = Fixed().double()
    recycler = watched(fixed)
    update(fixed, recycler)
    assert "it cannot change its width" in recycler.step().groups["a"].note


def test_one_group_alone_is_decided_without_a_survey() -> None:
    net = mlp(2)
    recycler = watched(net)
    update(net, recycler)
    group = recycler.graph["0"]
    stats = recycler.tracker.stats(group, seeded(), 1)
    (edit,) = SelfExpanding(most=2)(group, stats)
    assert isinstance(edit, Grow) and 1 <= edit.count <= 2
    relative, absolute = SelfExpanding().score(group, stats)
    assert relative > 0.03 and 0.0025 < absolute < 1
    with pytest.raises(NotRecyclable, match="not above relative=1000"):
        SelfExpanding(relative=1000)(group, stats)


def test_a_run_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    widths = []
    for stop in (False, True):
        net = mlp(2)
        recycler = watched(net, every=3, rate=0.02)
        for step in range(1, 101):
            update(net, recycler)
            if step % 25 == 0:
                recycler.step()
                widths.append((net[0].out_features, net[0].weight.sum().item()))
            if stop and step == 40:
                state = recycler.state_dict()
                recycler = watched(net, every=3, rate=0.02)
                recycler.load_state_dict(state)
    assert widths[:4] == widths[4:] and widths[3][0] > 2


@pytest.mark.parametrize(
    "options",
    [{"relative": -1}, {"absolute": 1}, {"cooldown": -1}, {"damping": 0}, {"most": 0}, {"proposals": 0}, {"steps": -1}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"senn needs .*{next(iter(options))}"):
        SelfExpanding(**options)


def test_given_rows_must_fit() -> None:
    net = mlp()
    group = recycle.trace(net, lambda: net(X))["0"]
    with pytest.raises(NotRecyclable, match=r"3 weights and 1 biases each got rows of shape \(2, 3\)"):
        recycle.apply(Grow(2, Given(rand(2, 3))), group)
    recycle.apply(Grow(2, Given(rand(2, 4))), group)
    torch.testing.assert_close(net[0].weight[3:], rand(2, 4)[:, :3])
    torch.testing.assert_close(net[0].bias[3:], rand(2, 4)[:, 3])
    normed = built(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(NotRecyclable, match="given rows are for units with one weight and at most a bias"):
        recycle.apply(Grow(1, Given(rand(1, 4))), recycle.trace(normed, lambda: normed(X))["0"])


def test_a_new_layer_costs_more_than_a_unit() -> None:
    """The seam for insertion: a proposal of another kind has no rows, and a cost of its own."""
    unit, layer = Proposal(0.1, 1.0, 10.0, rows=rand(4)), Proposal(0.1, 1.0, 10.0, cost=20.0)
    assert unit.relative == pytest.approx(20 * layer.relative) and layer.rows is None
    assert math.isclose(unit.absolute, 20 * layer.absolute)


@pytest.mark.parametrize(("count", "gained"), [(None, 2), (1, 1)])
def test_a_schedule_grows_by_as_many_units_as_it_wants_of_those_proposed(count: int | None, gained: int) -> None:
    net = built(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    recycler = watched(net, method=Growth(SelfExpanding(most=2), when="score", count=count))
    update(net, recycler, X, WIDE)
    ((_, edit),) = recycler.step().edits
    assert edit.count == gained and net[0].out_features == 2 + gained


def test_the_score_of_what_may_be_chance_is_zero() -> None:
    net = mlp(8)
    recycler = watched(net)
    with torch.no_grad():
        wanted = net(X)
    update(net, recycler, X, wanted + 0.3 * rand(300, 1, seed=7))
    group = recycler.graph["0"]
    stats = recycler.tracker.stats(group, seeded(), 1)
    assert SelfExpanding(certainty=2).score(group, stats) == (0.0, 0.0)


# ---------------------------------------------------------------- a layer or a unit


def lacking(what: str) -> tuple[nn.Sequential, Tensor]:
    """A network whose output layer is nearly the best that it can be, and what it would say had it what it lacks."""
    net = built(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 8))
    with torch.no_grad():
        h = net[:2](X)
        wanted = {
            "layer": net[2](torch.relu(h - 0.2 * h @ rand(6, 6, seed=11).abs() - 0.1 * rand(6, seed=12).abs())),
            "unit": net(X) + 3 * torch.relu(X @ rand(3, 1, seed=21) - 0.5) * rand(8, seed=22),
            "nothing": net(X) + 0.3 * rand(300, 8, seed=23),
        }[what]
        best = torch.linalg.lstsq(torch.cat([h, torch.ones(300, 1)], 1), wanted).solution
        net[2].weight.copy_(best[:-1].T + 0.02 * rand(8, 6, seed=13))
        net[2].bias.copy_(best[-1])
    return net, wanted


def test_an_inserted_layer_reads_and_is_told_what_was_foretold_and_its_score_is_k_fac_s() -> None:
    """Brute force: the layer is inserted, and autograd asked."""
    net, wanted = lacking("layer")
    recycler = watched(net)
    update(net, recycler, X, wanted)
    sample = sample_of(net, recycler)
    read, told = inserted(sample.activations, sample.gradients, sample.outgoing, biased=True)
    order = _all_places(sample.inputs)
    recycle.deepen(Deepen(["0"]), recycler.graph)
    new = net[2]
    seen: list[Tensor] = []
    new.register_forward_hook(lambda layer, args, output: seen.extend((args[0], output)))
    (net(X[order]) - wanted[order]).square().mean().backward()
    torch.testing.assert_close(read[:, :-1], seen[0].detach())
    (gradients,) = torch.autograd.grad((net(X[order]) - wanted[order]).square().mean(), seen[3:4] or seen[-1:])
    torch.testing.assert_close(told, gradients)
    rows = len(X)
    moment = torch.cat([new.weight.grad, new.bias.grad[:, None]], 1).T / rows  # G = E[h g'], of a mean over rows
    a, s = read.T @ read / rows, gradients.T @ gradients / rows
    exact = torch.trace(moment.T @ torch.linalg.pinv(a) @ moment @ torch.linalg.pinv(s))
    assert score(read, told, precision(told, damping=0.0)) == pytest.approx(float(exact), rel=1e-8)


def _all_places(inputs: Tensor) -> Tensor:
    """Which rows of ``X`` these are."""
    return (inputs[:, None, :3] - X[None]).abs().amax(2).argmin(1)


def test_a_layer_gains_where_one_is_missing_and_a_unit_where_that_is() -> None:
    found = {}
    for what in ("layer", "unit", "nothing"):
        net, wanted = lacking(what)
        recycler = watched(net)
        update(net, recycler, X, wanted)
        sample = sample_of(net, recycler)
        features = torch.cat([sample.activations, sample.beside], 1)
        how: dict[str, Any] = {"biased": True, "generator": seeded()}
        layer = deepening(sample.activations, features, sample.gradients, sample.outgoing, cost=1.0, **how)
        found[what] = layer, widening(sample.inputs, features, sample.gradients, torch.relu, **how)
    layer, unit = found["layer"]
    assert layer.gain > 2 * unit.gain and ExpansionTest(certainty=1.5).passed(layer)
    layer, unit = found["unit"]
    assert unit.gain > 5 * layer.gain / 20 and ExpansionTest(certainty=1.5).passed(unit)  # SENN's cost of a layer
    assert not any(ExpansionTest().passed(each) for each in found["nothing"])


@pytest.mark.parametrize(
    ("what", "cost", "made"),
    [("layer", 2.0, Deepen), ("layer", None, Grow), ("layer", 1e4, Grow), ("unit", 2.0, Grow), ("nothing", 2.0, None)],
)
def test_an_event_inserts_a_layer_where_that_gains_most_for_its_cost_or_widens_one(
    what: str, cost: float | None, made: Any
) -> None:
    net, wanted = lacking(what)
    recycler = watched(net, method=SelfExpanding(layer_cost=cost, most=1, certainty=0.9))
    update(net, recycler, X, wanted)
    before = net(X)
    report = recycler.step()
    assert (net(X) - before).abs().max().item() <= 1e-12 * before.abs().max().item()
    assert [type(each) for each in (*report.interventions, *dict(report.edits).values())] == [made] * (made is not None)
    assert len(net) == (5 if made is Deepen else 3)
    if made is Deepen:
        assert [group.name for group in recycler.graph] == ["0", "2"]
        update(net, recycler, X, wanted)
        recycler.step()  # and it goes on with the layers that there are


def test_the_layer_that_was_inserted_lets_the_loss_fall_where_it_is_missing() -> None:
    losses = []
    for cost in (2.0, None):
        net, wanted = lacking("layer")
        recycler = watched(net, method=SelfExpanding(layer_cost=cost, most=1), rate=0.3)
        for _ in range(100):
            update(net, recycler, X, wanted)
        recycler.step()
        for _ in range(400):
            update(net, recycler, X, wanted)
        losses.append((net(X) - wanted).square().mean().item())
    assert losses[0] < 0.6 * losses[1]


def test_a_layer_that_was_refused_does_not_stand_in_the_way_of_units() -> None:
    class Two(nn.Module):
        """Two layers read the units: there is no place between."""

        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.a, self.b, self.c = net[0], net[2], nn.Linear(6, 8, bias=False).double()
            nn.init.zeros_(self.c.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return torch.cat([self.b(h), self.c(h)], 1)

    net, wanted = lacking("unit")
    two = Two(net)

    def method() -> SelfExpanding:
        return SelfExpanding(layer_cost=1e-3, relative=0, absolute=0, certainty=0)

    recycler = watched(two, method=method())
    told = []
    for _ in range(3):
        update(two, recycler, X, torch.cat([wanted, wanted], 1))
        report = recycler.step()
        told.append((bool(report.edits), "there is no place in the module tree" in report.note))
        state = recycler.state_dict()
        recycler = watched(two, method=method())  # a run that is saved and resumed knows what was refused, too
        recycler.load_state_dict(state)
    assert told == [(False, True), (False, False), (True, False)]
    assert state["method"] == {"last": 3, "asked": None, "refused": ["a"]}


def test_l2_init_does_not_go_with_layers_that_are_inserted() -> None:
    with pytest.raises(ValueError, match="inserted ones begin later"):
        check_together([SelfExpanding(layer_cost=20), L2Init()])
    check_together([SelfExpanding(), L2Init()])
    with pytest.raises(ValueError, match="layer_cost > 0"):
        SelfExpanding(layer_cost=0)
