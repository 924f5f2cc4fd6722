"""Environments whose task changes while an agent trains: drifts, schedules and the digits bandit."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

from agents.envs.digits import DigitsBandit, Relabel
from agents.envs.drift import Drift
from agents.envs.physics import CartPolePhysics
from agents.envs.schedule import Schedule, parse
from agents.envs.transforms import (
    FlipReward,
    MaskObservation,
    OffsetObservation,
    PermuteObservation,
    RemapAction,
    ScaleObservation,
    ScaleReward,
)
from recycle.names import did_you_mean

__all__ = [
    "DRIFTS",
    "CartPolePhysics",
    "DigitsBandit",
    "Drift",
    "FlipReward",
    "MaskObservation",
    "OffsetObservation",
    "PermuteObservation",
    "Relabel",
    "RemapAction",
    "ScaleObservation",
    "ScaleReward",
    "Schedule",
    "make_env",
    "parse",
]

DRIFTS: dict[str, type[Drift]] = {
    "permute": PermuteObservation,
    "offset": OffsetObservation,
    "scale": ScaleObservation,
    "mask": MaskObservation,
    "remap": RemapAction,
    "reward_scale": ScaleReward,
    "reward_flip": FlipReward,
    "physics": CartPolePhysics,
    "relabel": Relabel,
}

gym.register("DigitsBandit-v1", entry_point="agents.envs.digits:DigitsBandit")


def make_env(
    env_id: str,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    drift: str | Sequence[str] = (),
    drift_kwargs: Mapping[str, Any] | None = None,
    change: str | Schedule = "every:10000",
    seed: int = 0,
    n_envs: int = 1,
    rank: int = 0,
    frozen: bool = False,
) -> gym.Env:
    """Build one copy of an environment with its drifts; the first drift named lies innermost.

    drift_kwargs: one flat dictionary; each entry goes to every chosen drift whose constructor knows it.
    change, n_envs, frozen: the clock, see `Drift`. n_envs is the number of copies that train together.
    seed: decides the drift; the copies of one run share it. The copy's first reset and its action space are seeded
        with `seed + rank`, and nothing else tells copies apart. Give evaluation copies a rank of their own.
    Raises ValueError for an unknown environment, drift or drift option, and TypeError where a drift does not fit.
    """
    names = (drift,) if isinstance(drift, str) else tuple(drift)
    options = _sort_out(names, dict(drift_kwargs or {}))
    if rank < 0:
        raise ValueError(f"make_env expects a rank of 0 or more, got {rank}. Number the copies from 0.")
    if not env_id or env_id.startswith(":"):
        raise ValueError(f"make_env expects a registered environment such as CartPole-v1, got {env_id!r}.")
    try:
        env = gym.make(env_id, **(env_kwargs or {}))
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as missing:
        raise ValueError(
            f"make_env expects a registered environment, got {env_id!r}: {missing} "
            "gymnasium.pprint_registry() lists them all."
        ) from missing
    env.action_space.seed(seed + rank)
    env.reset(seed=seed + rank)  # below the drifts: for them nothing has begun yet
    for name in names:
        env = DRIFTS[name](env, change=change, seed=seed, n_envs=n_envs, frozen=frozen, **options[name])
    return env


def _sort_out(names: Sequence[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for name in names:
        if name not in DRIFTS:
            raise ValueError(f"no drift {name!r}: {did_you_mean(name, DRIFTS)}")
        if names.count(name) > 1:
            raise ValueError(f"Each drift is named once; got {name!r} twice in {list(names)}. Leave one out.")
    known = {name: _options(DRIFTS[name]) for name in names}
    for key in given:
        if not any(key in keys for keys in known.values()):
            valid = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in known.items()) or "none without a drift"
            raise ValueError(f"No chosen drift knows the option {key!r}. Valid options are {valid}.")
    return {name: {key: given[key] for key in keys if key in given} for name, keys in known.items()}


def _options(drift: type[Drift]) -> list[str]:
    parameters = inspect.signature(drift).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] + ["mid_episode"]
