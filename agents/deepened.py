"""Let a stable-baselines3 model that has gained hidden layers be saved, and loaded by a plain ``PPO.load``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from agents.elastic import optimizers_of, remember_widths, said_by_net_arch
from agents.networks import Network
from recycle.deepening import Insertion, insert_again
from recycle.kinds import check_arguments


def remember_depth(model: BaseAlgorithm, made: Sequence[tuple[Network, Insertion]]) -> None:
    """Write the layers that were inserted into what ``model.save`` saves, and the widths that all have now.

    Where ``policy_kwargs["net_arch"]`` can say them (ReLUs between ReLUs), the saved file needs nothing of ours. Where
    it cannot (another kind of layer, or one of a features extractor), the model's policy class becomes
    :func:`deepened`, and this package must be importable where the model is loaded. :class:`agents.RecycleCallback`
    calls it after an event that inserts; call it yourself after :func:`recycle.deepen`. ``policy.save`` names no such
    function: where ``net_arch`` cannot say the layers, save the model.

    Args:
        model: whose policy has the layers.
        made: what :func:`recycle.deepen` returned for each network of :func:`agents.networks_of`, in order, since the
            last call.
    """
    check_arguments(remember_depth, "remember_depth", model=model, made=made)
    if not said_by_net_arch(model):
        kwargs = dict(model.policy_kwargs)
        kwargs.pop("shapes", None)
        base = kwargs.pop("base_class", model.policy_class)
        kwargs = {"deepened_on": base, "insertions": (), **kwargs}  # those of before stay
        kwargs["insertions"] = (*kwargs["insertions"], *(_in_policy(model.policy, *each) for each in made))
        model.policy_class, model.policy_kwargs = deepened, kwargs  # type: ignore[assignment]
    remember_widths(model)


def deepened(
    *args: Any, deepened_on: Any, insertions: Sequence[tuple[Sequence[str], Insertion]], **kwargs: Any
) -> BasePolicy:
    """A policy of class ``deepened_on`` with more hidden layers; stands for it as a policy class.

    ``insertions``: the paths of the networks and targets that have a layer more, and what was inserted, in order.
    """
    policy: BasePolicy = deepened_on(*args, **kwargs)
    for networks, insertion in insertions:
        for path in networks:
            insert_again(policy.get_submodule(path), insertion, optimizers_of(policy))
    return policy


def _in_policy(policy: nn.Module, network: Network, insertion: Insertion) -> tuple[tuple[str, ...], Insertion]:
    """Where in the policy a network and its targets are, without the wrappers of ``torch.compile``."""
    holders = (network.module, *(target for target, _ in network.targets))
    paths = [next(name for name, module in policy.named_modules() if module is holder) for holder in holders]
    return tuple(path.replace("_orig_mod", "").replace("..", ".").strip(".") for path in paths), insertion
