"""The algorithms that can be trained and loaded, by their names on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from recycle.names import did_you_mean

ALGOS = {
    "ppo": "stable_baselines3.PPO",
    "a2c": "stable_baselines3.A2C",
    "dqn": "stable_baselines3.DQN",
    "sac": "stable_baselines3.SAC",
    "td3": "stable_baselines3.TD3",
    "ddpg": "stable_baselines3.DDPG",
    "recurrent_ppo": "sb3_contrib.RecurrentPPO",
    "maskable_ppo": "sb3_contrib.MaskablePPO",
    "trpo": "sb3_contrib.TRPO",
    "qrdqn": "sb3_contrib.QRDQN",
    "tqc": "sb3_contrib.TQC",
    "crossq": "sb3_contrib.CrossQ",
}
"""Name to where the class is; those of sb3-contrib need the ``contrib`` extra."""

CONTINUOUS = frozenset({"sac", "td3", "ddpg", "tqc", "crossq"})
"""Algorithms for Box action spaces only."""
DISCRETE = frozenset({"dqn", "qrdqn"})
"""Algorithms for Discrete action spaces only."""

_MARKS = (
    ("recurrent_ppo", "clip_range", "RecurrentActorCriticPolicy"),
    ("maskable_ppo", "clip_range", "MaskableActorCriticPolicy"),
    ("ppo", "clip_range", "ActorCriticPolicy"),
    ("trpo", "cg_max_steps", "ActorCriticPolicy"),
    ("a2c", "gae_lambda", "ActorCriticPolicy"),
    ("qrdqn", "exploration_schedule", "QRDQNPolicy"),
    ("dqn", "exploration_schedule", "DQNPolicy"),
    ("tqc", "top_quantiles_to_drop_per_net", "TQCPolicy"),
    ("crossq", "ent_coef", "CrossQPolicy"),
    ("sac", "ent_coef", "SACPolicy"),
    ("td3", "target_policy_noise", "TD3Policy"),  # DDPG is a TD3 of one critic, and is kept as one
)
"""Algorithm, an attribute that its models save, the policy class that they save; the first that fits."""


def algorithm(name: str) -> type[BaseAlgorithm]:
    """The class of that name.

    Raises:
        ValueError: there is none (with a suggestion), or sb3-contrib is not installed.
    """
    if name not in ALGOS:
        raise ValueError(f"no algorithm {name!r} for --algo: {did_you_mean(name, ALGOS)}")
    package, _, leaf = ALGOS[name].rpartition(".")
    try:
        found: type[BaseAlgorithm] = getattr(importlib.import_module(package), leaf)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(f"{name} is an algorithm of sb3-contrib: pip install 'recycle-rl[contrib]'") from error
    return found


def algorithm_of(data: Mapping[str, Any]) -> type[BaseAlgorithm] | None:
    """The class that saved these attributes (a model's zip holds no name), or None where none fits."""
    policy = (data.get("policy_kwargs") or {}).get("base_class", data.get("policy_class"))  # of a resized model
    policies = {kind.__name__ for kind in getattr(policy, "__mro__", ())}
    for name, key, written in _MARKS:
        if key in data and written in policies:
            return algorithm(name)
    return None
