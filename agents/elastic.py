"""Let a stable-baselines3 model whose layers have changed their widths be saved, and loaded by a plain ``PPO.load``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import get_device, get_parameters_by_name
from torch import nn
from torch.optim import Optimizer

from recycle.kinds import check_arguments
from recycle.resize import reshape

_STACKS = {
    "mlp_extractor.policy_net": ("pi", False),
    "mlp_extractor.value_net": ("vf", False),
    "q_net.q_net": ("", True),
    "quantile_net.quantile_net": ("", True),
    "actor.latent_pi": ("pi", False),
    "actor.mu": ("pi", True),
    "critic.qf0": ("qf", True),
}
"""Stack of layers -> its key in ``net_arch`` ("" where that is a plain list), and whether it ends with a head.

Of two with one key the first counts: behind ``latent_pi`` (SAC) ``mu`` is a head alone, without it (TD3) the actor.
"""


def remember_widths(model: BaseAlgorithm) -> None:
    """Write the widths that the policy's layers have now into what ``model.save`` saves.

    Where ``policy_kwargs["net_arch"]`` can say them, the saved file needs nothing of ours. Where it cannot (layers
    of a features extractor, critics that differ), the model's policy class becomes :func:`elastic`, and this package
    must be importable where the model is loaded. :class:`agents.RecycleCallback` calls it after every event that
    resizes; call it yourself after :func:`recycle.apply`. ``policy.save`` names no such function: where ``net_arch``
    cannot say the widths, :func:`load_policy` loads what it writes, ``policy.load`` does not.

    The lists through which off-policy models copy BatchNorm statistics to their targets are made anew.
    """
    check_arguments(remember_widths, "remember_widths", model=model)
    _find_statistics(model)
    kwargs = {k: v for k, v in model.policy_kwargs.items() if k not in ("base_class", "shapes")}
    base = model.policy_kwargs.get("base_class", model.policy_class)
    arch = _net_arch(model)
    if arch is not None:
        _tell_policy(model.policy, arch)
        kwargs["net_arch"] = arch
    shapes = _shapes(model.policy)
    if _shapes(_built(model, base, kwargs)) == shapes:
        model.policy_class, model.policy_kwargs = base, kwargs
    else:
        model.policy_class = elastic  # type: ignore[assignment]
        model.policy_kwargs = {**kwargs, "base_class": base, "shapes": shapes}


def elastic(*args: Any, base_class: type[BasePolicy], shapes: dict[str, tuple[int, ...]], **kwargs: Any) -> BasePolicy:
    """A policy of ``base_class`` whose parameters and buffers have these shapes; stands for it as a policy class."""
    policy = base_class(*args, **kwargs)
    reshape(policy, shapes, optimizers_of(policy))
    return policy


def load_policy(kind: type[BasePolicy], path: str | Path, device: torch.device | str = "auto") -> BasePolicy:
    """``kind.load(path)`` for a policy whose layers have changed their widths: what ``policy.save`` wrote.

    The saved tensors say the widths. Loading unpickles the file: open only files that you trust.

    Raises:
        NotRecyclable: the saved tensors are not those of such a policy.
        TypeError: ``kind`` is no class of policies.
        ValueError: there is no such file, or it is no saved policy.
    """
    check_arguments(load_policy, "load_policy", kind=kind, path=path, device=device)
    if not issubclass(kind, BasePolicy):
        raise TypeError(f"load_policy's kind is a class of policies, such as MlpPolicy, got {kind.__name__}")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {str(path)!r}. Pass the path that policy.save wrote to")
    device = get_device(device)
    try:
        saved = torch.load(path, map_location=device, weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no saved policy: {error}") from error
    if not isinstance(saved, dict) or not {"data", "state_dict"} <= saved.keys():
        raise ValueError(f"{path} is no saved policy: pass what policy.save wrote")
    policy = kind(**saved["data"])
    reshape(policy, {name: tuple(t.shape) for name, t in saved["state_dict"].items()}, optimizers_of(policy))
    policy.load_state_dict(saved["state_dict"])
    return policy.to(device)


def said_by_net_arch(model: BaseAlgorithm) -> bool:
    """Whether loading would build the very layers that the policy has now, were ``net_arch`` what it is now."""
    arch = _net_arch(model)
    kwargs = {k: v for k, v in model.policy_kwargs.items() if k not in ("base_class", "shapes")}
    base = model.policy_kwargs.get("base_class", model.policy_class)
    return arch is not None and str(_built(model, base, {**kwargs, "net_arch": arch})) == str(model.policy)


def _find_statistics(model: BaseAlgorithm) -> None:
    """Off-policy models keep views of their BatchNorm statistics, which a resize leaves with the old tensors."""
    for prefix, name in (
        ("", "q_net"),
        ("", "quantile_net"),
        ("", "critic"),
        ("actor_", "actor"),
        ("critic_", "critic"),
    ):
        for target in ("", "_target"):
            kept, network = f"{prefix}batch_norm_stats{target}", getattr(model, name + target, None)
            if hasattr(model, kept) and network is not None:
                setattr(model, kept, get_parameters_by_name(network, ["running_"]))


def _net_arch(model: BaseAlgorithm) -> Any:
    """The policy's hidden widths as SB3's ``net_arch``, or None where that cannot say them."""
    policy = model.policy
    if {"layered_on", "deepened_on"} & model.policy_kwargs.keys():  # a CReLU's widths are halved; layers came later
        return None
    found: dict[str, list[int]] = {}
    for path, (key, head) in _STACKS.items():
        try:
            stack = policy.get_submodule(path)
        except AttributeError:
            continue
        widths = [int(layer.out_features) for layer in stack.modules() if isinstance(layer, nn.Linear)]
        found.setdefault(key, widths[:-1] if head else widths)
    return found[""] if list(found) == [""] else found or None


def _tell_policy(policy: Any, arch: Any) -> None:
    """``policy.save`` and ``q_net.save`` write what the policy and its networks themselves remember."""
    policy.net_arch = arch
    if hasattr(policy, "net_args"):
        policy.net_args["net_arch"] = arch
    for name in ("q_net", "q_net_target", "quantile_net", "quantile_net_target"):
        if hasattr(policy, name):
            getattr(policy, name).net_arch = arch
    for name, key in (("actor_kwargs", "pi"), ("critic_kwargs", "qf")):
        if hasattr(policy, name) and isinstance(arch, dict):
            getattr(policy, name)["net_arch"] = arch[key]


def _built(model: BaseAlgorithm, base: Any, kwargs: dict[str, Any]) -> BasePolicy:
    """What loading would build; draws no random number of the training's."""
    if hasattr(model.policy, "use_sde"):  # on-policy models but MaskablePPO give it beside their policy_kwargs
        kwargs = {"use_sde": model.use_sde, **kwargs}
    with torch.random.fork_rng(devices=[]):
        policy: BasePolicy = base(model.observation_space, model.action_space, lambda _: 1e-3, **kwargs)
    return policy


def _shapes(policy: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in (*policy.named_parameters(), *policy.named_buffers())}


def optimizers_of(policy: nn.Module) -> list[Optimizer]:
    """The optimizers that a policy and its networks hold."""
    held = (getattr(module, "optimizer", None) for module in policy.modules())
    return [optimizer for optimizer in held if isinstance(optimizer, Optimizer)]
