"""Per-unit statistics of one window: what a method reads, and the running moments they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KEPT = 256
"""Rows of activations kept of the latest sampled pass, for effective rank."""


@dataclass(frozen=True, eq=False)
class Stats:
    """What was seen of a group's units since the last event. Every tensor is ``(width,)``, float64, on the CPU.

    "Activation" is a unit's output as its consumers read it, over samples and positions (time, space).
    """

    samples: int
    """Sampled values of each unit, the smallest over its consumers; 0 if nothing was seen."""
    firing_rate: Tensor
    """Share of activations that are not zero."""
    mean: Tensor
    mean_abs: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor
    gradient: Tensor
    """Mean absolute gradient of the loss at the pre-activation; 0 for a dead ReLU, NaN where not observed.

    Each sampled pass counts the same. Under a loss scaler it carries the scale."""
    weight_gradient: Tensor
    """Mean absolute gradient of the incoming weights at ``optimizer.step()``, NaN where not observed."""
    age: Tensor
    """Updates since the unit was last recycled, or since tracking began."""
    incoming_norm: Tensor
    """L2 norm of the incoming weights."""
    outgoing_norm: Tensor
    """L1 norm of the outgoing weights: how much the consumers listen."""
    finite: bool = True
    """False if a NaN or an infinity was seen; such a window says nothing."""
    generator: torch.Generator | None = None
    """Source of randomness for methods that draw."""

    @property
    def dead(self) -> Tensor:
        """Units that gave zero, or another constant that can be folded away, for every input seen."""
        constant = self.minimum == self.maximum
        return constant if self.samples > 1 else torch.zeros_like(constant)

    @property
    def score(self) -> Tensor:
        """Dormancy score: mean |activation| over the layer's mean of it (Sokar et al. 2023, eq. 1)."""
        return self.mean_abs / self.mean_abs.mean().clamp_min(1e-9)

    @property
    def utility(self) -> Tensor:
        """Mean |activation| times outgoing L1 norm: what the consumers receive of a unit."""
        return self.mean_abs * self.outgoing_norm


def wide(values: Tensor) -> Tensor:
    """Half precision as single: it counts no further than 2048."""
    return values.float() if values.element_size() < 4 else values


def largest(seen: list[Tensor], missing: Tensor) -> Tensor:
    """The largest of several, unit by unit: a unit learns if one of its branches does."""
    return torch.stack(seen).amax(0) if seen else missing


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Window:
    """Running moments of one observation point, on the device of the activations."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.count = 0
        self.sums: Tensor | None = None  # (3, width): fired, |a|, a
        self.centred: Tensor | None = None  # (2, width): mean and sum of squared deviations
        self.extremes: Tensor | None = None  # (2, width): maximum of a and of -a
        self.latest: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {k: _cloned(getattr(self, k)) for k in ("count", "sums", "centred", "extremes", "latest")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for key, value in state.items():
            setattr(self, key, _cloned(value))

    def add(self, act: Tensor) -> None:
        """Add ``act`` of shape ``(values, width)``."""
        act = wide(act)
        count = act.shape[0]
        double = torch.float64 if act.device.type != "mps" else torch.float32
        sums = torch.stack([(act != 0).to(act.dtype).sum(0), act.abs().sum(0), act.sum(0)]).to(double)
        variance, mean = torch.var_mean(act, 0, correction=0)
        low, high = torch.aminmax(act, dim=0)
        extremes = torch.stack([high, -low])
        centred = torch.stack([mean, variance * count]).to(double)
        if self.sums is None or self.centred is None or self.extremes is None:
            self.sums, self.centred, self.extremes = sums, centred, extremes
        else:  # parallel variance, Chan et al. 1979
            total = self.count + count
            step = centred[0] - self.centred[0]
            self.centred[0] += step * (count / total)
            self.centred[1] += centred[1] + step.square() * (self.count * count / total)
            self.sums += sums
            self.extremes = torch.maximum(self.extremes, extremes)
        self.count += count
        self.latest = act[:_KEPT].clone()


class Gradients:
    """Running mean of absolute gradients; passes that are not finite (a loss scaler's overflow) do not count."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {"total": _cloned(self.total), "count": _cloned(self.count)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.total, self.count = _cloned(state["total"]), _cloned(state["count"])

    def add(self, values: Tensor) -> None:
        """Add one pass, ``(width,)``."""
        good = values.isfinite().all()
        values = torch.where(good, values, 0.0)
        self.total = values if self.total is None else self.total + values
        self.count = good.long() if self.count is None else self.count + good

    def mean(self, width: int) -> Tensor:
        """``(width,)``; NaN if nothing counted."""
        if self.total is None or self.count is None:
            return torch.full((width,), float("nan"), dtype=torch.double)
        return (self.total / self.count).double().cpu()


def read(window: Window) -> dict[str, Tensor]:
    """The fields of :class:`Stats` that one observation point gives."""
    assert window.sums is not None and window.centred is not None and window.extremes is not None
    fired, absolute, total = (window.sums / window.count).double().cpu()
    high, low = window.extremes.double().cpu()
    return {
        "firing_rate": fired,
        "mean": total,
        "mean_abs": absolute,
        "variance": (window.centred[1] / window.count).double().cpu(),
        "minimum": -low,
        "maximum": high,
    }


def joined(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several consumers that read different values of the units: a unit is as alive as its liveliest reader."""
    result = dict(seen[0])
    for other in seen[1:]:
        for key, value in other.items():
            if key != "mean":
                result[key] = (torch.minimum if key == "minimum" else torch.maximum)(result[key], value)
    return result
