"""The one place that knows how stable-baselines3 and sb3-contrib name their networks.

Algorithms are told apart by what their models hold, so sb3-contrib need not be installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn
from torch.optim import Optimizer

import recycle
from agents.observations import BATCH, Box, box, evaluating, observations, sample
from agents.td_errors import Critic, action_values, critic_values, state_values
from recycle import Graph, Report, Reset, Split
from recycle.fresh import Init
from recycle.kinds import check_arguments


@dataclass(frozen=True, eq=False)
class Network:
    """A network of a model, with everything that :class:`recycle.Recycler` wants to know about it."""

    name: str
    """As it stands in log keys: ``recycle/<name>/...``."""
    module: nn.Module
    calls: tuple[Callable[[], Any], ...]
    """Every entry point that training uses, on a batch of made-up observations."""
    watch: Callable[[Any], Any]
    """Runs every layer on a batch of observations."""
    optimizers: tuple[Optimizer, ...]
    """Those whose steps end an update first, then others that hold the network's parameters."""
    targets: tuple[tuple[nn.Module, float], ...] = ()
    """Target networks with their ``tau``."""
    init: Init | None = None
    """How the policy's builder initialises, where it is not the layers' own way."""
    frozen: Mapping[str, str] = field(default_factory=dict)
    """Parts that tracing this module alone cannot judge, by path, and why no edit may touch their units."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Parts whose units may be edited and keep their number, by path, and why."""
    box: Box | None = None
    """The network on a bounded observation space, for :func:`recycle.certify`; None where there are no bounds."""
    follow: Callable[[Graph, Report], None] = lambda graph, report: None
    """Brings what the model keeps of single units, such as recurrent states, in line with the edits of a report."""

    critic: Critic | str = "an actor predicts no value, so it has no mispredicted example"
    """What of it predicts values, and how far off they are; or why there is no telling."""

    def trace(self) -> Graph:
        """The groups that can be edited, as :func:`recycle.trace` finds them, less the :attr:`frozen` parts."""
        graph = recycle.trace(self.module, *self.calls)
        kept, frozen = [], dict(graph.frozen)
        for group in graph:
            group.fix(_of_part(self.fixed, group.name))
            reason = _of_part(self.frozen, group.name)
            if reason:
                frozen[group.name] = reason
            else:
                kept.append(group)
        return Graph(self.module, kept, frozen, self.calls, self.trace)


def _of_part(reasons: Mapping[str, str], name: str) -> str:
    return next((why for part, why in reasons.items() if f"{name}.".startswith(f"{part}.")), "")


def networks_of(model: BaseAlgorithm) -> list[Network]:
    """The trained networks of a model of any algorithm of stable-baselines3, or of sb3-contrib but ARS.

    PPO, A2C, TRPO, MaskablePPO and RecurrentPPO have one, ``policy``; DQN ``q_net``, QRDQN ``quantile_net``;
    SAC, TQC, CrossQ, TD3 and DDPG have ``actor`` and ``critic``.

    Raises:
        ValueError: the algorithm is not supported.
    """
    check_arguments(networks_of, "networks_of", model=model)
    policy = model.policy
    for name in ("q_net", "quantile_net"):
        if hasattr(policy, f"{name}_target"):
            return [_values(model, name)]
    if hasattr(policy, "actor") and hasattr(policy, "critic"):
        return _actor_and_critic(model)
    if hasattr(policy, "lstm_actor"):
        return [_recurrent(model)]
    if hasattr(policy, "mlp_extractor") and hasattr(policy, "evaluate_actions"):
        return [_actor_critic(model)]
    raise ValueError(
        "recycling is implemented for PPO, A2C, DQN, SAC, TD3 and DDPG, and for sb3-contrib's RecurrentPPO, "
        f"MaskablePPO, TRPO, QRDQN, TQC and CrossQ, got {type(model).__name__}. "
        "Use recycle.trace and recycle.Recycler on its networks directly"
    )


# -- value networks ----------------------------------------------------------------------------------------


def _values(model: BaseAlgorithm, name: str) -> Network:
    """DQN and QRDQN."""
    policy: Any = model.policy
    network, target = _plain(getattr(policy, name)), _plain(getattr(policy, f"{name}_target"))
    batch = observations(model)
    tau = float(model.tau)  # type: ignore[attr-defined]
    ends = box(model, lambda x: getattr(network, name)(network.features_extractor(x)))
    critic = action_values(model, network, target)
    call = (lambda: network(batch),)
    return Network(name, network, call, network, (policy.optimizer,), ((target, tau),), box=ends, critic=critic)


# -- actor and critic with an optimizer each ---------------------------------------------------------------

_SHARED = "actor and critic share it, and each is traced alone. Pass policy_kwargs=dict(share_features_extractor=False)"


def _actor_and_critic(model: BaseAlgorithm) -> list[Network]:
    """SAC, TQC, CrossQ, TD3 and DDPG: two modules, edited apart unless they share their features extractor."""
    policy: Any = model.policy
    actor, critic = _plain(policy.actor), _plain(policy.critic)
    batch, actions = observations(model), _scaled_actions(model)
    acting = (lambda: actor.action_log_prob(batch)) if hasattr(actor, "action_log_prob") else (lambda: actor(batch))
    judging = [lambda: critic(batch, actions)]
    if hasattr(critic, "q1_forward"):
        judging.append(lambda: critic.q1_forward(batch, actions))

    def targets(name: str) -> tuple[tuple[nn.Module, float], ...]:
        target = getattr(policy, f"{name}_target", None)
        return () if target is None else ((_plain(target), float(model.tau)),)  # type: ignore[attr-defined]

    def judge(obs: Any) -> Any:
        return critic(obs, policy._predict(obs, deterministic=True))

    shared = actor.features_extractor is critic.features_extractor
    frozen = {"features_extractor": _SHARED} if shared else {}
    ends, actions_end = box(model, critic), torch.ones_like(actions[:1])
    # The actor's loss runs through the critic after the critic's own step: the actor's step ends an update of both.
    return [
        Network(
            "actor",
            actor,
            (_with_running_statistics(actor, acting),),
            lambda obs: actor(obs),
            (actor.optimizer,),
            targets("actor"),
            frozen=frozen,
            box=box(model, partial(_acting, actor)),
        ),
        Network(
            "critic",
            critic,
            tuple(_with_running_statistics(critic, call) for call in judging),
            judge,
            (actor.optimizer, critic.optimizer),
            targets("critic"),
            frozen=frozen,
            box=None if ends is None else (partial(_judging, critic), (ends[1], -actions_end), (ends[2], actions_end)),
            critic=critic_values(model, critic),
        ),
    ]


def _acting(actor: Any, x: Any) -> Any:
    """An actor on preprocessed observations."""
    features = actor.features_extractor(x)
    if not hasattr(actor, "latent_pi"):
        return actor.mu(features)
    latent = actor.latent_pi(features)
    spread = actor.log_std  # a parameter under gSDE
    return actor.mu(latent), spread(latent) if isinstance(spread, nn.Module) else spread


def _judging(critic: Any, x: Any) -> Any:
    """A critic on preprocessed observations and actions in [-1, 1], which squashed policies never leave."""
    observation, action = x
    both = torch.cat([critic.features_extractor(observation), action], 1)
    return [q_network(both) for q_network in critic.q_networks]


def _with_running_statistics(module: nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with CrossQ's BatchRenorm as in a rollout: it reads each unit's running statistics, and moves none.

    In training it takes each unit's statistics from the batch instead, which tells the same units apart. The
    tracer itself treats torch's BatchNorm that way.
    """

    def run() -> Any:
        with evaluating([m for m in module.modules() if hasattr(m, "ra_mean") and hasattr(m, "ra_var")]):
            return call()

    return run


# -- actor-critic policies ---------------------------------------------------------------------------------


def _actor_critic(model: BaseAlgorithm) -> Network:
    """PPO, A2C, TRPO and MaskablePPO, whose masks act behind the action head."""
    policy: Any = model.policy
    batch, actions = observations(model), _actions(model)
    shared = policy.share_features_extractor

    def watch(obs: Any) -> Any:
        return policy.get_distribution(obs), policy.predict_values(obs)

    def call() -> Any:
        if not _ends_with_its_heads(policy):
            return policy.evaluate_actions(batch, actions)
        features = policy.extract_features(batch)
        return _heads(policy, *(policy.mlp_extractor(features) if shared else _latent(policy, *features)))

    return Network(
        "policy",
        policy,
        (call,),
        watch,
        (policy.optimizer,),
        init=_orthogonal(policy),
        box=box(model, lambda x: _heads(policy, *_latent(policy, *_features(policy, x)))),
        critic=state_values(model),
    )


def _ends_with_its_heads(policy: Any) -> bool:
    """Whether ``evaluate_actions`` does nothing behind the two heads but build a distribution of the actions.

    Only gSDE's has units of its own, and tracing a distribution takes as long as tracing a small network.
    """
    methods = [getattr(policy, name, None) for name in ("evaluate_actions", "_get_action_dist_from_latent")]
    written_in = [getattr(method, "__globals__", {}).get("__name__", "") for method in methods]
    return not getattr(policy, "use_sde", False) and all(
        module.startswith(("stable_baselines3.", "sb3_contrib.")) for module in written_in
    )


def _latent(policy: Any, actor: Any, critic: Any) -> tuple[Any, Any]:
    """What the layers between make of the actor's and the critic's features."""
    return policy.mlp_extractor.forward_actor(actor), policy.mlp_extractor.forward_critic(critic)


def _heads(policy: Any, actor: Any, critic: Any) -> tuple[Any, Any]:
    """What the heads make of that."""
    return policy.action_net(actor), policy.value_net(critic)


def _features(policy: Any, x: Any) -> tuple[Any, Any]:
    """What actor and critic are given of preprocessed observations."""
    if policy.share_features_extractor:
        both = policy.features_extractor(x)
        return both, both
    return policy.pi_features_extractor(x), policy.vf_features_extractor(x)


def _recurrent(model: BaseAlgorithm) -> Network:
    """RecurrentPPO. Its layers behind the LSTM also see the steps that pad its sequences, which the loss leaves out:
    a unit that only those would wake is not called dead."""
    policy: Any = model.policy
    batch, actions = observations(model), _actions(model)
    sequences = 2
    going = torch.zeros(BATCH, device=model.device)
    starting = going.clone()
    starting[3] = 1.0

    def call() -> Any:
        *_, states = policy.forward(batch, _initial(policy, sequences), going)  # states that belong to units
        return policy.evaluate_actions(batch, actions, states, starting)

    def watch(obs: Any) -> Any:
        states = _initial(policy, 1)
        steps = next(iter(obs.values())) if isinstance(obs, dict) else obs
        starts = torch.zeros(len(steps), device=steps.device)
        return policy.get_distribution(obs, states.pi, starts)[0], policy.predict_values(obs, states.vf, starts)

    def follow(graph: Graph, report: Report) -> None:
        for name, edit in report.edits:
            for states, part, position in _recurrent_states(model, graph, name):
                for tensor in states:
                    _move_states(tensor[part], position, edit)

    return Network(
        "policy",
        policy,
        (call,),
        watch,
        (policy.optimizer,),
        init=_orthogonal(policy),
        box=_recurrent_box(model),
        fixed=dict.fromkeys(("lstm_actor", "lstm_critic"), _ONE_SIZE),
        follow=follow,
        critic="a recurrent critic predicts from all steps before, and folding looks at examples of one step",
    )


def _recurrent_box(model: BaseAlgorithm) -> Box | None:
    """Every observation, and behind an LSTM every output that it can have, whatever it has seen: |h| <= 1.

    What an LSTM makes of the observation in one step is not used, so units inside of it are never certified.
    """
    policy: Any = model.policy

    def run(x: Any) -> Any:
        observed, actor_state, critic_state = x
        actor, critic = _features(policy, observed)
        policy.lstm_actor(actor)  # so that it is seen what it reads
        if policy.lstm_critic is not None:
            policy.lstm_critic(critic)
        elif policy.shared_lstm:
            critic_state = actor_state
        else:
            critic_state = policy.critic(critic)
        return _heads(policy, *_latent(policy, actor_state, critic_state))

    ends = box(model, run)
    if ends is None or policy.lstm_actor.proj_size:
        return None
    _, low, high = ends
    most = torch.ones(1, policy.lstm_actor.hidden_size, device=model.device)
    return run, (low, -most, -most), (high, most, most)


_ONE_SIZE = "actor, critic and the stored states have one lstm_hidden_size"


def _initial(policy: Any, sequences: int) -> Any:
    """States of zeros, as an episode begins with."""
    from sb3_contrib.common.recurrent.type_aliases import RNNStates  # installed, or there were no such policy

    lstm = policy.lstm_actor
    size = (lstm.num_layers, sequences, lstm.hidden_size)
    device = lstm.weight_hh_l0.device
    return RNNStates(*[tuple(torch.zeros(size, device=device) for _ in range(2)) for _ in range(2)])


def _recurrent_states(
    model: BaseAlgorithm, graph: Graph, group: str
) -> Iterator[tuple[tuple[Tensor, ...], int, Tensor]]:
    """Hidden and cell states in which a group's units are kept: the pair, the layer, each unit's position."""
    policy: Any = model.policy
    states: Any = getattr(model, "_last_lstm_states", None)
    if states is None:
        return
    # without an LSTM of its own the critic is given the actor's states
    holders = {"lstm_actor": [states.pi] if policy.lstm_critic is not None else [states.pi, states.vf],
               "lstm_critic": [states.vf]}  # fmt: skip
    for axis in graph[group].outgoing:
        owner, _, leaf = axis.name.rpartition(".")
        if leaf.startswith("weight_hh_l"):
            distinct = {id(pair[0]): pair for pair in holders[owner]}
            for pair in distinct.values():
                yield pair, int(leaf.removeprefix("weight_hh_l")), axis.index[:, 0]


def _move_states(state: Tensor, position: Tensor, edit: recycle.Edit) -> None:
    """Give newborn units their states, ``(environments, units)``: a copy of the parent's, or zeros."""
    with torch.no_grad():
        if isinstance(edit, Split):
            state[:, position[list(edit.slots)]] = state[:, position[list(edit.parents)]]
        elif isinstance(edit, Reset):
            state[:, position[list(edit.slots)]] = 0.0


def _orthogonal(policy: Any) -> Init | None:
    return _Orthogonal(policy) if policy.ortho_init else None


class _Orthogonal:
    """How an actor-critic policy with ``ortho_init`` fills its layers: gain sqrt(2), heads .01 and 1, no bias."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.gains = {"action_net": 0.01, "value_net": 1.0}

    def __call__(self, name: str, tensor: Tensor, generator: torch.Generator | None) -> None:
        owner, _, leaf = name.rpartition(".")
        if not isinstance(self.policy.get_submodule(owner), (nn.Linear, nn.Conv2d)):
            return
        with torch.no_grad():
            if leaf == "bias":
                tensor.zero_()
            else:
                nn.init.orthogonal_(tensor, self.gains.get(owner, math.sqrt(2)), generator=generator)


# -- made-up inputs ----------------------------------------------------------------------------------------


def _plain(module: nn.Module) -> Any:
    """The module inside a ``torch.compile`` wrapper."""
    return getattr(module, "_orig_mod", module)


def _actions(model: BaseAlgorithm) -> Tensor:
    """A batch of made-up actions, as on-policy algorithms keep them."""
    chosen = torch.as_tensor(sample(model.action_space), device=model.device)
    return chosen.long().flatten() if isinstance(model.action_space, spaces.Discrete) else chosen.float()


def _scaled_actions(model: BaseAlgorithm) -> Tensor:
    """A batch of made-up actions in [-1, 1], as a replay buffer keeps continuous ones."""
    size = int(np.prod(model.action_space.shape or ()))
    drawn = np.random.default_rng(0).uniform(-1, 1, (BATCH, size))
    return torch.as_tensor(drawn, dtype=torch.float32, device=model.device)
