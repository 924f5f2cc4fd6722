"""Everything that a training run consists of besides its weights, as plain values, and back.

Taken and restored where a rollout begins: PPO's buffer is empty there, no graph is pending, and targets fit their
networks. Weights and optimizers are what stable-baselines3 itself saves; environments and the replay buffer, which
are large, go their own ways (:mod:`agents.checkpoint`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from agents.callback import RecycleCallback
from agents.command_line import say
from agents.elastic import elastic
from agents.injected import injected
from agents.logs import RunLogger
from agents.plain import from_plain, to_plain

COUNTED = (
    "num_timesteps", "_num_timesteps_at_start", "_total_timesteps", "_episode_num", "_n_updates", "_n_calls",
    "_current_progress_remaining", "exploration_rate", "learning_starts", "_last_obs", "_last_original_obs",
    "_last_episode_starts", "_last_lstm_states", "ep_info_buffer", "ep_success_buffer", "recycle_state",
)  # fmt: skip
"""Attributes of stable-baselines3's algorithms that training changes, besides networks, optimizers and buffers."""


def state_of(model: BaseAlgorithm, callbacks: Sequence[BaseCallback]) -> dict[str, Any]:
    """What :func:`restore` and :func:`restore_generators` need, as plain tensors, numbers and strings.

    Args:
        model: between two rollouts, its networks built and its environments reset.
        callbacks: those with a ``state_dict`` are asked for it; a RecycleCallback writes its own onto the model.
    """
    for callback in callbacks:
        if isinstance(callback, RecycleCallback):
            callback.keep_state()
    logger = model.logger
    found = {
        "algorithm": type(model).__name__,
        "architecture": architecture(model),
        "model": {name: getattr(model, name) for name in COUNTED if hasattr(model, name)},
        "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in callbacks],
        "elapsed": max(0, time.time_ns() - model.start_time),
        "iterations": getattr(logger, "iterations", 0),
        "unwritten": [dict(logger.name_to_value), dict(logger.name_to_count), dict(logger.name_to_excluded)],
        "normalizers": [
            [each.returns, *([rms.mean, rms.var, rms.count] for rms in _running(each))]
            for each in _normalizers(model.get_env())
        ],
        "noise": [[dist.exploration_mat, dist.exploration_matrices] for dist in _noises(model)],
        "generators": {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else None,
            "actions": model.action_space.np_random.bit_generator.state,
        },
    }
    plain: dict[str, Any] = to_plain(found)
    return plain


def restore(state: dict[str, Any], model: BaseAlgorithm, callbacks: Sequence[BaseCallback]) -> None:
    """Put a model, its vectorised environment's wrappers and its callbacks where ``state`` was taken.

    The model has been built as that one was (:func:`rebuild`) and has its weights; call it before callbacks look at
    the model, and :func:`restore_generators` when the first rollout begins.
    """
    for name, value in from_plain(state["model"]).items():
        now = getattr(model, name, None)
        if isinstance(now, tuple) and hasattr(
            now, "_fields"
        ):  # RecurrentPPO's memory, a named tuple of tensors on the model's device
            value = type(now)(*(tuple(t.to(model.device) for t in pair) for pair in value))
        setattr(model, name, value)
    for normalizer, kept in zip(_normalizers(model.get_env()), from_plain(state["normalizers"]), strict=True):
        normalizer.returns, *moments = kept
        for rms, saved in zip(_running(normalizer), moments, strict=True):
            rms.mean, rms.var, rms.count = saved
    for callback, kept in zip(callbacks, from_plain(state["callbacks"]), strict=True):
        if kept is not None:
            callback.load_state_dict(kept)  # type: ignore[attr-defined]


def restore_generators(state: dict[str, Any], model: BaseAlgorithm) -> None:
    """Put all random generators, what was drawn for the rollout, and what waits to be logged where they were."""
    generators = from_plain(state["generators"])
    random.setstate(generators["python"])
    np.random.set_state(generators["numpy"])
    torch.set_rng_state(generators["torch"])
    if (generators["cuda"] is None) != (model.device.type != "cuda"):
        say(f"the run trains on {model.device} now and did not before: it will not be bit-identical")
    elif generators["cuda"] is not None:
        torch.cuda.set_rng_state(generators["cuda"], model.device)
    model.action_space.np_random.bit_generator.state = generators["actions"]
    for dist, (one, several) in zip(_noises(model), from_plain(state["noise"]), strict=True):
        dist.exploration_mat, dist.exploration_matrices = one.to(model.device), several.to(model.device)
    logger = model.logger
    books: tuple[dict[str, Any], ...] = (logger.name_to_value, logger.name_to_count, logger.name_to_excluded)
    for book, kept in zip(books, from_plain(state["unwritten"]), strict=True):
        book.clear()
        book.update(kept)
    if isinstance(logger, RunLogger):
        logger.before = state["iterations"]
    model.start_time = time.time_ns() - state["elapsed"]
    model._num_timesteps_at_start = state["model"]["_num_timesteps_at_start"]


# What the policy was built as ------------------------------------------------------------------------------------


_STANDS_FOR: dict[str, tuple[Any, str]] = {"elastic": (elastic, "base_class"), "injected": (injected, "injected_into")}
"""Our policy classes that stand for another one, and the keyword that names that."""


def architecture(model: BaseAlgorithm) -> dict[str, Any]:
    """What recycling made of the policy's structure: our policy classes from the outside in, and their keywords."""
    classes, kind = [], model.policy_class
    while kind in (elastic, injected):
        classes.append(kind.__name__)
        kind = model.policy_kwargs[_STANDS_FOR[kind.__name__][1]]
    kept = ("net_arch", "shapes", "heads")
    return {"classes": classes} | {name: model.policy_kwargs[name] for name in kept if name in model.policy_kwargs}


def rebuild(model: BaseAlgorithm, wanted: dict[str, Any]) -> None:
    """Build a fresh model's policy again where its :func:`architecture` is not ``wanted``."""
    wanted = from_plain(wanted)
    if architecture(model) == wanted:
        return
    kwargs, kind = dict(model.policy_kwargs), model.policy_class
    kwargs |= {name: value for name, value in wanted.items() if name != "classes"}
    for name in reversed(wanted["classes"]):
        outer, keyword = _STANDS_FOR[name]
        kwargs[keyword], kind = kind, outer
    model.policy_class, model.policy_kwargs = kind, kwargs
    model._setup_model()  # as stable-baselines3's own load does


# Wrappers and noise ----------------------------------------------------------------------------------------------


def _normalizers(env: VecEnv | None) -> Iterator[Any]:
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            yield env
        env = env.venv


def _running(normalizer: Any) -> list[Any]:
    """Its running means and variances: of the observations, or of each of their parts, and of the returns."""
    observed = getattr(normalizer, "obs_rms", None)
    parts = list(observed.values()) if isinstance(observed, dict) else [observed]
    return [rms for rms in (*parts, normalizer.ret_rms) if rms is not None]


def _noises(model: BaseAlgorithm) -> Iterator[Any]:
    """The action distributions that hold a matrix of noise for the whole rollout (gSDE)."""
    for module in model.policy.modules():
        dist = getattr(module, "action_dist", None)
        if hasattr(dist, "exploration_mat"):
            yield dist
