"""Read-only health of a layer: how many units are dead, dormant or duplicates, and how many directions are left."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle.graph import UnitGroup
from recycle.stats import Stats

DORMANT = 0.025
"""Dormancy threshold of Sokar et al. 2023 for DQN: a unit at or below this share of the layer's mean is dormant."""
SATURATED = 0.95
"""A bounded unit whose mean |activation| is above this is saturated."""
TWIN = 0.98
"""Units whose incoming weights have a larger cosine than this are duplicates."""

_ROWS = 1024
"""Units that are compared with all others at a time."""


def dead(stats: Stats) -> float:
    """Fraction of units that gave one and the same value for every input seen (for ReLU: zero)."""
    return _fraction(stats.dead)


def constant(stats: Stats) -> float:
    """Fraction of units that gave one and the same value other than zero: dead units behind a normalisation."""
    return _fraction(stats.dead & (stats.maximum != 0))


def dormant(stats: Stats, tau: float = DORMANT) -> float:
    """Fraction of units with a score of at most ``tau`` (Sokar et al. 2023, definition 3.1)."""
    return _fraction(stats.score <= tau)


def saturated(stats: Stats) -> float:
    """Fraction of units stuck near the bounds of a tanh-like activation; 0 for unbounded or one-sided ones."""
    bounded = bool((stats.minimum >= -1).all() and (stats.maximum <= 1).all() and (stats.minimum < 0).any())
    return _fraction(stats.mean_abs > SATURATED) if bounded else 0.0


def gradient_silent(stats: Stats) -> float:
    """Fraction of units through which no gradient flowed; NaN if gradients were not observed."""
    gradient = stats.gradient if not stats.gradient.isnan().all() else stats.weight_gradient
    return float("nan") if gradient.isnan().all() else _fraction(gradient == 0)


def effective_rank(activations: Tensor) -> float:
    """exp(entropy of the normalised singular values) of ``(samples, units)`` (Roy and Vetterli 2007); 0 if all zero."""
    values = _singular_values(activations)
    if not float(values.sum()):
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def stable_rank(activations: Tensor) -> float:
    """Sum of squared singular values over the largest squared one, of ``(samples, units)``; 0 if all zero."""
    values = _singular_values(activations).square()
    return float(values.sum() / values.max()) if float(values.sum()) else 0.0


def numerical_rank(activations: Tensor, tolerance: float = 0.01) -> int:
    """Singular values of ``(samples, units)`` above ``tolerance`` times the largest; 0 if all are zero.

    At most the smaller of both sizes. NORTH* (Maile, Rachelson, Luga and Wilson 2022) counts those above a fixed
    value; here layers and losses of any scale share one tolerance.
    """
    values = _singular_values(activations)
    return int((values > tolerance * values.max()).sum())


def duplicates(group: UnitGroup) -> Tensor:
    """Which units have a twin: another unit with the same incoming weights and bias up to scale, ``(width,)`` bool.

    A dead fraction of zero with duplicates everywhere is no capacity. A layer with few inputs has some by chance, so
    compare with the value at the start.
    """
    units = torch.arange(group.width)
    with torch.no_grad():
        rows = [axis.read(group.tensor(axis.name), units).double().flatten(1) for axis in group.incoming
                if axis.role in ("weight", "bias")]  # fmt: skip
        table = torch.nn.functional.normalize(torch.cat(rows, 1), dim=1).float()
        found = []
        for start in range(0, len(table), _ROWS):  # all cosines at once would be gigabytes in a wide layer
            cosines = table[start : start + _ROWS] @ table.t()
            cosines.diagonal(start).fill_(0)
            found.append((cosines > TWIN).any(1))
        return torch.cat(found).cpu()


def resemblance(group: UnitGroup, units: Tensor, others: Tensor) -> Tensor:
    """Cosine of the incoming weights and biases of ``units`` with those of ``others``, pair by pair: ``(units,)``."""
    with torch.no_grad():
        one, other = (
            torch.cat([axis.read(group.tensor(axis.name), chosen).double().flatten(1) for axis in group.incoming
                       if axis.role in ("weight", "bias")], 1)
            for chosen in (units, others)
        )  # fmt: skip
        return torch.nn.functional.cosine_similarity(one, other).cpu()


def _fraction(units: Tensor) -> float:
    return float(units.double().mean())


def _singular_values(activations: Tensor) -> Tensor:
    """Through the smaller Gram matrix: the samples kept are few, layers may be wide."""
    table = activations.detach().double()
    if not bool(table.isfinite().all()):
        return torch.zeros(1, dtype=torch.double)
    gram = table @ table.t() if table.shape[0] < table.shape[1] else table.t() @ table
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).sqrt() * (values > values.max() * 1e-14)
