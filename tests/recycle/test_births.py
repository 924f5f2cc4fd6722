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
from recycle.births import Newborns, like_init, mirror
from recycle.graph import Axis

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
