"""Health in numbers that fit on one screen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Split, metrics
from recycle.stats import Stats


def made(samples: int = 10, **given: list[float]) -> Stats:
    """Statistics by hand; what is not given is zero, gradients are not observed."""
    width = len(next(iter(given.values())))
    zero, nan = [0.0] * width, [math.nan] * width
    names = ("firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum", "age", "incoming_norm",
             "outgoing_norm")  # fmt: skip
    unseen = ("gradient", "weight_gradient", "silence", "rarity")
    values = {n: zero for n in names} | {n: nan for n in unseen} | given
    return Stats(samples=samples, **{k: torch.tensor(v, dtype=torch.double) for k, v in values.items()})


def test_dead_is_constant_and_constant_is_dead_but_not_zero() -> None:
    stats = made(minimum=[0, 0, 0.5, -1], maximum=[0, 2, 0.5, -1])
    assert metrics.dead(stats) == 0.75
    assert metrics.constant(stats) == 0.5


def test_nothing_is_dead_after_one_sample() -> None:
    assert metrics.dead(made(samples=1, minimum=[0, 1], maximum=[0, 1])) == 0


def test_dormant_counts_scores_up_to_and_with_the_threshold() -> None:
    stats = made(mean_abs=[0.0, 0.1, 1.0, 2.9])  # the mean is 1
    assert metrics.dormant(stats) == 0.25
    assert metrics.dormant(stats, tau=0.1) == 0.5
    assert metrics.dormant(stats, tau=0.09) == 0.25


def test_a_layer_of_zeros_is_wholly_dormant() -> None:
    assert metrics.dormant(made(mean_abs=[0, 0, 0]), tau=0.0) == 1.0


def test_saturated_units_of_a_bounded_layer() -> None:
    stats = made(minimum=[-1, -1, 0.96], maximum=[1, 1, 1], mean_abs=[0.99, 0.5, 0.98])
    assert metrics.saturated(stats) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("low", "high"), [([0, 0], [1, 1]), ([-1, -1], [1, 1.5])])
def test_one_sided_and_unbounded_layers_do_not_saturate(low: list[float], high: list[float]) -> None:
    assert metrics.saturated(made(minimum=low, maximum=high, mean_abs=[0.99, 0.99])) == 0


def test_gradient_silence_is_read_at_the_pre_activation_or_else_at_the_weights() -> None:
    assert metrics.gradient_silent(made(gradient=[0, 1, 2, 3], weight_gradient=[0, 0, 0, 0])) == 0.25
    assert metrics.gradient_silent(made(weight_gradient=[0, 0, 1, 1])) == 0.5
    assert math.isnan(metrics.gradient_silent(made(mean=[1, 2])))


@pytest.mark.parametrize(
    ("table", "effective", "stable"),
    [
        (torch.eye(5), 5.0, 5.0),
        (torch.ones(6, 4), 1.0, 1.0),
        (torch.zeros(6, 4), 0.0, 0.0),
        (torch.diag(torch.tensor([3.0, 1.0])), 4 / 3**0.75, 10 / 9),  # exp(H(3/4, 1/4)), (9 + 1) / 9
        (torch.tensor([[math.nan, 1.0], [1.0, 1.0]]), 0.0, 0.0),
    ],
)
def test_ranks_by_hand(table: Tensor, effective: float, stable: float) -> None:
    for rows in (table, table.t()):
        assert metrics.effective_rank(rows) == pytest.approx(effective, rel=1e-6)
        assert metrics.stable_rank(rows) == pytest.approx(stable, rel=1e-6)


def test_rank_does_not_depend_on_scale_and_counts_a_copied_unit_once() -> None:
    table = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    rank = metrics.effective_rank(table)
    assert metrics.effective_rank(table * 1e6) == pytest.approx(rank, rel=1e-6)
    doubled = torch.cat([table, table[:, :1]], 1)
    exact = torch.linalg.svdvals(doubled.double())
    share = (exact / exact.sum())[:4]
    assert metrics.effective_rank(doubled) == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-6)


def _net(rows: list[list[float]], bias: list[float]) -> Any:
    net = nn.Sequential(nn.Linear(2, len(rows)), nn.ReLU(), nn.Linear(len(rows), 1)).double()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    group = recycle.trace(net, lambda: net(x))["0"]
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(rows))
        net[0].bias.copy_(torch.tensor(bias))
    return group


def test_duplicates_point_the_same_way_whatever_their_length() -> None:
    rows = [[1, 0], [3, 0], [-1, 0], [0, 1], [0, 0], [0, 0]]
    group = _net(rows, [1, 3, -1, 1, 0, 0])
    # the second is thrice the first; a mirror image is no copy; two empty rows are no direction at all
    assert metrics.duplicates(group).tolist() == [True, True, False, False, False, False]


def test_another_hinge_is_no_duplicate() -> None:
    assert metrics.duplicates(_net([[1, 0], [1, 0]], [0.0, 1.0])).tolist() == [False, False]


def test_a_split_without_noise_is_a_duplicate_and_with_noise_it_is_not() -> None:
    group = _net([[1, 2], [3, -1], [0.1, 0.3]], [0.5, -0.5, 0.0])
    recycle.apply(Split([0], into=[2]), group)
    assert metrics.duplicates(group).tolist() == [True, False, True]
    recycle.apply(Split([0], into=[2], noise=0.5), group, generator=torch.Generator().manual_seed(0))
    assert not metrics.duplicates(group).any()


def test_duplicates_are_found_across_the_parts_in_which_wide_layers_are_compared(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    angles = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0, 2.0, 4.0]).double()
    rows = torch.stack([angles.cos(), angles.sin()], 1).tolist()
    group = _net(rows, [0.0] * 7)
    whole = metrics.duplicates(group).tolist()
    monkeypatch.setattr(metrics, "_ROWS", 3)
    assert metrics.duplicates(group).tolist() == whole == [False, True, True, True, False, True, False]
