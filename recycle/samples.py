"""What one pass showed of a layer: inputs, pre-activations and their gradients; and where splitting would help most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recycle.graph import UnitGroup
from recycle.rows import Look, Pass

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_ROWS = 2048
"""Values of each unit that are looked at, at most."""
_STEPS = 24
"""Steps of the Lanczos iteration: each costs two products of the sample with one vector for each unit."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Values of one pass at the layer that makes a group's units, float64, on the CPU."""

    inputs: Tensor
    """What the units' weights met: ``(values, fan_in)``, with a last column of ones where the layer has a bias."""
    outputs: Tensor
    """The units' pre-activations, ``(values, width)``."""
    gradient: Tensor
    """Gradient of the loss at the pre-activations, ``(values, width)``."""


def looks(group: UnitGroup) -> list[Look]:
    """Where to look for a :class:`Sample`: at the one layer that makes the units, with no normalisation behind it."""
    made = group.producers() if not group.norms() else []
    return [Look(layer, axis.name, said=True, told=True) for layer, axis in made if len(made) == 1]


def sample_of(group: UnitGroup, passes: Sequence[Pass]) -> Sample | None:
    """The sample of the latest pass that was kept, None without one or where the layer has no closed form."""
    if not passes:
        return None
    ((layer, axis),) = group.producers()
    seen = passes[-1].readings[axis.name]
    assert seen.said is not None and seen.told is not None
    return as_sample(layer, axis.index[:, 0], seen.read, seen.said, seen.told)


def as_sample(layer: nn.Module, units: Tensor, inputs: Tensor, outputs: Tensor, gradient: Tensor) -> Sample | None:
    """One row for each sample and position of what was kept of a Linear or a plain convolution; else None."""
    if isinstance(layer, nn.Linear):
        x = inputs.double().cpu().reshape(-1, layer.in_features)
        axis = -1
    elif is_plain_convolution(layer) and inputs.dim() == len(layer.kernel_size) + 2:
        x = patches(layer, inputs.double().cpu())
        axis = 1
    else:
        return None
    if layer.bias is not None:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    thin = max(1, -(-len(x) // _ROWS))
    z, g = (t.double().cpu().movedim(axis, -1).flatten(0, -2)[::thin][:, units] for t in (outputs, gradient))
    return Sample(x[::thin], z, g)


def is_plain_convolution(layer: nn.Module) -> TypeGuard[Convolution]:
    """Whether it is a convolution in one group, padded with zeros by numbers: one that :func:`patches` knows."""
    return (
        isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def patches(layer: Convolution, x: Tensor) -> Tensor:
    """What the kernel meets at each position, in the order of its weights: ``(samples * positions, fan_in)``.

    Of a :func:`plain convolution <is_plain_convolution>`.
    """
    axes, padding = len(layer.kernel_size), layer.padding
    assert not isinstance(padding, str)
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for axis, (size, gap, stride) in enumerate(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, stride)[..., ::gap]
    return x.movedim(1, 1 + axes).flatten(1 + axes).flatten(0, axes)


def steepest(sample: Sample, softness: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Smallest eigenvalue of each unit's splitting matrix, and its direction (Liu et al. 2019, theorem 2.3).

    Halves of a unit that move apart by +e and -e along a direction v change the loss by e^2 / 2 v'Sv, where S is the
    sum of dL/dh s''(z) x x' over the sample. A ReLU's s'' is zero but on its hinge, where it is infinite: it is taken
    as that of a softplus, p (1 - p) / w with p = sigmoid(z / w), as wide as ``w = softness * std(z)``. The gradient
    is that at the pre-activation, so only the active side of the hinge is seen.

    S itself is never built: a Lanczos iteration within the span of the inputs multiplies it with one vector for each
    unit. Where no direction is negative the eigenvalue may be too large, and is never less than zero.

    Returns:
        Eigenvalues ``(width,)`` and unit vectors ``(width, fan_in)``, or ``fan_in + 1`` with the bias last.
    """
    std = sample.outputs.std(0)
    wide = torch.where(std > 0, softness * std, torch.inf)
    p = torch.sigmoid(sample.outputs / wide)
    weight = sample.gradient * p * (1 - p) / wide
    span, inside = torch.linalg.qr(sample.inputs.T)  # (fan_in, rank), (rank, values)

    def times(vectors: Tensor) -> Tensor:
        image: Tensor = (weight.T * (vectors @ inside)) @ inside.T
        return image

    width, rank = weight.shape[1], len(inside)
    v = torch.randn(width, rank, generator=generator, dtype=torch.double)
    v = v / v.norm(dim=1, keepdim=True)
    basis = torch.zeros(width, 0, rank, dtype=torch.double)
    steps = min(rank, _STEPS)
    small = torch.zeros(width, steps, steps, dtype=torch.double)  # S in the basis
    for k in range(steps):
        basis = torch.cat([basis, v[:, None]], 1)
        image = times(v)
        small[:, k, : k + 1] = small[:, : k + 1, k] = torch.einsum("ukr,ur->uk", basis, image)
        left = image
        for _ in range(2):  # once is not orthogonal enough
            left = left - torch.einsum("uk,ukr->ur", torch.einsum("ukr,ur->uk", basis, left), basis)
        size = left.norm(dim=1, keepdim=True)
        new = size > 1e-9 * image.norm(dim=1, keepdim=True)
        v = torch.where(new, left / size.clamp_min(torch.finfo(torch.double).tiny), 0.0)
    values, vectors = torch.linalg.eigh(small)
    return values[:, 0], torch.einsum("uk,ukr->ur", vectors[:, :, 0], basis) @ span.T
