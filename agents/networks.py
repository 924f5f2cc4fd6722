"""The one place that knows how stable-baselines3 names its networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
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
    box: tuple[Callable[[Any], Any], Any, Any] | None = None
    """What :func:`recycle.certify` wants to know: runs every layer on one preprocessed observation; its smallest and
    its largest values. None where observations are not bounded."""


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
    q_net: Any = network
    box = _box(model, lambda x: q_net.q_net(q_net.features_extractor(x)))
    return Network("q_net", network, (lambda: network(batch),), network, (model.policy.optimizer,), targets, None, box)


def _actor_critic(model: BaseAlgorithm, policy: ActorCriticPolicy) -> Network:
    batch = observations(model)
    actions = _sample(model.action_space)
    chosen = torch.as_tensor(actions, device=model.device)
    chosen = chosen.long().flatten() if isinstance(model.action_space, spaces.Discrete) else chosen.float()
    init = _Orthogonal(policy) if policy.ortho_init else None
    call = (lambda: policy.evaluate_actions(batch, chosen),)

    def watch(obs: Any) -> Any:
        return policy.get_distribution(obs), policy.predict_values(obs)

    box = _box(model, partial(_both_heads, policy))
    return Network("policy", policy, call, watch, (policy.optimizer,), (), init, box)


def _both_heads(policy: Any, x: Any) -> Any:
    """Actor and critic on preprocessed observations."""
    shared = policy.share_features_extractor
    actor = policy.features_extractor(x) if shared else policy.pi_features_extractor(x)
    critic = actor if shared else policy.vf_features_extractor(x)
    return (
        policy.action_net(policy.mlp_extractor.forward_actor(actor)),
        policy.value_net(policy.mlp_extractor.forward_critic(critic)),
    )


def _box(model: BaseAlgorithm, run: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Any, Any] | None:
    """``run`` with the least and the largest preprocessed observation, or None where the space is not bounded."""
    wrapper = model.get_vec_normalize_env()
    clip = wrapper.clip_obs if wrapper is not None and wrapper.norm_obs else None
    ends = _ends(model.observation_space, model, clip)
    return None if ends is None else (run, *ends)


def _ends(space: spaces.Space[Any], model: BaseAlgorithm, clip: float | None) -> tuple[Any, Any] | None:
    """The least and the largest observation of a space, as ``preprocess_obs`` gives them to the features extractor."""
    if isinstance(space, spaces.Dict):
        wrapper = model.get_vec_normalize_env()
        clipped = wrapper.norm_obs_keys or () if wrapper is not None else ()
        parts = {key: _ends(part, model, clip if key in clipped else None) for key, part in space.spaces.items()}
        if any(part is None for part in parts.values()):
            return None
        return {k: p[0] for k, p in parts.items() if p}, {k: p[1] for k, p in parts.items() if p}
    if isinstance(space, spaces.Box):
        low, high = space.low, space.high
        if clip is not None:
            low, high = np.full_like(low, -clip, dtype=np.float32), np.full_like(high, clip, dtype=np.float32)
        if not max(np.abs(low).max(initial=0), np.abs(high).max(initial=0)) < _HUGE:
            return None
        normalize = clip is None and bool(model.policy.normalize_images)
        ends = (
            preprocess_obs(torch.as_tensor(end[None], device=model.device), space, normalize) for end in (low, high)
        )
        least, most = ends
        return least, most
    size = get_flattened_obs_dim(space)  # one-hot codes, or bits
    return torch.zeros(1, size, device=model.device), torch.ones(1, size, device=model.device)


_HUGE = 1e30
"""Bounds as large as this stand for none: CartPole's velocities have those of float32."""


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
