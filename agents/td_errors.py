"""Where a model's critics are wrong: their |TD error| on examples of the model's own buffer, for folding.

The targets are those of stable-baselines3's and sb3-contrib's own losses. A distribution over returns (QRDQN, TQC)
stands for its mean, by which these agents act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from agents.observations import evaluating, taken
from recycle import NotRecyclable
from recycle.targets import moved
from recycle.tracing import undisturbed

EXAMPLES = 256
"""Transitions that are drawn for an event, at most."""

Drawn = tuple[Any, Tensor]
"""What a critic is given, as nested tensors, and its TD targets: ``(examples, values)``, or ``(examples, 1)`` if all
values have the same."""


@dataclass(frozen=True, eq=False)
class Critic:
    """The part of a network that predicts values, and how to find out what it should predict."""

    value: Callable[[Any], Tensor]
    """Values ``(examples, values)`` of what was drawn, with their graph; runs every layer once."""
    draw: Callable[[torch.Generator], Drawn]
    """Draws examples. It takes all randomness from the generator and leaves no trace on the model.

    Raises:
        NotRecyclable: there are none.
    """
    in_time: bool
    """Whether they must be drawn when a rollout ends, since the next one begins by emptying the buffer."""


class TDErrors:
    """A critic's mistakes as :data:`recycle.folding.Examples`, on the same examples until :meth:`forget`.

    Args:
        critic: or why there is none.
        generator: source of randomness.
    """

    def __init__(self, critic: Critic | str, generator: torch.Generator) -> None:
        self.critic, self.generator = critic, generator
        self.drawn: Drawn | None = None

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``(examples, values)``, the mean |TD error| of each example, and targets like the values.

        Raises:
            NotRecyclable: there is no critic, or no example.
        """
        if isinstance(self.critic, str):
            raise NotRecyclable(self.critic)
        if self.drawn is None:
            if self.critic.in_time:
                raise NotRecyclable("no rollout has ended since the last event: there are no returns to compare with")
            self.drawn = self.critic.draw(self.generator)
        given, targets = self.drawn
        values = self.critic.value(given)
        return values, (values - targets).abs().mean(1), targets.expand_as(values)

    def rollout_ended(self) -> None:
        """An event comes next: draw what would not be there any more by then."""
        if isinstance(self.critic, Critic) and self.critic.in_time:
            self.drawn = self.critic.draw(self.generator)

    def forget(self) -> None:
        """The event is over."""
        self.drawn = None

    def state_dict(self) -> Drawn | None:
        """What is kept for the next event, on the CPU; None if nothing is."""
        kept: Drawn | None = moved(self.drawn, torch.device("cpu"))
        return kept

    def load_state_dict(self, state: Drawn | None, device: torch.device) -> None:
        """Go on from :meth:`state_dict`."""
        self.drawn = moved(state, device)


# -- on-policy ---------------------------------------------------------------------------------------------


def state_values(model: BaseAlgorithm) -> Critic:
    """PPO, A2C, TRPO and MaskablePPO: the value head on the latest rollout, whose returns are its targets."""
    policy: Any = model.policy

    def draw(generator: torch.Generator) -> Drawn:
        buffer: Any = model.rollout_buffer  # type: ignore[attr-defined]
        chosen = torch.randperm(buffer.returns.size, generator=generator)[:EXAMPLES].sort().values.numpy()
        returns = torch.as_tensor(buffer.returns.reshape(-1)[chosen], device=model.device)
        return taken(model, chosen), returns[:, None]

    return Critic(lambda observations: policy.predict_values(observations), draw, in_time=True)


# -- off-policy --------------------------------------------------------------------------------------------


def action_values(model: BaseAlgorithm, network: Any, target: Any) -> Critic:
    """DQN and QRDQN: the value of the action that was taken."""

    def every(of: Any, observations: Any) -> Tensor:
        found: Tensor = of(observations)
        return found.mean(1) if found.dim() == 3 else found  # the mean of the quantiles

    def value(given: Any) -> Tensor:
        observations, actions = given
        return every(network, observations).gather(1, actions.long())

    def next_value(seen: Any) -> Tensor:
        return every(target, seen.next_observations).amax(1, keepdim=True)

    return Critic(value, partial(_replayed, model, next_value), in_time=False)


def critic_values(model: BaseAlgorithm, critic: Any) -> Critic:
    """SAC, TQC, CrossQ, TD3 and DDPG: the values of each critic, which have one target."""
    policy: Any = model.policy

    def value(given: Any) -> Tensor:
        return _means(critic(*given))

    return Critic(value, partial(_replayed, model, partial(_next_value, model, policy, critic)), in_time=False)


def _means(said: Any) -> Tensor:
    """Values ``(examples, critics)`` of what critics say: one tensor each, or all quantiles in one."""
    return said.mean(2) if isinstance(said, Tensor) else torch.cat(said, 1)


def _next_value(model: Any, policy: Any, critic: Any, seen: Any) -> Tensor:
    """Of the action that the policy would take next, by the target critics: the least, or the mean of what TQC keeps.

    CrossQ has no target critic: its own, in evaluation mode, stands for the joint pass of its loss.
    """
    if hasattr(model, "target_policy_noise"):  # TD3; DDPG clips it to nothing
        noise = torch.randn_like(seen.actions) * model.target_policy_noise
        noise = noise.clamp(-model.target_noise_clip, model.target_noise_clip)
        actions, entropy = (policy.actor_target(seen.next_observations) + noise).clamp(-1, 1), 0.0
    else:
        actions, log_prob = policy.actor.action_log_prob(seen.next_observations)
        weight = model.ent_coef_tensor if model.log_ent_coef is None else model.log_ent_coef.exp()
        entropy = -weight * log_prob[:, None]
    said = getattr(policy, "critic_target", critic)(seen.next_observations, actions)
    if not isinstance(said, Tensor):
        return torch.cat(said, 1).amin(1, keepdim=True) + entropy
    kept = said[0].numel() - model.top_quantiles_to_drop_per_net * said.shape[1]
    return said.flatten(1).sort(1).values[:, :kept].mean(1, keepdim=True) + entropy


def _replayed(model: Any, next_value: Callable[[Any], Tensor], generator: torch.Generator) -> Drawn:
    """Observations and actions of the replay buffer, and their one-step (or n-step) TD targets."""
    buffer = model.replay_buffer
    if buffer is None or not buffer.size():
        raise NotRecyclable("the replay buffer is empty: there is no example to look at")
    with _own_randomness(model, generator), torch.no_grad():
        try:
            seen = buffer.sample(min(EXAMPLES, buffer.size()), env=model.get_vec_normalize_env())
        except RuntimeError as error:  # hindsight needs an episode that has ended
            raise NotRecyclable(f"the replay buffer has no example yet: {error}") from error
        discounts = model.gamma if seen.discounts is None else seen.discounts
        targets = seen.rewards + (1 - seen.dones) * discounts * next_value(seen)
    return (seen.observations, seen.actions), targets


@contextmanager
def _own_randomness(model: Any, generator: torch.Generator) -> Iterator[None]:
    """Inside, the global generators of torch and numpy go on from a seed of ours; behind it, from where they were."""
    drawn = int(torch.randint(2**31, (), generator=generator))
    with undisturbed(model.policy), evaluating(list(model.policy.modules())):
        torch.manual_seed(drawn)
        np.random.seed(drawn)
        yield
