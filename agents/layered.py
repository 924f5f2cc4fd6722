"""Policies with layer normalisation or concatenated ReLUs in every hidden layer, of any algorithm."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from agents.elastic import optimizers_of


class CReLU(nn.Module):
    """ReLUs of both signs, one behind the other (Shang et al. 2016; Abbas et al. 2023 against plasticity loss).

    ``(n, c, ...)`` to ``(n, 2c, ...)``. A unit is zero on one side only, so it does not die.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Positive parts, then negative ones."""
        return torch.cat([torch.relu(x), torch.relu(-x)], 1)


def layered_kwargs(kind: type[BaseAlgorithm], policy: str, *, layer_norm: bool, crelu: bool) -> dict[str, Any]:
    """The ``policy_kwargs`` with which :func:`layered` builds that policy of an algorithm. ::

        PPO(layered, env, policy_kwargs=layered_kwargs(PPO, "MlpPolicy", layer_norm=True, crelu=False))

    Raises:
        ValueError: the algorithm has no such policy.
    """
    if policy not in kind.policy_aliases:
        raise ValueError(f"{kind.__name__} has no policy {policy!r}: there are {', '.join(kind.policy_aliases)}")
    return {"layered_on": kind.policy_aliases[policy], "layer_norm": layer_norm, "crelu": crelu}


def layered(*args: Any, layered_on: type[BasePolicy], layer_norm: bool, crelu: bool, **kwargs: Any) -> BasePolicy:
    """A policy of class ``layered_on`` with other hidden layers; stands for it as a policy class, also in saved models.

    Args:
        args: for ``layered_on``; so are ``kwargs``.
        layered_on: the policy class.
        layer_norm: normalise before each activation (behind a convolution, all channels and positions together).
        crelu: each hidden layer computes half as many pre-activations and gives both signs of them: what the next
            layer reads is as wide as before.

    Raises:
        ValueError: no layer is followed by an activation, or ``crelu`` meets an odd width.
    """
    policy = layered_on(*args, **kwargs)
    changed: dict[nn.Parameter, list[nn.Parameter]] = {}
    for name, stack in list(policy.named_modules()):
        if isinstance(stack, nn.Sequential):
            for place in _hidden(name, stack):
                changed |= _rebuild(stack, place, layer_norm, crelu)
    if not changed:
        raise ValueError(
            f"{layered_on.__name__} has no Linear or Conv2d layer directly followed by an activation: "
            "layer norm and CReLU have no place in it"
        )
    for optimizer in optimizers_of(policy):
        for group in optimizer.param_groups:
            group["params"] = [new for old in group["params"] for new in changed.get(old, [old])]
    return policy


def _hidden(name: str, stack: nn.Sequential) -> list[int]:
    """Places of the activations that follow a layer; but the one that squashes the actions of TD3 and DDPG."""
    found = []
    for place, layer in enumerate(stack):
        follows = place and isinstance(stack[place - 1], (nn.Linear, nn.Conv2d))
        squashes = name.rpartition(".")[2] == "mu" and place == len(stack) - 1
        if follows and not squashes and type(layer).__module__ == "torch.nn.modules.activation":
            found.append(place)
    return found


def _rebuild(stack: nn.Sequential, place: int, layer_norm: bool, crelu: bool) -> dict[nn.Parameter, list[nn.Parameter]]:
    """Change one layer and its activation. Returns old parameter -> those in its place."""
    layer: Any = stack[place - 1]
    size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    changed = {parameter: [parameter] for parameter in layer.parameters()}
    activation: nn.Module = stack[place]
    if crelu:
        width = getattr(layer, size)
        if width % 2:
            raise ValueError(f"crelu gives both signs of half of a layer's units: its width must be even, got {width}")
        for leaf, parameter in list(layer.named_parameters()):
            half = nn.Parameter(parameter.detach()[: width // 2].clone())
            setattr(layer, leaf, half)
            changed[parameter] = [half]
        setattr(layer, size, width // 2)
        activation = CReLU()
    if layer_norm:
        width = getattr(layer, size)
        norm: nn.Module = nn.LayerNorm(width) if isinstance(layer, nn.Linear) else nn.GroupNorm(1, width)
        norm.to(next(layer.parameters()).device)
        activation = nn.Sequential(norm, activation)
        changed[list(changed)[-1]] += norm.parameters()
    stack[place] = activation
    return changed
