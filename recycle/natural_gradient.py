"""What a new unit would be worth, by the natural gradient (Mitchell et al. 2023, arXiv 2307.04526).

A network with gradient g and Fisher matrix F can lower its loss by about g'F^-1 g / 2; new units raise that score, even
while their outgoing weights are zero. Of one layer F is taken as A (x) S (K-FAC, Martens & Grosse 2015): A the second
moments of what it reads, S those of the gradient at its outputs. Then the score is the part of the gradient, in the
metric of S, that a linear map of what the layer reads explains, and the gain of new units what they explain beyond.

S from the gradients of the loss themselves is the *empirical* Fisher matrix; scores then do not depend on the scale of
the loss, and are at most the number of outputs. The *true* one takes gradients of log-likelihoods of outputs that the
network samples (actions of the policy, labels); scores are then in nats. Functions take either as ``curvature``.

All tensors are rows of examples; means are over rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle.activations import Activation

_RANK = 1e-6
"""Singular values below this part of the largest are rounding errors of single precision."""


def precision(curvature: Tensor, damping: float = 0.1) -> Tensor:
    """The pseudo-inverse of S + damping * mean(diag S), ``(outputs, outputs)``, of gradients ``(rows, outputs)``."""
    second = curvature.T @ curvature / len(curvature)
    damped = second + damping * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    inverse: Tensor = torch.linalg.pinv(damped, rtol=_RANK**2, hermitian=True)
    return inverse


def unexplained(features: Tensor, gradients: Tensor) -> Tensor:
    """r - E[r h'] A^+ h: what no linear map of ``features`` h explains of gradients r; orthogonal to all features."""
    basis = _basis(features)
    return gradients - basis @ (basis.T @ gradients)


def score(features: Tensor, gradients: Tensor, inverse: Tensor) -> float:
    """eta = tr(G' A^+ G S^+) of the layer that reads ``features``, G = E[h g'].

    Args:
        features: ``(rows, features)``, with a column of ones where the layer has a bias.
        gradients: of the loss at its outputs, ``(rows, outputs)``.
        inverse: S^+, from :func:`precision`.
    """
    explained = _basis(features).T @ gradients
    return float(((explained @ inverse) * explained).sum()) / len(features)


def energy(gradients: Tensor, inverse: Tensor) -> float:
    """E[g' S^+ g]: the score of a layer whose features explain the whole gradient."""
    return float(((gradients @ inverse) * gradients).sum()) / len(gradients)


def gain(block: Tensor, residual: Tensor, inverse: Tensor) -> float:
    """tr(C' A_p^+ C S^+) of new units together, C = E[a r']: a lower bound of how much they raise the layer's score.

    The bound is tight where the units are orthogonal to what there is. Literature: d_eta' of the paper.

    Args:
        block: activations of the units, ``(rows, units)``.
        residual: from :func:`unexplained`, ``(rows, outputs)``.
        inverse: S^+, from :func:`precision`.
    """
    return score(block, residual, inverse)


def gains(units: Tensor, residual: Tensor, inverse: Tensor, damping: float = 0.0) -> Tensor:
    """The :func:`gain` of each unit alone, ``(units,)``; differentiable, 0 for one that is always zero.

    ``damping`` takes E[a^2] + damping * max a^2 for A_p: a unit that fires on fewer rows than that part of them gains
    little. Without it the search ends at units that fire on one row and explain its noise.
    """
    moments = units.T @ residual / len(units)
    squares = units.square()
    power = squares.mean(0) + damping * squares.amax(0)
    return ((moments @ inverse) * moments).sum(1) / torch.where(power > 0, power, 1.0)


def outgoing(block: Tensor, residual: Tensor, inverse: Tensor) -> Tensor:
    """A_p^+ C S^+: the outgoing weights, ``(units, outputs)``, along which the loss rises most for its curvature."""
    weights: Tensor = torch.linalg.pinv(block, rtol=_RANK) @ residual @ inverse
    return weights


def along(block: Tensor, residual: Tensor, weights: Tensor, curvature: Tensor) -> Tensor:
    """How far the gradient points along ``weights`` (see :func:`outgoing`), found on other rows, on each of these.

    Their mean, squared, is the gain <V, C>^2 / <V, F V> of the units along V: on the rows on which V was found it is
    :func:`gain`. On others it is as often negative as positive if what was found was chance, while a gain measured anew
    is about outputs / rows even then, and the largest of many is more.

    Args:
        block: activations of the units, ``(rows, units)``.
        residual: of these rows, ``(rows, outputs)``.
        weights: ``(units, outputs)``.
        curvature: the damped S, ``(outputs, outputs)``.

    Returns:
        ``(rows,)``; zeros if the units are silent on all of them.
    """
    moved = block @ weights
    size = float(((moved @ curvature) * moved).sum()) / len(moved)
    return (moved * residual).sum(1) / (math.sqrt(size) if size > 0 else 1.0)


def ascended(
    inputs: Tensor,
    residual: Tensor,
    inverse: Tensor,
    activation: Activation,
    *,
    biased: bool,
    damping: float = 0.1,
    proposals: int = 32,
    steps: int = 60,
    rate: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Incoming weights of units with a large gain: random ones, each improved by Adam on the log of its gain.

    The weights are those of standardised inputs while they move, so that the scale of the inputs says nothing.

    Args:
        inputs: what the units would read, ``(rows, fan_in)``, with a last column of ones if ``biased``.
        residual: from :func:`unexplained`, ``(rows, outputs)``.
        inverse: S^+, from :func:`precision`.
        activation: of the units.
        biased: whether the layer has a bias.
        damping: of A_p, see :func:`gains`.
        proposals: how many.
        steps: of Adam.
        rate: of Adam.
        generator: source of randomness.

    Returns:
        ``(proposals, fan_in)``, the unit of the largest gain first.
    """
    mean = inputs.mean(0) if biased else torch.zeros_like(inputs[0])
    spread = (inputs - mean).square().mean(0).sqrt()
    used = spread > 1e-9 * spread.max()
    scale = torch.where(used, 1 / torch.where(used, spread, 1.0), 0.0)
    standard = (inputs - mean) * scale
    size = max(1, int(used.sum()))
    weights = torch.randn(proposals, inputs.shape[1], generator=generator, dtype=inputs.dtype) / math.sqrt(size)
    if biased:
        standard[:, -1] = 1.0
        weights[:, -1] *= math.sqrt(size)
    weights.requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            found = gains(activation(standard @ weights.T), residual, inverse, damping)
            (gradient,) = torch.autograd.grad(-(found.clamp_min(1e-30).log()).sum(), weights)
            weights.grad = gradient
            optimizer.step()
    rows = weights.detach()
    order = gains(activation(standard @ rows.T), residual, inverse, damping).argsort(descending=True, stable=True)
    if not biased:
        return rows[order] * scale
    back = rows * scale
    back[:, -1] = rows[:, -1] - back[:, :-1] @ mean[:-1]
    return back[order]


@dataclass(frozen=True)
class Proposal:
    """An extension of a network, and what it is worth on rows on which it was not found."""

    gain: float
    """Held-out gain of the natural-gradient score."""
    current: float
    """Score of the layer that would read it."""
    energy: float
    """Score of a layer that explains the whole gradient."""
    cost: float = 1.0
    """What it costs beside a unit: SENN divides the gain of a new layer by 20."""
    rows: Tensor | None = None
    """Incoming weights of a new unit, ``(fan_in,)``; None if none gains anything, or for another kind of extension."""
    error: float = 0.0
    """Standard error of the gain."""

    @property
    def relative(self) -> float:
        """Gain over cost and current score; infinite where nothing is left to gain without it."""
        worth = self.gain / self.cost
        return worth / self.current if self.current > 0 else math.copysign(math.inf, worth)

    @property
    def absolute(self) -> float:
        """Gain over cost and the whole energy: the part of the gradient that it explains."""
        return self.gain / self.cost / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class ExpansionTest:
    """When an extension is worth it: its relative and its absolute gain are above thresholds, and not by chance."""

    relative: float = 0.03
    absolute: float = 0.0025
    certainty: float = 1.0
    """Standard errors by which the gain is above zero; it is a square, so that at 1 chance passes one test in 40."""

    def passed(self, proposal: Proposal) -> bool:
        """Whether to expand."""
        sure = proposal.gain > self.certainty * proposal.error
        return sure and proposal.relative > self.relative and proposal.absolute > self.absolute


def widening(
    inputs: Tensor,
    features: Tensor,
    gradients: Tensor,
    activation: Activation,
    *,
    biased: bool,
    damping: float = 0.1,
    proposals: int = 32,
    steps: int = 60,
    generator: torch.Generator | None = None,
) -> Proposal:
    """The best new unit that the rows give, and what one found on a half of them is worth on the other half.

    Both halves are searched and judged by the other one, so that no choice among many makes a unit look better than it
    is; the unit proposed is that of a third search, over all rows.

    Args:
        inputs: what the unit would read, ``(rows, fan_in)``, with a last column of ones if ``biased``.
        features: all that the next layer reads already, ``(rows, features)``, with a column of ones for its bias.
        gradients: of the loss at that layer's outputs, ``(rows, outputs)``: the empirical Fisher matrix is used.
        activation: of the unit.
        biased: whether the unit has a bias.
        damping: of S and of A_p, see :func:`precision` and :func:`gains`.
        proposals: random units to begin with.
        steps: by which each is improved.
        generator: source of randomness.
    """

    def found(rows: Tensor) -> tuple[Tensor, Tensor]:
        """The unit of the largest gain on some rows, and its outgoing weights."""
        residual, inverse = unexplained(features[rows], gradients[rows]), precision(gradients[rows], damping)
        unit = ascended(inputs[rows], residual, inverse, activation, biased=biased, damping=damping,
                        proposals=proposals, steps=steps, generator=generator)[:1]  # fmt: skip
        return unit, outgoing(activation(inputs[rows] @ unit.T), residual, inverse)

    halves = _halves(len(inputs), generator)
    whole = precision(gradients, damping)
    curvature: Tensor = torch.linalg.pinv(whole, hermitian=True)
    each = []
    for fit, held in (halves, halves[::-1]):
        unit, weights = found(fit)
        residual = unexplained(features[held], gradients[held])
        each.append(along(activation(inputs[held] @ unit.T), residual, weights, curvature))
    gained, error = _squared(torch.cat(each))
    rows = found(torch.cat(halves))[0][0] if gained > 0 else None
    return Proposal(gained, score(features, gradients, whole), energy(gradients, whole), error=error, rows=rows)


def inserted(activations: Tensor, gradients: Tensor, weights: Tensor, *, biased: bool) -> tuple[Tensor, Tensor]:
    """What a hidden layer behind ReLUs would read, were it the identity, and the gradient at its pre-activations.

    Args:
        activations: of the units before it, ``(rows, units)``, not negative.
        gradients: at the outputs of those that read it, ``(rows, outputs)``.
        weights: what these make of the units, ``(outputs, units)``.
        biased: whether it has a bias: then what it reads ends with a column of ones.
    """
    ones = torch.ones(len(activations), 1).to(activations)
    read = torch.cat([activations, ones], 1) if biased else activations
    return read, (gradients @ weights) * (activations > 0)


def deepening(
    activations: Tensor,
    features: Tensor,
    gradients: Tensor,
    weights: Tensor,
    *,
    biased: bool,
    cost: float = 20.0,
    damping: float = 0.1,
    generator: torch.Generator | None = None,
) -> Proposal:
    """What a hidden layer, inserted behind ReLUs h as the identity relu(I h + 0), is worth on rows held out.

    Its gradient and its Fisher matrix are K-FAC's, as any layer's, see :func:`inserted`. The gain is what it explains
    of the gradient that no linear map of what the consumers read explains. Nothing is searched: each half of the rows
    says in which direction the new weights would go, the other what that is worth.

    Args:
        activations: of the units that it would read, ``(rows, units)``, not negative.
        features: all that the consumers read already, ``(rows, features)``, with a column of ones for their bias.
        gradients: of the loss at the consumers' outputs, ``(rows, outputs)``: the empirical Fisher matrix is used.
        weights: what the consumers make of the units, ``(outputs, units)``.
        biased: whether the new layer has a bias.
        cost: by which the gain is divided, beside that of a unit.
        damping: of S, see :func:`precision`.
        generator: source of randomness.
    """
    read, told = inserted(activations, gradients, weights, biased=biased)
    halves = _halves(len(activations), generator)
    left = [inserted(activations[half], unexplained(features[half], gradients[half]), weights, biased=biased)[1]
            for half in halves]  # fmt: skip
    curvature: Tensor = torch.linalg.pinv(precision(told, damping), hermitian=True)
    each = []
    for fit, held in ((0, 1), (1, 0)):
        moves = outgoing(read[halves[fit]], left[fit], precision(told[halves[fit]], damping))
        each.append(along(read[halves[held]], left[held], moves, curvature))
    gained, error = _squared(torch.cat(each))
    whole = precision(gradients, damping)
    return Proposal(gained, score(features, gradients, whole), energy(gradients, whole), cost=cost, error=error)


def _halves(rows: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Two halves of the rows, drawn at random."""
    order = torch.randperm(rows, generator=generator)
    return order[: rows // 2], order[rows // 2 :]


def _squared(each: Tensor) -> tuple[float, float]:
    """The square of a mean, negative where that is, and its standard error."""
    mean, error = float(each.mean()), float(each.std()) / math.sqrt(len(each))
    return mean * abs(mean), 2 * abs(mean) * error


def _basis(features: Tensor) -> Tensor:
    """An orthonormal basis of what the features span over the rows, ``(rows, rank)``."""
    left: Tensor
    left, values, _ = torch.linalg.svd(features, full_matrices=False)
    return left[:, values > _RANK * values.max()] if features.shape[1] else left
