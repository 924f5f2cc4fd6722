"""What newborn units are: fresh rows as the module would draw them, and mirrors of live ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Reset
from recycle.births import Newborns, like_init, mirror, revive
from recycle.graph import Axis
from recycle.methods import find

ROWS = Axis("fc.weight", 0, torch.arange(4)[:, None], "weight")
BIAS = Axis("fc.bias", 0, torch.arange(4)[:, None], "bias")
GAIN = Axis("norm.weight", 0, torch.arange(4)[:, None], "gain")
MEAN = Axis("norm.running_mean", 0, torch.arange(4)[:, None], "buffer")
VAR = Axis("norm.running_var", 0, torch.arange(4)[:, None], "buffer")


def elements(*values: Any) -> Tensor:
    """One row for each unit, shaped ``(units, span, rest)``."""
    return torch.tensor(values, dtype=torch.double).reshape(len(values), 1, -1)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- births as functions


def test_like_init_is_what_the_module_would_draw() -> None:
    fresh = (elements([1, 2]), elements([3]))
    assert like_init(Newborns((ROWS, BIAS), fresh, None)) is fresh


def test_mirror_negates_row_and_bias() -> None:
    fresh = elements([3, 4]), elements([0])
    born = mirror(Newborns((ROWS, BIAS), fresh, (elements([6, 8]), elements([2]))))
    assert [t.flatten().tolist() for t in born] == [[-6, -8], [-2]]


def test_mirror_is_clipped_at_twice_a_fresh_norm_with_its_hinge_where_it_was() -> None:
    fresh = elements([3, 4]), elements([0])  # length 5: at most 10
    born = mirror(Newborns((ROWS, BIAS), fresh, (elements([30, 40]), elements([7]))))
    assert born[0].flatten().tolist() == pytest.approx([-6, -8])
    assert born[1].flatten().tolist() == pytest.approx([-1.4])  # the same fifth: w x + b = 0 at the same x


@pytest.mark.parametrize(("cap", "length"), [(1.0, 5.0), (4.0, 20.0), (100.0, 50.0)])
def test_mirror_cap_is_counted_in_fresh_norms(cap: float, length: float) -> None:
    fresh = elements([3, 4]), elements([0])
    (row, _) = mirror(Newborns((ROWS, BIAS), fresh, (elements([30, 40]), elements([7]))), norm_cap=cap)
    assert float(row.norm()) == pytest.approx(length)


def test_mirror_clips_each_row_by_the_usual_fresh_one() -> None:
    fresh = elements([1, 0], [3, 0], [99, 0]), elements([0], [0], [0])  # the median length is 3
    parents = elements([12, 0], [5, 0], [0, 0]), elements([2], [1], [1])
    row, bias = mirror(Newborns((ROWS, BIAS), fresh, parents))
    assert row[:, 0, 0].tolist() == pytest.approx([-6, -5, 0])
    assert bias[:, 0, 0].tolist() == pytest.approx([-1, -1, -1])


def test_mirror_behind_a_batchnorm_negates_the_mean_and_keeps_gain_and_variance() -> None:
    axes = (ROWS, GAIN, MEAN, VAR)
    fresh = elements([3, 4]), elements([1]), elements([0]), elements([1])
    parents = elements([30, 40]), elements([1.5]), elements([10]), elements([25])
    born = mirror(Newborns(axes, fresh, parents))
    # the row is shortened to a fifth, so its mean is a fifth, its variance a twenty-fifth
    assert [t.item() for t in born[1:]] == pytest.approx([1.5, -2, 1])


def test_mirror_without_parents_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"mirror needs a parent for each unit: pass Reset\(units, mirror"):
        mirror(Newborns((ROWS,), (elements([1, 2]),), None))


# ---------------------------------------------------------------- births in a network


def test_a_mirrored_unit_fires_exactly_where_its_parent_does_not() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = rand(50, 2)
    graph = recycle.trace(net, lambda: net(x))
    with torch.no_grad():
        net[0].bias[3] = -1e3  # dead: nothing may change
    before = net(x)
    recycle.apply(Reset([3], mirror, parents=[1]), graph["0"], generator=seeded())
    z = net[0](x)
    assert torch.equal(F.relu(z[:, 3]) > 0, z[:, 1] < 0)
    assert torch.equal(net(x), before)
    assert (net[2].weight[:, 3] == 0).all()


def test_a_mirror_in_a_polyak_target_is_of_the_targets_own_parent() -> None:
    torch.manual_seed(0)
    net, target = (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double() for _ in range(2))
    graph = recycle.trace(net, lambda: net(rand(5, 2)))
    birth = partial(mirror, norm_cap=100.0)
    recycle.apply(Reset([3], birth, parents=[1]), graph["0"], targets=[(target, 0.01)], generator=seeded())
    assert torch.equal(net[0].weight[3], -net[0].weight[1])
    assert torch.equal(target[0].weight[3], -target[0].weight[1])
    assert torch.equal(target[0].bias[3], -target[0].bias[1])


_LAYERS = {
    "linear": lambda: nn.Linear(3, 400),
    "conv": lambda: nn.Conv2d(3, 400, 1),
    "transposed": lambda: nn.ConvTranspose2d(3, 400, 1),
}


@pytest.mark.parametrize("kind", list(_LAYERS))
def test_fresh_rows_are_those_of_the_layers_own_reset_parameters(kind: str) -> None:
    torch.manual_seed(0)
    layer = _LAYERS[kind]()
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(400, 1) if kind == "linear" else nn.Conv2d(400, 1, 1)).double()
    shape = (4, 3) if kind == "linear" else (4, 3, 1, 1)
    graph = recycle.trace(net, lambda: net(rand(*shape)))
    with torch.no_grad():
        for parameter in net[0].parameters():
            parameter.fill_(100.0)
    recycle.apply(Reset(range(400)), graph["0"], generator=seeded())
    new = _LAYERS[kind]().double()
    for name in ("weight", "bias"):
        mine, other = getattr(net[0], name), getattr(new, name)
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.1)
        assert mine.abs().max().item() <= other.abs().max().item() * 1.05
        assert mine.unique().numel() == mine.numel()  # no row is another's copy


def test_fresh_rows_are_filled_by_the_models_own_initialisation() -> None:
    def init(name: str, tensor: Tensor, generator: torch.Generator | None) -> None:
        seen.append(name)
        if name == "0.weight":
            nn.init.orthogonal_(tensor, 2.0, generator=generator)
        else:
            tensor.zero_()

    seen: list[str] = []
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    graph = recycle.trace(net, lambda: net(rand(4, 6)))
    recycle.apply(Reset(range(6)), graph["0"], generator=seeded(), init=init)
    assert seen == ["0.weight", "0.bias"]
    torch.testing.assert_close(net[0].weight @ net[0].weight.t(), 4 * torch.eye(6).double())
    assert net[0].bias.tolist() == [0] * 6


def test_a_fresh_batchnorm_channel_is_new_and_the_others_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for t in (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var):
            t.copy_(torch.arange(2, 6))
    graph = recycle.trace(net, lambda: net(rand(5, 2)))
    recycle.apply(Reset([2]), graph["0"], generator=seeded())
    assert net[1].weight.tolist() == [2, 3, 1, 5]
    assert net[1].bias.tolist() == [2, 3, 0, 5]
    assert net[1].running_mean.tolist() == [2, 3, 0, 5]
    assert net[1].running_var.tolist() == [2, 3, 1, 5]
    assert net[1].num_batches_tracked == 0


def test_a_bare_parameter_gets_rows_of_the_live_rows_scale() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(rand(3, 300) * 7), nn.Parameter(rand(300))
            self.out = nn.Linear(300, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(x @ self.w + self.b))

    net = Bare().double()
    graph = recycle.trace(net, lambda: net(rand(4, 3)))
    with torch.no_grad():
        net.w[:, :150] = 1e-6  # the units that go must not set the scale
    recycle.apply(Reset(range(150)), graph["w"], generator=seeded())
    live = net.w[:, 150:].square().mean().sqrt().item()
    assert net.w[:, :150].square().mean().sqrt().item() == pytest.approx(live, rel=0.1)
    assert net.b[:150].tolist() == [0] * 150


def test_fresh_rows_leave_the_layer_and_the_global_random_numbers_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    graph = recycle.trace(net, lambda: net(rand(5, 2)))
    state = torch.get_rng_state()
    weight, pointer = net[0].weight, net[0].weight.data_ptr()
    recycle.apply(Reset([0]), graph["0"], generator=seeded())
    assert net[0].weight is weight and weight.data_ptr() == pointer
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- revive: a hinge in the data


def driven(inputs: Tensor) -> Any:
    """Response of a Linear layer with one row for each unit."""
    return lambda rows: (inputs @ rows[:, 0].T)[:, :, None]


INPUTS = torch.tensor([[9.0, 1], [7, 2], [5, 3], [3, 6]], dtype=torch.double)
ROW_AND_BIAS = {
    "axes": (ROWS, BIAS),
    "fresh": (elements([3, 4]), elements([0.7])),  # length 5
    "parents": None,
    "others": (elements([20, 0], [0, 7], [0, 99]), elements([1], [1], [1])),  # median length 20
    "draws": (elements([0, 2]), elements([1])),
}


@pytest.mark.parametrize(("active", "bias"), [(0.5, -25), (0.25, -45), (0.75, -15)])
def test_revive_is_as_long_as_fresh_and_live_rows_and_bent_where_the_data_are(active: float, bias: float) -> None:
    newborns = Newborns(**ROW_AND_BIAS, responses=(driven(INPUTS), None))
    row, shift = revive(newborns, active=active)
    assert row.flatten().tolist() == pytest.approx([0, 10])  # sqrt(5 * 20); on the inputs: 10, 20, 30, 60
    assert shift.flatten().tolist() == pytest.approx([bias])


def test_revive_among_none_that_live_is_as_long_as_a_fresh_row() -> None:
    others = {"others": (torch.empty(0, 1, 2), torch.empty(0, 1, 1))}
    row, bias = revive(Newborns(**(ROW_AND_BIAS | others), responses=(driven(INPUTS), None)))
    assert row.flatten().tolist() == pytest.approx([0, 5]) and bias.item() == pytest.approx(-12.5)


def test_revive_without_inputs_keeps_the_module_s_own_bias() -> None:
    row, bias = revive(Newborns(**ROW_AND_BIAS, responses=(None, None)))
    assert row.flatten().tolist() == pytest.approx([0, 10]) and bias.item() == 0.7


def test_revive_behind_a_batchnorm_sets_its_statistics_and_its_shift() -> None:
    shift = Axis("norm.bias", 0, torch.arange(4)[:, None], "bias")
    born = revive(
        Newborns(
            axes=(ROWS, GAIN, shift, MEAN, VAR),
            fresh=(elements([3, 4]), elements([2]), elements([0]), elements([0]), elements([1])),
            parents=None,
            others=(elements([20, 0]), *[elements([1])] * 4),
            draws=(elements([0, 2]), *[elements([1])] * 4),
            responses=(driven(INPUTS), None, None, None, None),
        )
    )
    # 10, 20, 30, 60: mean 30, variance (400 + 100 + 0 + 900) / 3; the median 25 is to become zero
    variance = 1400 / 3
    assert [t.item() for t in born[1:]] == pytest.approx([2, 2 * 5 / variance**0.5, 30, variance])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, padding_mode="circular", groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 9, 3),
    )  # fmt: skip


def normed(*, bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)
    )


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [
        (mlp, (60, 5), 1),
        (lambda: nn.Sequential(nn.Conv1d(5, 8, 3, dilation=2), *list(mlp())[1:2], nn.Conv1d(8, 2, 1)), (7, 5, 20), 1),
        (cnn, (10, 2, 6, 6), 1),
        (lambda: nn.Sequential(nn.ConvTranspose2d(2, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 2, 1)), (10, 2, 6, 6), 1),
        (partial(normed, bias=True), (10, 2, 6, 6), 2),
        (partial(normed, bias=False), (10, 2, 6, 6), 2),
    ],
)
@pytest.mark.parametrize("active", [0.5, 0.2])
def test_newborns_fire_on_the_share_of_the_data_that_was_promised(
    build: Any, shape: tuple[int, ...], count: int, active: float
) -> None:
    torch.manual_seed(0)
    net = build().double()
    x = rand(*shape) + 2  # far from zero, where fresh units would fire on all of it or on none
    graph = recycle.trace(net, lambda: net(x))
    group = next(iter(graph))  # of the first half of the channels, where they stand in two
    with torch.no_grad():
        net[0].weight.mul_(3)
    units = [1, 2, group.width - 1]
    recycler = recycle.Recycler(graph, find("revive")(active=active), optimizers=[torch.optim.SGD(net.parameters(), 0)])
    with recycler.listening():
        net(x).sum().backward()
    inputs = recycler.tracker.stats(group).inputs
    before = net[:count](x)
    recycle.apply(Reset(units, partial(revive, active=active)), group, inputs=inputs, generator=seeded())
    net.eval()
    fires = (net[:count](x) > 0).double().movedim(1, 0).flatten(1).mean(1)
    assert fires[units].tolist() == pytest.approx([active] * 3, abs=0.005)
    if count == 1:
        others = [channel for channel in range(before.shape[1]) if channel not in units]
        assert torch.equal(net[0](x)[:, others], before[:, others])


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_gates_of_a_newborn_are_open_on_half_of_the_inputs(kind: type[nn.RNNBase], gates: int) -> None:
    torch.manual_seed(0)
    net = Recurrent(kind).double()
    x = rand(9, 4, 5) + 2
    graph = recycle.trace(net, lambda: net(x))
    (group,) = graph
    optimizer = torch.optim.SGD(net.parameters(), 0)
    recycler = recycle.Recycler(graph, find("revive")(), optimizers=[optimizer])
    with recycler.listening():
        net(x).sum().backward()
    inputs = recycler.tracker.stats(group).inputs
    kept = net.rnn.weight_hh_l0.detach().clone()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    recycle.apply(Reset([2], revive), group, inputs=inputs, generator=seeded())
    rows = torch.arange(gates) * 6 + 2
    at_rest = x @ net.rnn.weight_ih_l0[rows].T + net.rnn.bias_ih_l0[rows] + net.rnn.bias_hh_l0[rows]
    assert (at_rest > 0).double().mean((0, 1)).tolist() == [0.5] * gates
    others = torch.tensor([row for row in range(6 * gates) if row not in rows])
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        assert torch.equal(net.rnn.get_parameter(name)[others], before[f"rnn.{name}"][others])
    assert not torch.equal(net.rnn.weight_hh_l0[rows], kept[rows])  # the module's own, small and about zero
    assert net.rnn.weight_hh_l0[rows].abs().max() <= 6**-0.5
    assert net.rnn.weight_hh_l0[:, 2].abs().max() == 0 and net.head.weight[:, 2].abs().max() == 0


def test_second_moments_begin_at_a_part_of_the_live_median_on_the_incoming_side() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    optimizer = torch.optim.Adam(net.parameters())
    x = rand(6, 2)
    graph = recycle.trace(net, lambda: net(x))
    net(x).sum().backward()
    optimizer.step()
    first, bias, second = (optimizer.state[net.get_parameter(n)] for n in ("0.weight", "0.bias", "2.weight"))
    first["exp_avg_sq"].copy_(torch.tensor([[1, 10], [2, 30], [9, 20], [100, 100]]))
    bias["exp_avg_sq"].copy_(torch.tensor([5, 4, 6, 100]))
    second["exp_avg_sq"].fill_(7.0)
    for state in (first, bias, second):
        state["exp_avg"].fill_(3.0)
    recycle.apply(Reset([3], revive, warm=0.1), graph["0"], optimizers=[optimizer], generator=seeded())
    assert first["exp_avg_sq"].flatten().tolist() == pytest.approx([1, 10, 2, 30, 9, 20, 0.2, 2.0])
    assert bias["exp_avg_sq"].tolist() == pytest.approx([5, 4, 6, 0.5])
    assert second["exp_avg_sq"].tolist() == [[7, 7, 7, 0]] and second["exp_avg"].tolist() == [[3, 3, 3, 0]]
    assert first["exp_avg"].tolist() == [[3, 3]] * 3 + [[0, 0]] and bias["exp_avg"].tolist() == [3, 3, 3, 0]
    assert [float(state["step"]) for state in (first, bias, second)] == [1, 1, 1]


@pytest.mark.parametrize("warm", [-0.1, 1.5, float("nan")])
def test_a_warmth_out_of_range_is_refused(warm: float) -> None:
    net = mlp()
    graph = recycle.trace(net, lambda: net(torch.randn(4, 5)))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(recycle.NotRecyclable, match=r"Reset needs 0 <= warm <= 1"):
        recycle.apply(Reset([0], revive, warm=warm), graph["0"])
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_recycler_brings_dead_units_back_onto_half_of_the_data() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    x = rand(200, 5) + 2
    graph = recycle.trace(net, lambda: net(x))
    with torch.no_grad():
        net[0].bias[[3, 7]] = -1e3
        net[2].bias[[0, 9]] = -1e3
    recycler = recycle.Recycler(graph, find("revive")(tau=0.0), optimizers=[optimizer])
    for _ in range(9):
        with recycler.listening():
            net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = net(x)
    dead = {name: recycler.tracker.stats(graph[name]).dead.nonzero()[:, 0].tolist() for name in ("0", "2")}
    assert {3, 7} <= set(dead["0"]) and {0, 9} <= set(dead["2"])
    report = recycler.step()
    assert {name: sorted(edit.units) for name, edit in report.edits} == dead
    assert torch.allclose(net(x), kept, rtol=1e-12)
    fires = (net[0](x) > 0).double().mean(0)[dead["0"]]
    assert fires.tolist() == pytest.approx([0.5] * len(dead["0"]), abs=0.02)
    for seen in (net[:2](x)[:, dead["0"]], net[:4](x)[:, dead["2"]]):  # the second layer's saw other inputs
        assert bool((seen > 0).any(0).all())
