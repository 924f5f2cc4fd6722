"""Scores of the natural gradient: K-FAC against the exact Fisher matrix, and what chance looks like."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recycle.natural_gradient import (
    ExpansionTest,
    Proposal,
    along,
    ascended,
    energy,
    gain,
    gains,
    outgoing,
    precision,
    score,
    unexplained,
    widening,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_score(features: Tensor, gradients: Tensor, metrics: Tensor) -> float:
    """g'F^-1 g of a linear layer whose outputs have the Fisher matrix ``metrics[n]`` on row n."""
    rows, wide, high = len(features), features.shape[1], gradients.shape[1]
    fisher = torch.einsum("nab,ni,nj->aibj", metrics, features, features).reshape(high * wide, high * wide) / rows
    gradient = (gradients.T @ features / rows).flatten()
    return float(gradient @ torch.linalg.pinv(fisher, hermitian=True) @ gradient)


# ---------------------------------------------------------------- by hand


def test_a_score_by_hand() -> None:
    """Two rows, one feature h = (1, 2), one output with gradients (3, 1), S = (9 + 1) / 2 = 5, A = 5 / 2, G = 5 / 2."""
    h, g = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [1.0]]).double()
    inverse = precision(g, damping=0.0)
    assert inverse.item() == pytest.approx(1 / 5)
    assert score(h, g, inverse) == pytest.approx((5 / 2) ** 2 / (5 / 2) / 5)  # 0.5
    assert energy(g, inverse) == pytest.approx(1.0)
    left = unexplained(h, g)  # g - h (h'g / h'h) = g - h
    assert left[:, 0].tolist() == pytest.approx([2, -1])
    unit = torch.tensor([[1.0], [0.0]]).double()
    # C = 2 / 2 = 1, A_p = 1 / 2: C^2 / A_p / S = 2 / 5; both units together explain both rows, so the score is 1
    assert gain(unit, left, inverse) == pytest.approx(0.4)
    assert gains(unit, left, inverse).tolist() == pytest.approx([0.4])
    assert score(torch.cat([h, unit], 1), g, inverse) == pytest.approx(1.0)
    assert outgoing(unit, left, inverse).item() == pytest.approx(2 / 5)  # A_p^-1 C / S


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    g = torch.tensor([[2.0, 0.0], [0.0, 4.0]]).double()  # S = diag(2, 8), mean 5
    expected = torch.tensor([[1 / 2.5, 0.0], [0.0, 1 / 8.5]]).double()
    torch.testing.assert_close(precision(g, damping=0.1), expected)


# ---------------------------------------------------------------- K-FAC and the exact natural gradient


def test_of_a_linear_layer_with_gaussian_outputs_the_score_is_exact() -> None:
    """The Fisher matrix of 1/2 |y - t|^2 is A (x) I: the residuals are the gradients, true samples are white noise."""
    h, residuals = rand(40, 5), rand(40, 3, seed=1)
    identity = torch.eye(3).double().expand(40, 3, 3)
    assert score(h, residuals, torch.eye(3).double()) == pytest.approx(exact_score(h, residuals, identity), rel=1e-10)
    # and this is twice what the best linear layer would win
    best = torch.linalg.lstsq(h, residuals).solution
    won = (residuals.square().sum() - (residuals - h @ best).square().sum()) / 40
    assert score(h, residuals, torch.eye(3).double()) == pytest.approx(won.item(), rel=1e-10)


def test_the_gain_is_exact_for_units_orthogonal_to_what_there_is_and_a_lower_bound_for_others() -> None:
    h, residuals, units = rand(40, 5), rand(40, 3, seed=1), rand(40, 2, seed=2)
    identity = torch.eye(3).double().expand(40, 3, 3)
    inverse, left = torch.eye(3).double(), unexplained(h, residuals)
    for block in (unexplained(h, units), units, units + 5 * h[:, :2]):
        raised = exact_score(torch.cat([h, block], 1), residuals, identity) - exact_score(h, residuals, identity)
        found = gain(block, left, inverse)
        assert 0 < found <= raised * (1 + 1e-10)
        if block is not units and float((h.T @ block).abs().max()) < 1e-9:
            assert found == pytest.approx(raised, rel=1e-9)
    assert gain(units + 5 * h[:, :2], left, inverse) < 0.5 * gain(unexplained(h, units), left, inverse)


def test_with_a_softmax_k_fac_is_as_far_off_as_rows_differ_from_their_mean() -> None:
    """If l S <= S_n <= u S for every row then l A (x) S <= F <= u A (x) S: exact gains lie in [1/u, 1/l] times ours."""
    logits = 0.7 * rand(60, 4, seed=3)
    p = logits.softmax(1)
    metrics = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    mean = metrics.mean(0)
    kept = torch.linalg.eigh(mean).eigenvectors[:, 1:]  # all but the direction in which a softmax does not change
    square = torch.linalg.cholesky(torch.linalg.inv(kept.T @ mean @ kept))
    eigenvalues = torch.linalg.eigvalsh(square.T @ (kept.T @ metrics @ kept) @ square)
    low, high = float(eigenvalues.min()), float(eigenvalues.max())
    assert 0.05 < low < 0.9 and 1.1 < high < 3
    h, gradients = rand(60, 5), p - torch.eye(4).double()[torch.arange(60) % 4]
    ours = score(h, gradients, torch.linalg.pinv(mean, hermitian=True))
    exact = exact_score(h, gradients, metrics)
    assert ours / high <= exact <= ours / low
    assert abs(exact / ours - 1) > 1e-3  # they do differ


def test_samples_of_the_outputs_give_the_true_fisher_matrix() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    labels = torch.multinomial(p, 200_000, replacement=True, generator=seeded())
    sampled = p - torch.eye(3).double()[labels]
    true = torch.linalg.pinv(torch.diag(p) - p[:, None] * p, rtol=1e-9, hermitian=True)
    torch.testing.assert_close(precision(sampled, damping=0.0), true, rtol=0.02, atol=0.02)


def test_the_residual_is_orthogonal_to_every_feature_also_to_copies() -> None:
    h = rand(50, 6)
    h = torch.cat([h, h[:, :2], torch.zeros(50, 1).double()], 1)
    left = unexplained(h, rand(50, 3, seed=1))
    assert float((h.T @ left).abs().max()) < 1e-12 and float(left.norm()) > 1
    assert float(gains(h, left, torch.eye(3).double()).max()) < 1e-24  # a copy of a unit gains nothing


def test_scores_do_not_depend_on_the_scale_of_the_loss_or_on_a_linear_map_of_the_features() -> None:
    h, g = rand(50, 6), rand(50, 3, seed=1)
    before = score(h, g, precision(g))
    assert score(h, 1e-3 * g, precision(1e-3 * g)) == pytest.approx(before, rel=1e-10)
    assert score(h @ rand(6, 6, seed=2), g, precision(g)) == pytest.approx(before, rel=1e-8)
    turn = torch.linalg.qr(rand(3, 3, seed=4)).Q
    assert score(h, g @ turn, precision(g @ turn)) == pytest.approx(before, rel=1e-10)


# ---------------------------------------------------------------- the search


def hinges(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with a bias column, and gradients that one ReLU explains but for a little noise."""
    x = torch.cat([rand(400, 3, seed=seed), torch.ones(400, 1).double()], 1)
    wanted = torch.relu(x @ torch.tensor([1.0, -2.0, 0.5, 0.3]).double())
    return x, torch.stack([wanted, -2 * wanted], 1) + 0.1 * rand(400, 2, seed=seed + 100)


def test_the_ascent_finds_the_unit_that_is_missing() -> None:
    x, g = hinges()
    left = unexplained(torch.ones(400, 1).double(), g)
    inverse = precision(left)
    rows = ascended(x, left, inverse, torch.relu, biased=True, generator=seeded())
    start = ascended(x, left, inverse, torch.relu, biased=True, steps=0, generator=seeded())
    found, before = (gains(torch.relu(x @ r.T), left, inverse, 0.1) for r in (rows, start))
    assert found.tolist() == sorted(found.tolist(), reverse=True)
    assert found[0] > before[0] and found.median() > 1.3 * before.median()
    best = gains(torch.relu(x @ torch.tensor([[1.0, -2.0, 0.5, 0.3]]).double().T), left, inverse, 0.1)
    assert found[0] > 0.98 * best[0]


@pytest.mark.parametrize("biased", [True, False])
def test_the_scale_of_the_inputs_says_nothing(biased: bool) -> None:
    x, g = hinges()
    x = x if biased else x[:, :3]
    scale = torch.tensor([100.0, 0.01, 3.0, 1.0]).double()[: x.shape[1]]
    shift = torch.tensor([5.0, -7.0, 0.1, 0.0]).double() * biased
    moved = x * scale + shift[: x.shape[1]]
    left, inverse = unexplained(torch.ones(400, 1).double(), g), precision(g)
    rows = [ascended(i, left, inverse, torch.tanh, biased=biased, generator=seeded()) for i in (x, moved)]
    torch.testing.assert_close(torch.tanh(x @ rows[0].T), torch.tanh(moved @ rows[1].T), rtol=1e-6, atol=1e-8)


def test_inputs_that_never_change_get_no_weight_and_units_that_never_fire_no_gain() -> None:
    x, g = hinges()
    x[:, 1] = 4.0
    left, inverse = unexplained(torch.ones(400, 1).double(), g), precision(g)
    rows = ascended(x, left, inverse, torch.relu, biased=True, generator=seeded())
    assert (rows[:, 1] == 0).all() and rows.isfinite().all() and rows[:, 0].abs().min() > 0
    assert gains(torch.zeros(400, 1).double(), left, inverse).tolist() == [0.0]


# ---------------------------------------------------------------- chance


def test_the_best_of_many_looks_good_even_where_there_is_nothing_to_find() -> None:
    """On the rows on which it was found; on others a gain measured anew is about outputs / rows, and ours about 0."""
    inside, anew, held = [], [], []
    for seed in range(20):
        x = torch.cat([rand(200, 8, seed=seed), torch.ones(200, 1).double()], 1)
        g = rand(200, 4, seed=seed + 1000)
        a, b = slice(0, 100), slice(100, 200)
        ones = torch.ones(100, 1).double()
        left, other = unexplained(ones, g[a]), unexplained(ones, g[b])
        inverse = precision(g[a])
        row = ascended(x[a], left, inverse, torch.relu, biased=True, damping=0, generator=seeded(seed))[:1]
        here, there = torch.relu(x[a] @ row.T), torch.relu(x[b] @ row.T)
        inside.append(gain(here, left, inverse))
        anew.append(gain(there, other, precision(g[b])))
        curvature = torch.linalg.inv(precision(g[b]))
        forward = float(along(there, other, outgoing(here, left, inverse), curvature).mean())
        held.append(forward * abs(forward))
    mean = [sum(values) / 20 for values in (inside, anew, held)]
    assert mean[0] > 4 * 4 / 100  # far above what one unit would explain by chance
    assert 0.5 * 4 / 100 < mean[1] < 2 * 4 / 100
    assert abs(mean[2]) < 0.5 / 100 and 5 <= sum(value > 0 for value in held) <= 15


def test_on_the_rows_on_which_it_was_found_the_held_out_gain_is_the_gain() -> None:
    block, left = rand(60, 3), unexplained(rand(60, 4, seed=1), rand(60, 2, seed=2))
    inverse = precision(left)
    weights, curvature = outgoing(block, left, inverse), torch.linalg.inv(inverse)
    for factor in (1.0, 7.0):  # the length of the direction says nothing
        found = along(block, left, factor * weights, curvature).mean().item()
        assert found * abs(found) == pytest.approx(gain(block, left, inverse), rel=1e-10)
    assert along(block, left, -weights, curvature).mean().item() < 0
    assert along(0 * block, left, weights, curvature).tolist() == [0.0] * 60


def test_no_step_along_the_weights_wins_more_than_the_held_out_gain() -> None:
    """Brute force: 2 s <V, C> - s^2 <V, F V>, twice what the loss falls by in its quadratic model, over steps s."""
    block, left, weights = rand(60, 3), rand(60, 2, seed=2), rand(3, 2, seed=3)
    curvature = torch.linalg.inv(precision(left))
    moved = block @ weights
    steps = torch.linspace(-5, 5, 200_001).double()
    won = 2 * steps * (moved * left).sum(1).mean() - steps**2 * ((moved @ curvature) * moved).sum(1).mean()
    assert along(block, left, weights, curvature).mean().item() ** 2 == pytest.approx(won.max().item(), rel=1e-6)


def test_units_that_fire_on_few_rows_explain_their_noise_unless_damped() -> None:
    noise = rand(400, 2, seed=2)
    rare = torch.zeros(400, 1).double()
    rare[noise.norm(dim=1).argmax()] = 1.0
    often = torch.relu(rand(400, 1)) + 0.1 * noise.sum(1, keepdim=True).relu()
    inverse = precision(noise)
    plain, damped = (gains(torch.cat([rare, often], 1), noise, inverse, damping) for damping in (0.0, 0.1))
    assert damped[0].item() == pytest.approx(plain[0].item() / (1 + 0.1 * 400))  # A_p = 1 / 400 becomes 1 / 400 + .1
    assert plain[0] > plain[1] and damped[0] < damped[1]


def test_noise_is_rejected_and_a_missing_unit_is_not() -> None:
    test = ExpansionTest()
    passed = 0
    for seed in range(10):
        x, g = hinges(seed)
        ones = torch.ones(400, 1).double()
        noise = rand(400, 2, seed=seed + 500)
        how = {"biased": True, "proposals": 16, "steps": 30}
        passed += test.passed(widening(x, ones, noise, torch.relu, **how, generator=seeded(seed)))  # type: ignore[arg-type]
        signal = widening(x, ones, g, torch.relu, **how, generator=seeded(seed))  # type: ignore[arg-type]
        assert test.passed(signal) and 0.3 < signal.absolute < 1
    assert passed <= 1


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize(
    ("gained", "current", "whole", "cost", "relative", "absolute", "passed"),
    [
        (0.04, 1.0, 10.0, 1.0, 0.04, 0.004, True),
        (0.03, 1.0, 10.0, 1.0, 0.03, 0.003, False),  # not above the relative threshold
        (0.04, 1.0, 16.0, 1.0, 0.04, 0.0025, False),  # not above the absolute one
        (0.8, 1.0, 10.0, 20.0, 0.04, 0.004, True),  # a layer must gain 20 times as much
        (0.04, 1.0, 10.0, 20.0, 0.002, 0.0002, False),
        (0.04, 0.0, 10.0, 1.0, math.inf, 0.004, True),
        (-0.04, 0.0, 10.0, 1.0, -math.inf, -0.004, False),
        (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, False),  # no gradient at all
    ],
)
def test_the_expansion_test(
    gained: float, current: float, whole: float, cost: float, relative: float, absolute: float, passed: bool
) -> None:
    proposal = Proposal(gained, current, whole, cost)
    assert proposal.relative == pytest.approx(relative) and proposal.absolute == pytest.approx(absolute)
    assert ExpansionTest(relative=0.03, absolute=0.0025).passed(proposal) is passed


def test_a_gain_must_be_certain() -> None:
    proposal = Proposal(0.1, 1.0, 1.0, error=0.06)
    assert ExpansionTest(certainty=1.0).passed(proposal) and not ExpansionTest(certainty=2.0).passed(proposal)
