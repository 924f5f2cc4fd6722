"""The one place that knows how stable-baselines3 names its networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.fresh import Init

_BATCH = 8
"""Observations in a traced call."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network of a model, with everything that :class:`recycle.Recycler` wants to know about it."""

    name: str
    """As it stands in log keys: ``recycle/<name>/...``."""
    module: nn.Module
    calls: tuple[Callable[[], Any], ...]
    """Every entry point that training uses, on a batch of made-up observations."""
    watch: Callable[[Any], Any]
    """Runs every layer on a batch of observations."""
    optimizers: tuple[Optimizer, ...]
    targets: tuple[tuple[nn.Module, float], ...]
    """Target networks with their ``tau``."""
    init: Init | None
    """How the policy's builder initialises, where it is not the layers' own way."""


def networks_of(model: BaseAlgorithm) -> list[Network]:
    """The trained networks of a PPO, A2C or DQN model.

    Raises:
        ValueError: the algorithm is not supported.
    """
    if isinstance(model, DQN):
        return [_dqn(model)]
    if isinstance(model, (PPO, A2C)) and isinstance(model.policy, ActorCriticPolicy):
        return [_actor_critic(model, model.policy)]
    raise ValueError(
        f"recycling is implemented for PPO, A2C and DQN, got {type(model).__name__}. "
        "Use recycle.trace and recycle.Recycler on its networks directly"
    )


def _dqn(model: DQN) -> Network:
    network = _plain(model.q_net)
    batch = observations(model)
    targets = ((_plain(model.q_net_target), float(model.tau)),)
    return Network("q_net", network, (lambda: network(batch),), network, (model.policy.optimizer,), targets, None)


def _actor_critic(model: BaseAlgorithm, policy: ActorCriticPolicy) -> Network:
    batch = observations(model)
    actions = _sample(model.action_space)
    chosen = torch.as_tensor(actions, device=model.device)
    chosen = chosen.long().flatten() if isinstance(model.action_space, spaces.Discrete) else chosen.float()
    init = _Orthogonal(policy) if policy.ortho_init else None
    call = (lambda: policy.evaluate_actions(batch, chosen),)

    def watch(obs: Any) -> Any:
        return policy.get_distribution(obs), policy.predict_values(obs)

    return Network("policy", policy, call, watch, (policy.optimizer,), (), init)


def _plain(module: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


class _Orthogonal:
    """How an actor-critic policy with ``ortho_init`` fills its layers: gain sqrt(2), heads .01 and 1, no bias."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy = policy
        self.gains = {"action_net": 0.01, "value_net": 1.0}

    def __call__(self, name: str, tensor: Tensor, generator: torch.Generator | None) -> None:
        owner, _, leaf = name.rpartition(".")
        if not isinstance(self.policy.get_submodule(owner), (nn.Linear, nn.Conv2d)):
            return
        with torch.no_grad():
            if leaf == "bias":
                tensor.zero_()
            else:
                nn.init.orthogonal_(tensor, self.gains.get(owner, math.sqrt(2)), generator=generator)


def observations(model: BaseAlgorithm) -> Any:
    """A batch of made-up observations, as the policy's networks take them (a tensor, or a dict of them)."""
    batch, _ = model.policy.obs_to_tensor(_sample(model.observation_space))
    return batch


def _sample(space: spaces.Space[Any]) -> Any:
    """``_BATCH`` samples that leave the space's own random state alone; huge bounds are cut to +-10."""
    if isinstance(space, spaces.Dict):
        return {key: _sample(part) for key, part in space.spaces.items()}
    twin = copy.deepcopy(space)
    twin.seed(0)
    batch = np.stack([np.asarray(twin.sample()) for _ in range(_BATCH)])
    if isinstance(space, spaces.Box) and np.issubdtype(batch.dtype, np.floating):
        wide = ~(np.abs(space.high) <= 1e3) | ~(np.abs(space.low) <= 1e3)
        draw = np.random.default_rng(0).normal(size=batch.shape)
        batch = np.where(wide, np.clip(draw, space.low, space.high), batch).astype(batch.dtype)
    return batch
