"""Let a stable-baselines3 model into which plasticity was injected be saved, and loaded by a plain ``PPO.load``."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from agents.elastic import optimizers_of
from recycle.injected import Injected, InjectedHidden, InjectedOutput
from recycle.injection import wrap_again

_KINDS: dict[str, type[Injected]] = {"hidden": InjectedHidden, "output": InjectedOutput}


def remember_injection(model: BaseAlgorithm) -> None:
    """Write which layers are injected into what ``model.save`` saves.

    The model's policy class becomes :func:`injected`, so this package must be importable where the model is loaded.
    :class:`agents.RecycleCallback` calls it after an event that injects; call it yourself after
    :func:`recycle.injection.inject`. ``policy.save`` names no such function: save the model.
    """
    names = {kind: name for name, kind in _KINDS.items()}
    heads = {path: names[type(m)] for path, m in model.policy.named_modules() if isinstance(m, Injected)}
    base = model.policy_kwargs.get("injected_into", model.policy_class)
    model.policy_class = injected  # type: ignore[assignment]
    model.policy_kwargs = {**model.policy_kwargs, "injected_into": base, "heads": heads}


def injected(*args: Any, injected_into: Any, heads: dict[str, str], **kwargs: Any) -> BasePolicy:
    """A policy of class ``injected_into`` with injected layers at these paths; stands for it as a policy class."""
    policy: BasePolicy = injected_into(*args, **kwargs)
    wrap_again(policy, {path: _KINDS[kind] for path, kind in heads.items()}, optimizers_of(policy))
    return policy
