"""Observations that nobody made, for tracing and certificates, and recent ones to look at a network with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs

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
    buffer: Any = getattr(model, "rollout_buffer", None)
    if buffer is None:
        buffer = model.replay_buffer  # type: ignore[attr-defined]
        rows, wrapper = buffer.size(), model.get_vec_normalize_env()
    else:
        rows, wrapper = len(buffer.rewards), None  # normalised already

    def taken(values: Any) -> Any:
        return values[:rows].reshape(-1, *values.shape[2:])

    held = buffer.observations
    flat = {k: taken(v) for k, v in held.items()} if isinstance(held, dict) else taken(held)
    count = len(next(iter(flat.values())) if isinstance(flat, dict) else flat)
    chosen = np.linspace(0, count - 1, min(most, count)).astype(int)
    batch = {k: v[chosen] for k, v in flat.items()} if isinstance(flat, dict) else flat[chosen]
    found, _ = model.policy.obs_to_tensor(buffer._normalize_obs(batch, wrapper))
    return found


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
