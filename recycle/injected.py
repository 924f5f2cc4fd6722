"""Layers into which plasticity was injected."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Injected(nn.Module):
    """A layer three times: its old self and a copy of the new one, both frozen, and a new one that is trained.

    Their parameters are called ``old``, ``twin`` and ``new``.
    """

    def __init__(self, layer: nn.Linear, new: nn.Linear) -> None:
        super().__init__()
        self.old, self.new, self.twin = layer, new, copy.deepcopy(new)
        for parameter in (*self.old.parameters(), *self.twin.parameters()):
            parameter.requires_grad_(False)
            parameter.grad = None


class InjectedHidden(Injected):
    """The hidden layer: three layers' units, one behind the other."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., 3 * out)``."""
        return torch.cat([self.old(x), self.new(x), self.twin(x)], -1)


class InjectedOutput(Injected):
    """An output layer: each part reads its own third; the new one counts less its frozen copy."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 3 * in)`` to ``(..., out)``."""
        old, new, twin = x.chunk(3, -1)
        result: Tensor = self.old(old) + (self.new(new) - self.twin(twin))
        return result


def is_injected(module: nn.Module) -> bool:
    """Whether plasticity was injected into some layer of the module."""
    return any(isinstance(layer, Injected) for layer in module.modules())
