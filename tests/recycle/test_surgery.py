"""Edits of single units: numbers that can be checked by eye, and every refusal by name."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Fold, Grow, Merge, NotRecyclable, Prune, Reset, Split
from recycle.edits import describe


def double(*rows: Any) -> Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.double)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X = rand(7, 2, seed=9)


def by_hand() -> nn.Module:
    """Three units: the first two live, the third dead and silent."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(double([3, 4], [1, 0], [9, 9]))
        net[0].bias.copy_(double([1, 2, -99]))
        net[2].weight.copy_(double([8, 5, 0], [4, 6, 0]))
        net[2].bias.copy_(double([0.5, -0.5]))
    return net


def group_of(net: nn.Module, name: str = "0", x: Tensor = X) -> Any:
    return recycle.trace(net, lambda: net(x))[name]


def random_mlp(width: int = 6, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2)).double()


def everything(*owners: Any) -> list[Tensor]:
    """Copies of all weights, buffers and optimizer state."""
    found = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            found += [t.detach().clone() for t in owner.state_dict().values()]
        else:
            found += [v.clone() if isinstance(v, Tensor) else torch.tensor(v)
                      for s in owner.state.values() for v in s.values() if v is not None]  # fmt: skip
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- split, worked examples


def test_split_copies_the_row_and_divides_the_column() -> None:
    net = by_hand()
    before = net(X)
    recycle.apply(Split([0], into=[2], share=0.25), group_of(net))
    assert net[0].weight.tolist() == [[3, 4], [1, 0], [3, 4]]
    assert net[0].bias.tolist() == [1, 2, 1]
    assert net[2].weight.tolist() == [[6, 5, 2], [3, 6, 1]]
    assert net[2].bias.tolist() == [0.5, -0.5]
    torch.testing.assert_close(net(X), before, rtol=1e-14, atol=1e-14)


def test_balanced_split_multiplies_both_sides_by_the_root_of_the_share() -> None:
    net = by_hand()
    before = net(X)
    recycle.apply(Split([0], into=[2], share=0.25, balanced=True), group_of(net))
    near, far = 0.25**0.5, 0.75**0.5
    torch.testing.assert_close(net[0].weight, double([3 * far, 4 * far], [1, 0], [3 * near, 4 * near]))
    torch.testing.assert_close(net[0].bias, double([far, 2, near]))
    torch.testing.assert_close(net[2].weight, double([8 * far, 5, 8 * near], [4 * far, 6, 4 * near]))
    torch.testing.assert_close(net(X), before, rtol=1e-13, atol=1e-13)


def test_several_children_divide_one_parent_in_order() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(double([2], [1], [1], [1]))
        net[2].weight.copy_(double([[64, 0, 0, 0]]))
    x = rand(5, 1)
    group, before = group_of(net, x=x), net(x)
    recycle.apply(Split([0, 0, 0], into=[1, 2, 3], share=0.25), group)
    # each takes a quarter of what is left: 16, then 12, then 9; the parent keeps 27
    assert net[2].weight.tolist() == [[27, 16, 12, 9]]
    assert net[0].weight.tolist() == [[2]] * 4
    torch.testing.assert_close(net(x), before, rtol=1e-14, atol=1e-14)


def test_a_share_of_zero_leaves_the_parent_alone_and_silences_the_newborn() -> None:
    net = by_hand()
    recycle.apply(Split([1], into=[2], share=0.0), group_of(net))
    assert net[0].weight.tolist() == [[3, 4], [1, 0], [1, 0]]
    assert net[2].weight.tolist() == [[8, 5, 0], [4, 6, 0]]


def test_rescale_makes_incoming_and_outgoing_norms_of_the_parent_equal() -> None:
    net = by_hand()
    before = net(X)
    recycle.apply(Split([0], into=[2], share=0.0, rescale=True), group_of(net))
    row = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach().norm(dim=1)
    column = net[2].weight.detach().norm(dim=0)
    # |(3, 4, 1)| = sqrt(26) and |(8, 4)| = sqrt(80) meet at the fourth root of 26 * 80
    assert float(row[0]) == pytest.approx((26 * 80) ** 0.25, rel=1e-14)
    assert float(column[0]) == pytest.approx((26 * 80) ** 0.25, rel=1e-14)
    assert float(row[2]) == pytest.approx((26 * 80) ** 0.25, rel=1e-14)
    torch.testing.assert_close(net(X), before, rtol=1e-13, atol=1e-13)


def test_a_balanced_share_of_zero_is_refused_or_gives_a_row_that_can_learn() -> None:
    """The root of zero on both sides is a unit without any gradient: dead for ever."""
    net = by_hand()
    try:
        recycle.apply(Split([0], into=[2], share=0.0, balanced=True), group_of(net))
    except NotRecyclable as refusal:
        assert "share" in str(refusal)  # noqa: PT017
    else:
        assert (net[0].weight[2] != 0).any()


def test_an_empty_edit_changes_nothing_and_draws_nothing() -> None:
    net = by_hand()
    group, before, generator = group_of(net), everything(net), seeded()
    for edit in (Split([], into=[]), Reset([]), Fold([], [])):
        recycle.apply(edit, group, generator=generator)
    assert equal(everything(net), before)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_edits_take_any_sequence_of_integers_and_compare() -> None:
    assert Split(torch.tensor([1, 2]), into=range(3, 5)) == Split((1, 2), into=[3, 4])
    assert Fold(torch.tensor([1]), torch.tensor([0.5])) == Fold([1], (0.5,))
    assert Reset([1]) != Reset([2])
    assert Split([0, 0, 1], into=[4, 5, 6]).only({4, 6}) == Split([0, 1], into=[4, 6])
    assert Fold([1, 2], [0.5, 0.7]).only({2}) == Fold([2], [0.7])
    assert Reset([1, 2], parents=[3, 4]).only({2}) == Reset([2], parents=[4])


def test_an_edit_becomes_plain_numbers() -> None:
    assert describe(Fold([1], [0.5])) == {"edit": "Fold", "units": [1], "means": [0.5]}
    assert describe(Split([0], into=[2])) == {
        "edit": "Split", "parents": [0], "into": [2], "share": 0.5, "noise": 0.0,
        "balanced": False, "rescale": False, "moments": "fresh",
    }  # fmt: skip


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("balanced", [False, True])
def test_noise_keeps_the_norm_of_both_rows(balanced: bool) -> None:
    net = by_hand()
    recycle.apply(Split([0], into=[2], share=0.25, noise=0.3, balanced=balanced), group_of(net), generator=seeded())
    near, far = (0.25**0.5, 0.75**0.5) if balanced else (1.0, 1.0)
    assert float(net[0].weight[0].detach().norm()) == pytest.approx(5 * far, rel=1e-14)
    assert float(net[0].weight[2].detach().norm()) == pytest.approx(5 * near, rel=1e-14)
    assert not torch.allclose(net[0].weight[0] / far, net[0].weight[2] / near)
    assert net[0].weight[1].tolist() == [1, 0]


def test_noise_of_half_a_share_is_antisymmetric() -> None:
    net = by_hand()
    recycle.apply(Split([0], into=[2], noise=1e-4), group_of(net), generator=seeded())
    row, born = net[0].weight.detach()[0], net[0].weight.detach()[2]
    apart, middle = born - row, (born + row) / 2
    assert float(apart.norm()) <= 2 * 5e-4 * (1 + 1e-6)  # each moves by at most noise x the row's norm
    assert float((middle - double([3, 4])).norm()) < 5 * 1e-8  # and the mean stays, to second order


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("parents", [[0], [0, 0]])
def test_halving_the_noise_quarters_the_change_of_the_output(share: float, parents: list[int]) -> None:
    slots = [5, 4][: len(parents)]
    x = rand(40, 2, seed=3) + 2  # on one side of every hinge: the change is smooth

    def change(noise: float) -> float:
        net = random_mlp()
        with torch.no_grad():
            net[0].weight.abs_()
            net[0].bias.fill_(3.0)
            net[2].weight[:, slots] = 0.0
        before = net(x)
        recycle.apply(Split(parents, into=slots, share=share, noise=noise), group_of(net), generator=seeded(1))
        return float((net(x) - before).detach().norm())

    ratios = [change(e) / change(e / 2) for e in (1e-2, 1e-3)]
    assert ratios == pytest.approx([4, 4], rel=0.03)
    assert change(1e-3) > 0


def test_noise_comes_from_the_given_generator_alone() -> None:
    nets = [by_hand(), by_hand()]
    state = torch.get_rng_state()
    for net in nets:
        recycle.apply(Split([0], into=[2], noise=0.1), group_of(net), generator=seeded(3))
        recycle.apply(Reset([1]), group_of(net), generator=seeded(3))
    assert equal(everything(nets[0]), everything(nets[1]))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- trajectories


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    x, y = rand(16, 2, seed=5), rand(16, 2, seed=6)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
        outputs.append(net(x).detach())
    return outputs


def test_balanced_split_stays_on_the_unsplit_trajectory_under_momentum_and_decay() -> None:
    def made(split: bool) -> list[Tensor]:
        net = random_mlp()
        with torch.no_grad():
            net[0].weight[5], net[0].bias[5], net[2].weight[:, 5] = 0.0, 0.0, 0.0
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        _train(net, optimizer, 7)
        if split:
            edit = Split([0], into=[5], share=0.3, balanced=True, moments="transform")
            recycle.apply(edit, group_of(net), optimizers=[optimizer])
        return _train(net, optimizer, 50)

    apart = [float((a - b).detach().abs().max()) for a, b in zip(made(False), made(True), strict=True)]
    assert max(apart) <= 1e-12


def test_two_balanced_children_of_one_parent_stay_on_the_trajectory_too() -> None:
    def made(split: bool) -> list[Tensor]:
        net = random_mlp()
        with torch.no_grad():
            net[0].weight[4:], net[0].bias[4:], net[2].weight[:, 4:] = 0.0, 0.0, 0.0
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
        _train(net, optimizer, 7)
        if split:
            edit = Split([0, 0], into=[4, 5], balanced=True, moments="transform")
            recycle.apply(edit, group_of(net), optimizers=[optimizer])
        return _train(net, optimizer, 50)

    apart = [float((a - b).detach().abs().max()) for a, b in zip(made(False), made(True), strict=True)]
    assert max(apart) <= 1e-12


def test_transformed_moments_are_those_of_a_network_born_split() -> None:
    """Adam's moments after a transform equal those that the split network gathers from the same gradients."""
    whole = random_mlp()
    with torch.no_grad():
        whole[0].weight[5], whole[0].bias[5], whole[2].weight[:, 5] = 0.0, 0.0, 0.0
    twin = copy.deepcopy(whole)
    recycle.apply(Split([0], into=[5], share=0.3), group_of(twin))
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.0) for net in (whole, twin)]
    for net, optimizer in zip((whole, twin), optimizers, strict=True):
        _train(net, optimizer, 4)
    recycle.apply(Split([0], into=[5], share=0.3, moments="transform"), group_of(whole), optimizers=optimizers[:1])
    for mine, other in zip(whole.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
        for key in ("exp_avg", "exp_avg_sq"):
            ours, theirs = optimizers[0].state[mine][key], optimizers[1].state[other][key]
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-18)


def test_transformed_moments_of_a_balanced_split_with_a_slope_for_each_unit() -> None:
    """PReLU's slopes are not rescaled, so their gradient takes the whole share and not its root."""

    def made() -> nn.Module:
        net = nn.Sequential(*random_mlp()[:1], nn.PReLU(6), *random_mlp()[2:]).double()
        with torch.no_grad():
            net[0].weight[5], net[0].bias[5], net[2].weight[:, 5] = 0.0, 0.0, 0.0
        return net

    whole, twin = made(), made()
    edit = Split([0], into=[5], share=0.3, balanced=True, moments="transform")
    recycle.apply(edit, group_of(twin))
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.0) for net in (whole, twin)]
    for net, optimizer in zip((whole, twin), optimizers, strict=True):
        _train(net, optimizer, 4)
    recycle.apply(edit, group_of(whole), optimizers=optimizers[:1])
    for mine, other in zip(whole.parameters(), twin.parameters(), strict=True):
        ours, theirs = optimizers[0].state[mine]["exp_avg"], optimizers[1].state[other]["exp_avg"]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-18)


# ---------------------------------------------------------------- reset and fold


def test_reset_draws_new_rows_and_silences_the_columns_of_its_units_alone() -> None:
    net = by_hand()
    recycle.apply(Reset([2]), group_of(net), generator=seeded())
    assert net[0].weight[:2].tolist() == [[3, 4], [1, 0]]
    assert net[0].bias[:2].tolist() == [1, 2]
    bound = 2**-0.5  # nn.Linear: uniform in +-1/sqrt(fan in), weights and bias
    assert (net[0].weight[2].abs() <= bound).all() and net[0].bias[2].abs() <= bound
    assert net[0].weight[2].tolist() != [9, 9]
    assert net[2].weight.tolist() == [[8, 5, 0], [4, 6, 0]]


def test_fold_moves_the_mean_into_every_consumer_bias() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.one, self.two = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.fc(x))
            return self.one(h), self.two(h)

    net = Two().double()
    with torch.no_grad():
        net.fc.weight[1], net.fc.bias[1] = 0.0, 0.5  # always 0.5
        net.one.weight.copy_(double([[1, 2, 3]]))
        net.two.weight.copy_(double([1, 4, 1], [1, -6, 1]))
        net.one.bias.fill_(1.0)
        net.two.bias.zero_()
    before = net(X)
    recycle.apply(Fold([1], [0.5]), group_of(net, "fc"))
    assert (net.one.bias.tolist(), net.two.bias.tolist()) == ([2.0], [2.0, -3.0])
    assert (net.one.weight.tolist(), net.two.weight[:, 1].tolist()) == ([[1, 0, 3]], [0, 0])
    for a, b in zip(net(X), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("tail", ["conv", "flatten", "transposed"])
def test_fold_of_a_constant_channel_is_exact(tail: str) -> None:
    torch.manual_seed(0)
    ends = {
        "conv": [nn.Conv2d(3, 2, 2)],
        "flatten": [nn.Flatten(), nn.Linear(27, 2)],
        "transposed": [nn.Conv2d(3, 2, 1), nn.Flatten()],
    }
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), *ends[tail]).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0.0, 0.7
    x = rand(3, 1, 4, 4)
    before = net(x)
    recycle.apply(Fold([1], [0.7]), group_of(net, "0", x))
    torch.testing.assert_close(net(x), before, rtol=1e-13, atol=1e-13)
    unit = net[-1].weight[:, 9:18] if tail == "flatten" else net[2].weight[:, 1]
    assert (unit == 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_channel_of_a_convolution_in_groups_is_read_by_the_rows_of_its_group(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 2), nn.Tanh(), nn.Conv2d(6, 4, 2, groups=2)).double().to(memory_format=layout)
    with torch.no_grad():
        net[0].weight[4], net[0].bias[4] = 0.0, 0.7
    x = rand(3, 1, 4, 4)
    group = recycle.trace(net, lambda: net(x))["0[3:6]"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    before, weight = net(x), net[2].weight.clone()
    recycle.apply(Fold([1], [math.tanh(0.7)]), group, optimizers=[optimizer])
    torch.testing.assert_close(net(x), before, rtol=1e-13, atol=1e-13)
    momentum = optimizer.state[net[2].weight]["momentum_buffer"]
    for tensor in (net[2].weight, momentum):
        assert (tensor[2:, 1] == 0).all()  # channel 4 is the second of the second group
        assert (tensor != 0).sum() == tensor.numel() - tensor[2:, 1].numel()
    assert torch.equal(net[2].weight[:2], weight[:2])
    recycle.apply(Split([2], into=[1], share=0.25), group, optimizers=[optimizer])
    torch.testing.assert_close(net(x), before, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(net[2].weight[2:, 1] * 3, net[2].weight[2:, 2])


def test_fold_is_refused_without_a_bias_or_with_zero_padding() -> None:
    bare = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    with pytest.raises(NotRecyclable, match=r"units of '0' cannot be folded: consumer '2.weight' has no bias"):
        recycle.apply(Fold([0], [0.5]), group_of(bare))
    x = rand(2, 1, 4, 4)
    padded = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2, padding=1)).double()
    with pytest.raises(NotRecyclable, match=r"consumer '2.weight' .*zeros"):
        recycle.apply(Fold([0], [0.5]), group_of(padded, "0", x))


def test_fold_behind_a_padding_layer_is_refused_or_exact() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(3, 2, 2)).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0.0, 0.7
    x = rand(2, 1, 4, 4)
    before = net(x)
    try:
        recycle.apply(Fold([1], [0.7]), group_of(net, "0", x))
    except NotRecyclable as refusal:
        assert "zeros" in str(refusal)  # noqa: PT017
    torch.testing.assert_close(net(x), before, rtol=1e-13, atol=1e-13)


def test_fold_with_padding_of_another_kind_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0.0, 0.7
    x = rand(2, 1, 4, 4)
    before = net(x)
    recycle.apply(Fold([1], [0.7]), group_of(net, "0", x))
    torch.testing.assert_close(net(x), before, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------- targets


def _with_target(dead: int = 5) -> tuple[nn.Module, nn.Module]:
    net, target = random_mlp(seed=1), random_mlp(seed=2)
    with torch.no_grad():
        for module in (net, target):
            module[0].bias[dead] = -1e3
    return net, target


@pytest.mark.parametrize("edit", [Split([0], into=[5], noise=0.2), Reset([5]), Fold([5], [0.0])])
def test_a_hard_target_is_left_alone(edit: Any) -> None:
    net, target = _with_target()
    kept = everything(target)
    recycle.apply(edit, group_of(net), targets=[(target, 1.0)], generator=seeded())
    assert equal(everything(target), kept)


@pytest.mark.parametrize("edit", [Split([0], into=[5], share=0.25, noise=0.2), Reset([5]), Fold([5], [0.0])])
def test_a_polyak_target_gets_the_same_edit_of_its_own_weights(edit: Any) -> None:
    net, target = _with_target()
    alone = copy.deepcopy(target)
    recycle.apply(edit, group_of(net), targets=[(target, 0.01)], generator=seeded(4))
    recycle.apply(edit, group_of(alone), generator=seeded(4))  # what the edit does to such a network by itself
    assert equal(everything(target), everything(alone))


def test_a_polyak_target_keeps_its_function_up_to_the_noise() -> None:
    net, target = _with_target()
    before = net(X), target(X)
    recycle.apply(Split([0], into=[5]), group_of(net), targets=[(target, 0.01)])
    torch.testing.assert_close(net(X), before[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(target(X), before[1], rtol=1e-13, atol=1e-13)


def test_a_fresh_unit_is_the_same_unit_in_the_target() -> None:
    net, target = _with_target()
    recycle.apply(Reset([5]), group_of(net), targets=[(target, 0.01)], generator=seeded())
    assert torch.equal(net[0].weight[5], target[0].weight[5])
    assert torch.equal(net[0].bias[5], target[0].bias[5])


def test_a_target_of_another_shape_is_refused() -> None:
    net, wide = random_mlp(), random_mlp(8)
    kept = everything(net, wide)
    with pytest.raises(NotRecyclable, match=r"'0.weight' has another shape in the target network"):
        recycle.apply(Split([0], into=[5]), group_of(net), targets=[(wide, 0.01)])
    with pytest.raises(NotRecyclable, match=r"Linear has no tensor '0.weight'; trace the module again"):
        recycle.apply(Split([0], into=[5]), group_of(net), targets=[(nn.Linear(2, 2), 0.01)])
    assert equal(everything(net, wide), kept)


# ---------------------------------------------------------------- refusals

_REFUSED: list[tuple[Any, str]] = [
    (Grow(-1), r"Grow needs count >= 0, got -1"),
    (Grow(1, parents=[0, 1]), r"each slot needs a parent: got 2 parents and 1 slots"),
    (Prune([0, 1]), r"Prune would leave 1 of the 3 units of '0'; a group has at least 2. Name fewer units"),
    (Prune([3]), r"units \[3\] are out of range: '0' has units 0 to 2"),
    (Merge(1, 1), r"units \[1\] of '0' are both"),
    (Split([0], into=[2], share=1.0), r"0 <= share < 1, got share=1.0"),
    (Split([0], into=[2], share=-0.1), r"0 <= share < 1, got share=-0.1"),
    (Split([0], into=[2], share=float("nan")), r"0 <= share < 1, got share=nan"),
    (Split([0], into=[2], noise=-1.0), r"finite noise >= 0, got noise=-1.0"),
    (Split([0], into=[2], noise=float("inf")), r"finite noise >= 0, got noise=inf"),
    (Split([0], into=[2], noise=float("nan")), r"finite noise >= 0, got noise=nan"),
    (Split([0, 1], into=[2]), r"each slot needs a parent: got 2 parents and 1 slots"),
    (Split([0], into=[1, 2]), r"each slot needs a parent: got 1 parents and 2 slots"),
    (Split([2], into=[2]), r"a parent cannot be a slot of the same edit: units \[2\] of '0' are both"),
    (Split([0, 1], into=[1, 2]), r"units \[1\] of '0' are both"),
    (Split([0, 1], into=[2, 2]), r"units \[2\] of '0' are named more than once"),
    (Split([3], into=[2]), r"parents \[3\] are out of range: '0' has units 0 to 2"),
    (Split([-1], into=[2]), r"parents \[-1\] are out of range"),
    (Split([0], into=[3]), r"units \[3\] are out of range: '0' has units 0 to 2"),
    (Reset([0, 7, -1]), r"units \[-1, 7\] are out of range"),
    (Reset([1, 1]), r"units \[1\] of '0' are named more than once"),
    (Reset([2], parents=[0, 1]), r"each slot needs a parent: got 2 parents and 1 slots"),
    (Reset([2], parents=[2]), r"units \[2\] of '0' are both"),
    (Fold([0, 1], [0.5]), r"Fold needs a mean for each unit: got 1 for 2 units"),
    (Fold([5], [0.5]), r"units \[5\] are out of range"),
]


@pytest.mark.parametrize(("edit", "reason"), _REFUSED, ids=[reason[:40] for _, reason in _REFUSED])
def test_refusals_name_what_is_wrong_and_change_nothing(edit: Any, reason: str) -> None:
    net, generator = by_hand(), seeded()
    optimizer = torch.optim.Adam(net.parameters())
    _train(net, optimizer, 2)
    group, before = group_of(net), everything(net, optimizer)
    with pytest.raises(NotRecyclable, match=reason):
        recycle.apply(edit, group, optimizers=[optimizer], generator=generator)
    assert equal(everything(net, optimizer), before)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_a_fold_of_something_that_is_no_number_is_refused() -> None:
    net = by_hand()
    group, before = group_of(net), everything(net)
    with pytest.raises(ValueError, match="nan"):
        recycle.apply(Fold([0], [float("nan")]), group)
    assert equal(everything(net), before)


@pytest.mark.parametrize("option", ["balanced", "rescale"])
def test_scaling_units_of_another_kind_is_refused(option: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    group, before = group_of(net), everything(net)
    with pytest.raises(NotRecyclable, match=f"{option}=True needs units whose output scales .* Pass {option}=False"):
        recycle.apply(Split([0], into=[2], **{option: True}), group)
    assert equal(everything(net), before)


def test_what_is_no_edit_or_no_group_is_a_type_error() -> None:
    net = by_hand()
    graph = recycle.trace(net, lambda: net(X))
    with pytest.raises(TypeError, match=r"an edit is a Split, Reset, Fold, Prune, Grow or Merge .* got str of"):
        recycle.apply("split", graph["0"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got Split of str. Pass graph\['name'\]"):
        recycle.apply(Split([0], into=[2]), "0")  # type: ignore[arg-type]


def test_a_layer_frozen_after_tracing_is_refused() -> None:
    net = by_hand()
    group, before = group_of(net), everything(net)
    net[2].weight.requires_grad_(False)
    with pytest.raises(NotRecyclable, match=r"group '0' is frozen: '2.weight' has requires_grad=False"):
        recycle.apply(Reset([0]), group)
    assert equal(everything(net), before)


@pytest.mark.parametrize("birth", ["too few", "wrong shape", "raises"])
def test_a_birth_that_returns_nonsense_changes_nothing(birth: str) -> None:
    def made(newborns: Any) -> tuple[Tensor, ...]:
        if birth == "raises":
            raise ValueError("no idea")
        return newborns.fresh[:1] if birth == "too few" else tuple(t[:, :, :1] for t in newborns.fresh)

    net = by_hand()
    group, before = group_of(net), everything(net)
    with pytest.raises((ValueError, RuntimeError)):
        recycle.apply(Reset([2], made), group)
    assert equal(everything(net), before)


def test_an_edit_inside_a_backward_pass_is_refused() -> None:
    net = by_hand()
    group, before, caught = group_of(net), everything(net), []

    def edit(grad: Tensor) -> None:
        with pytest.raises(NotRecyclable, match=r"inside a backward pass .* edit after optimizer.step\(\)"):
            recycle.apply(Split([0], into=[2]), group)
        caught.append(True)

    h = net[0](X)
    h.register_hook(edit)
    net[2](F.relu(h)).sum().backward()
    assert caught == [True]
    assert equal(everything(net), before)


# ---------------------------------------------------------------- cost


def _calls(work: Callable[[], None]) -> int:
    count = 0

    def watch(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["split", "noise", "one parent", "reset", "mirror", "fold", "only"])
def test_no_python_loop_over_units(kind: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4096), nn.ReLU(), nn.Linear(4096, 2))
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.randn(4, 3)
    net(x).sum().backward()
    optimizer.step()
    group = group_of(net, "0", x)

    def edit(count: int) -> Any:
        dead, live = range(4096 - count, 4096), range(count)
        return {
            "split": lambda: Split(live, into=dead),
            "noise": lambda: Split(live, into=dead, noise=0.1, balanced=True, rescale=True, moments="transform"),
            "one parent": lambda: Split([0] * count, into=dead, noise=0.1),
            "reset": lambda: Reset(dead),
            "mirror": lambda: Reset(dead, recycle.births.mirror, parents=live),
            "fold": lambda: Fold(dead, [0.5] * count),
            "only": lambda: Split(live, into=dead).only(set(dead)),
        }[kind]()

    def work(count: int) -> int:
        return _calls(lambda: recycle.apply(edit(count), group, optimizers=[optimizer]))

    work(8)  # caches
    assert abs(work(2000) - work(8)) <= 10


def test_a_split_of_one_unit_does_not_copy_the_layer_unit_by_unit() -> None:
    """The same edit on a wide and on a narrow layer makes the same number of calls."""

    def work(width: int) -> int:
        net = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        group = group_of(net, "0", torch.randn(4, 3))
        recycle.apply(Split([0], into=[1]), group)
        return _calls(lambda: recycle.apply(Split([0], into=[1], noise=0.1), group))

    assert abs(work(4096) - work(8)) <= 10
