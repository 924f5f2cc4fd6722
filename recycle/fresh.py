"""What the module's own initialisation would give its units now."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from recycle.graph import Axis, UnitGroup

Init: TypeAlias = Callable[[str, Tensor, torch.Generator | None], None]
"""``(parameter name, tensor, generator) -> None``: fills the tensor as the model's builder would have.

The tensor comes filled by the layer's own ``reset_parameters``; leaving it alone keeps that.
"""


def fresh_rows(
    group: UnitGroup, units: Tensor, init: Init | None, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """What the module's own initialisation gives ``units``, one tensor for each incoming axis.

    A bare parameter, which no ``reset_parameters`` knows, gets rows of the scale of the units that stay.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn: dict[str, dict[str, Tensor]] = {}
    result = []
    for axis in group.incoming:
        owner, _, leaf = axis.name.rpartition(".")
        if owner not in drawn:
            drawn[owner] = _reinitialised(group.module.get_submodule(owner), seed + len(drawn))
        tensor = group.tensor(axis.name)
        fresh = drawn[owner].get(leaf)
        if fresh is None:
            rows = _like_the_others(axis, tensor, units, generator)
            fresh = tensor.detach().clone()
            axis.write(fresh, units, rows)
        if init is not None:
            init(axis.name, fresh, generator)
        result.append(axis.read(fresh, units).to(tensor))
    return tuple(result)


def fresh_layer(
    module: nn.Module, path: str, init: Init | None, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """What the module's own initialisation gives the layer at ``path`` now: its parameters and buffers, by name."""
    seed = int(torch.randint(2**62, (), generator=generator))
    layer = module.get_submodule(path)
    drawn = _reinitialised(layer, seed)
    for leaf in layer._parameters:
        if init is not None and leaf in drawn:
            init(f"{path}.{leaf}" if path else leaf, drawn[leaf], generator)
    return drawn


def knows_its_beginning(layer: nn.Module) -> bool:
    """Whether ``reset_parameters`` fills every parameter that the layer itself holds."""
    held = [k for k, p in layer._parameters.items() if p is not None]
    drawn = _reinitialised(layer, 0, math.nan)
    return bool(held) and all(k in drawn and bool(drawn[k].isfinite().all()) for k in held)


def _reinitialised(layer: nn.Module, seed: int, before: float | None = None) -> dict[str, Tensor]:
    """Freshly initialised copies of a layer's own tensors, by ``reset_parameters``; {} if it has none.

    {} as well where it would fill a weight that is computed from others (``torch.nn.utils.parametrize``).

    ``before``: what parameters hold until then; None: what they hold in the layer.
    """
    reset = getattr(type(layer), "reset_parameters", None)
    if reset is None or is_parametrized(layer):
        return {}
    twin = copy.copy(layer)
    twin._parameters = {
        k: None if p is None else nn.Parameter(torch.empty_like(p, device="cpu").copy_(p.detach()))
        for k, p in layer._parameters.items()
    }
    if before is not None:
        for parameter in twin._parameters.values():
            if parameter is not None:
                parameter.detach().fill_(before)
    twin._buffers = {k: None if b is None else b.detach().cpu().clone() for k, b in layer._buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        reset(twin)
    return {k: t.detach() for k, t in (*twin._parameters.items(), *twin._buffers.items()) if t is not None}


def _like_the_others(axis: Axis, tensor: Tensor, units: Tensor, generator: torch.Generator | None) -> Tensor:
    stays = torch.ones(len(axis.index), dtype=torch.bool)
    stays[units] = False
    others = axis.read(tensor.detach(), (stays if stays.any() else ~stays).nonzero()[:, 0])
    like = axis.read(tensor.detach(), units)
    if axis.role == "weight":
        draw = torch.randn(like.shape, generator=generator, dtype=torch.double).to(like)
        return draw * others.square().mean().sqrt()
    return torch.zeros_like(like) if axis.role == "bias" else others.mean(0, keepdim=True).expand_as(like)
