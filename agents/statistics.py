"""Interquartile means with bootstrap intervals: what a handful of seeds can honestly say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, trim_mean

Floats: TypeAlias = NDArray[np.float64]
Values: TypeAlias = Sequence[float] | Floats


@dataclass(frozen=True)
class Estimate:
    """An IQM with its interval and the number of values behind it; `low` and `high` are nan for one value."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """``1.20 [1.05, 1.38]``; the interval is left out where there is none."""
        interval = "" if np.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


def iqm(values: Values) -> float:
    """Average the middle half of the values, so that one lucky or lost seed does not decide.

    A quarter of the values, rounded down, is cut from each end: fewer than 4 values give their plain mean.
    ValueError on no values, or on one that is not finite.
    """
    return float(trim_mean(_checked(values), 0.25))


def interval(values: Values, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Bound the IQM by a percentile bootstrap over the values: (low, high), in their unit.

    The same call gives the same bounds. Equal values give (value, value); a single one cannot be resampled
    and gives (nan, nan). ValueError on no values, on one that is not finite, or a confidence outside (0, 1).
    """
    _, low, high = band(_checked(values)[:, None], confidence, resamples, seed)
    return float(low[0]), float(high[0])


def band(
    values: NDArray[Any], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Draw the IQM over seeds along a curve: (iqm, low, high) for each column of (seeds, points).

    The bounds are those of `interval`, point by point; nan for a single seed.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}. Pass 0.95 for 95 %.")
    curves = np.asarray(values, dtype=np.float64)
    middle = np.asarray(trim_mean(curves, 0.25, axis=0))
    low, high = np.full((2, curves.shape[1]), np.nan)
    if len(curves) < 2:
        return middle, low, high
    constant = (curves == curves[0]).all(axis=0)
    low[constant] = high[constant] = curves[0, constant]  # no resampling: its rounding would show
    if not constant.all():
        found = bootstrap(
            (curves[:, ~constant],),
            lambda sample, axis: trim_mean(sample, 0.25, axis=axis),
            axis=0,
            vectorized=True,
            method="percentile",
            confidence_level=confidence,
            n_resamples=resamples,
            batch=max(1, 4_000_000 // curves.size),  # resamples at a time: 32 MB each
            random_state=seed,
        ).confidence_interval
        low[~constant], high[~constant] = found.low, found.high
    return middle, low, high


def estimate(values: Values, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Say where the values lie: their IQM, its interval and how many there were."""
    low, high = interval(values, confidence, resamples, seed)
    return Estimate(iqm(values), low, high, len(values))


def paired_difference(a: Values, b: Values, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Say by how much `a` exceeds `b`, seed by seed: the IQM of a - b with its interval.

    Both hold one value per seed, in the same order of seeds: what a seed does to both cancels.
    ValueError if their lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(
            f"Pairs need one value per seed on both sides: got {len(a)} and {len(b)}. Pass the shared seeds."
        )
    return estimate(_checked(a) - _checked(b), confidence, resamples, seed)


def align(
    curves: Sequence[tuple[NDArray[Any], Floats]], end: float, points: int, *, least: int = 1
) -> tuple[Floats, Floats]:
    """Put the curves of several runs on common steps up to `end`: (steps, values of shape (runs, steps)).

    Each curve is (steps, values). If all were measured at the same steps, few enough (`points` / `least`),
    these are kept. Otherwise values are averaged in equal bins: `points` of them, halved (not below 10)
    until nine in ten hold `least` values of every run. A bin that lacks a run is left out; nothing is filled.
    """
    cut = [(steps[steps <= end], values[steps <= end]) for steps, values in curves]
    first = cut[0][0]
    shared = all(np.array_equal(first, steps) for steps, _ in cut) and bool(np.all(np.diff(first) > 0))
    if shared and 0 < len(first) <= points // least:
        return first.astype(np.float64), np.stack([values for _, values in cut])
    while True:
        edges = np.linspace(0, end, points + 1)
        bins = [np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, points - 1) for steps, _ in cut]
        counts = np.stack([np.bincount(own, minlength=points) for own in bins])
        if (counts >= least).all(axis=0).mean() >= 0.9 or points < 20:
            break
        points //= 2
    sums = np.stack([np.bincount(b, values, points) for b, (_, values) in zip(bins, cut, strict=True)])
    full = (counts > 0).all(axis=0)
    return ((edges[:-1] + edges[1:]) / 2)[full], sums[:, full] / counts[:, full]


def _checked(values: Values) -> Floats:
    """Return the values as a float array, or refuse them."""
    checked = np.asarray(values, dtype=np.float64)
    if checked.ndim != 1 or not checked.size:
        raise ValueError(f"Expected one value per seed, got an array of shape {checked.shape}.")
    if not np.isfinite(checked).all():
        raise ValueError(f"Expected finite values, got {checked.tolist()}. Leave out what was not measured.")
    return checked
