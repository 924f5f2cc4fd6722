"""What the options of an algorithm and of its policy may be: names, kinds and ranges, before anything is built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from recycle.kinds import described, fits
from recycle.names import did_you_mean

SET_BY_US = {
    "self",
    "policy",
    "env",
    "seed",
    "device",
    "policy_kwargs",
    "verbose",
    "tensorboard_log",
    "monitor_wrapper",
}
"""Arguments of algorithms that other options of ours give, or that nobody should."""

_ABOVE_0 = {
    "clip_range", "clip_range_vf", "target_kl", "max_grad_norm", "rms_prop_eps",
    "exploration_fraction",
}  # fmt: skip
_FROM_0 = {
    "learning_rate", "vf_coef", "learning_starts", "target_policy_noise", "target_noise_clip", "cg_damping",
    "top_quantiles_to_drop_per_net",
}  # fmt: skip
_FROM_1 = {
    "n_steps", "batch_size", "n_epochs", "buffer_size", "target_update_interval", "policy_delay", "stats_window_size",
    "cg_max_steps", "line_search_max_iter", "n_critic_updates", "sub_sampling_factor",
}  # fmt: skip
_UP_TO_1 = {
    "gamma", "gae_lambda", "tau", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps",
    "line_search_shrinking_factor",
}  # fmt: skip
_FROM_MINUS_1 = {"gradient_steps", "sde_sample_freq"}
MOST = 2**40
"""No count is larger: what it counts would fit into no memory."""


def hyperparameters(algo: str, kind: type[BaseAlgorithm], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an algorithm that ``--hyperparams`` say; whole floats become integers (``1e3``).

    Raises:
        ValueError: one is unknown (with a suggestion), of another kind, or out of range.
    """
    parameters = inspect.signature(kind.__init__).parameters
    known = [name for name in parameters if name not in SET_BY_US and name[0] != "_"]
    found = dict(given)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{algo} has no hyperparameter {name!r}: {did_you_mean(name, known)}")
        default, hint = parameters[name].default, parameters[name].annotation
        if type(default) is int and isinstance(value, float) and value.is_integer():
            value = found[name] = int(value)  # batch_size:1e3
        if not fits(value, hint):
            raise ValueError(f"{algo}'s {name} is {described(hint)} (by default {default}), got {value!r}")
        _check_range(f"{algo}'s {name}", name, value)
    return found


def policy_arguments(algo: str, kind: type[BaseAlgorithm], policy: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a policy that ``--policy-kwargs`` say; ``activation_fn:relu`` becomes the class.

    Raises:
        ValueError: one is unknown (with a suggestion) or of another kind, or a layer has no units.
    """
    if policy not in kind.policy_aliases:
        raise ValueError(f"{algo} has no policy {policy!r} for --policy: {did_you_mean(policy, kind.policy_aliases)}")
    parameters = inspect.signature(kind.policy_aliases[policy].__init__).parameters
    ours = ("self", "observation_space", "action_space", "lr_schedule")
    known = [name for name in parameters if name not in ours and name[0] != "_"]
    found = dict(given)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{policy} of {algo} has no option {name!r}: {did_you_mean(name, known)}")
        if name == "activation_fn" and isinstance(value, str):
            value = found[name] = _activation(value)
        if not fits(value, parameters[name].annotation):
            raise ValueError(f"{policy}'s {name} is {described(parameters[name].annotation)}, got {value!r}")
        if name == "net_arch":
            _check_widths(value)
    return found


def _check_range(what: str, name: str, value: Any) -> None:
    numbers = value if isinstance(value, (tuple, list)) else [value]
    for number in (each for each in numbers if isinstance(each, (int, float)) and not isinstance(each, bool)):
        least = 1 if name in _FROM_1 | {"train_freq"} else -1 if name in _FROM_MINUS_1 else 0
        most = 1 if name in _UP_TO_1 else MOST
        bounded = name in _FROM_0 | _FROM_1 | _FROM_MINUS_1 | _UP_TO_1 | {"train_freq"}
        if (bounded and not least <= number <= most) or (name in _ABOVE_0 and not 0 < number < math.inf):
            wanted = "above 0" if name in _ABOVE_0 else f"at least {least}" + f" and at most {most}" * (most == 1)
            raise ValueError(f"{what} must be {wanted}, got {value!r}")
        if not math.isfinite(number):
            raise ValueError(f"{what} must be a finite number, got {value!r}")


def _check_widths(arch: Any) -> None:
    for part in arch.values() if isinstance(arch, Mapping) else [arch]:
        if not fits(part, list[int]) or any(not 1 <= width <= 2**20 for width in part):
            raise ValueError(f"net_arch lists how many units each layer has, such as [64,64], got {arch!r}")


def _activation(name: str) -> Callable[..., torch.nn.Module]:
    layers = {
        key.lower(): value
        for key, value in vars(torch.nn.modules.activation).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module) and value is not torch.nn.Module
    }
    if name.lower() not in layers:
        raise ValueError(f"torch.nn has no activation {name!r}: {did_you_mean(name, layers)}")
    return layers[name.lower()]
