"""Observations to look at networks with: recent ones, and for tracing and certificates some that nobody made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

BATCH = 8
"""Samples in a batch."""

Box = tuple[Callable[[Any], Any], Any, Any]
"""What :func:`recycle.certify` wants: a call on one preprocessed observation, its smallest and its largest values."""


def observations(model: BaseAlgorithm) -> Any:
    """A batch of made-up observations, as the policy's networks take them (a tensor, or a dict of them)."""
    batch, _ = model.policy.obs_to_tensor(sample(model.observation_space))
    return batch


def recent(model: BaseAlgorithm, most: int = 64) -> Any:
    """Observations of the latest rollout or the replay buffer, spread over it, as the policy's networks take them.

    Read it before the next rollout begins, which empties an on-policy model's buffer.
    """
    buffer, rows, _ = _held(model)
    count = rows * buffer.n_envs
    return taken(model, np.linspace(0, count - 1, min(most, count)).astype(int))


def taken(model: BaseAlgorithm, chosen: NDArray[np.integer]) -> Any:
    """Observations of the latest rollout or the replay buffer, as the policy's networks take them.

    Args:
        model: whose buffer is not empty.
        chosen: which, counted step by step and within a step environment by environment.
    """
    buffer, rows, wrapper = _held(model)

    def flat(values: Any) -> Any:
        return values[:rows].reshape(-1, *values.shape[2:])[chosen]

    held = buffer.observations
    batch = {k: flat(v) for k, v in held.items()} if isinstance(held, dict) else flat(held)
    batch = buffer._normalize_obs(batch, wrapper)
    return {k: buffer.to_torch(v) for k, v in batch.items()} if isinstance(batch, dict) else buffer.to_torch(batch)


def _held(model: BaseAlgorithm) -> tuple[Any, int, VecNormalize | None]:
    """The buffer, for how many steps it holds what happened, and what has yet to normalise that."""
    rollout: Any = getattr(model, "rollout_buffer", None)
    if rollout is not None:
        return rollout, len(rollout.rewards), None
    replay: Any = model.replay_buffer  # type: ignore[attr-defined]
    return replay, replay.size(), model.get_vec_normalize_env()


@contextmanager
def evaluating(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Put layers into evaluation mode for the block."""
    modes = [(layer, layer.training) for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def sample(space: spaces.Space[Any]) -> Any:
    """``BATCH`` samples that leave the space's own random state alone; huge bounds are cut to +-10."""
    if isinstance(space, spaces.Dict):
        return {key: sample(part) for key, part in space.spaces.items()}
    twin = copy.deepcopy(space)
    twin.seed(0)
    batch = np.stack([np.asarray(twin.sample()) for _ in range(BATCH)])
    if isinstance(space, spaces.Box) and np.issubdtype(batch.dtype, np.floating):
        wide = ~(np.abs(space.high) <= 1e3) | ~(np.abs(space.low) <= 1e3)
        draw = np.random.default_rng(0).normal(size=batch.shape)
        batch = np.where(wide, np.clip(draw, space.low, space.high), batch).astype(batch.dtype)
    return batch


def box(model: BaseAlgorithm, run: Callable[[Any], Any]) -> Box | None:
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
