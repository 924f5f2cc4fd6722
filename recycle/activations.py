"""Tell an activation by what it does: no layer's name is trusted, and functions that no module holds are seen too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Activation: TypeAlias = Callable[[Tensor], Tensor]

KNOWN: dict[str, Activation] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu (tanh)": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "mish": F.mish,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "hardswish": F.hardswish,
}
"""Activations that are recognised, beside leaky ReLUs of any slope."""


def recognised(before: Tensor, after: Tensor, tolerance: float = 1e-4) -> tuple[str, Activation] | None:
    """Name and function of the activation that makes ``after`` of ``before``: the closest one, or None.

    Args:
        before: pre-activations, any shape.
        after: activations, the same shape.
        tolerance: largest difference, relative to the largest activation: that of single precision.

    Functions that agree on these values are not told apart: units that were positive throughout pass for ReLUs.
    """
    slope = _slope(before, after)
    leaky: dict[str, Activation] = {f"leaky relu ({slope:.3g})": lambda z: F.leaky_relu(z, slope)}
    known = KNOWN | leaky
    off = {name: float((function(before) - after).abs().max()) for name, function in known.items()}
    best = min(off, key=lambda name: off[name])
    return (best, known[best]) if off[best] <= tolerance * float(after.abs().max()) else None


def _slope(before: Tensor, after: Tensor) -> float:
    """Of the line through zero that the negative side is closest to."""
    low = before.clamp_max(0)
    return float((low * torch.where(before < 0, after, 0.0)).sum() / low.square().sum().clamp_min(1e-300))
