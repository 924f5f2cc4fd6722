"""Build what the options of a run name: environments, model and policy."""

from __future__ import annotations

import importlib
import inspect
import signal
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecCheckNan, VecEnv

from agents.algorithms import CONTINUOUS, DISCRETE, algorithm
from agents.checkpoint import policy_weights
from agents.command_line import pairs
from agents.elastic import optimizers_of, remember_widths
from agents.envs import make_env
from agents.envs.snapshot import Snapshot
from agents.layered import layered, layered_kwargs
from agents.networks import networks_of
from agents.options import Args
from recycle.names import did_you_mean
from recycle.resize import reshape


def _check_observations(space: spaces.Space[Any]) -> None:
    """SB3 takes a long way to say what it cannot read."""
    parts = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    for part in parts:
        if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                "stable-baselines3 reads Box, Discrete, MultiDiscrete and MultiBinary observation spaces, and a flat "
                f"Dict of them, got {space}. Wrap the environment so that it gives one of these"
            )


def vec_env(args: Args, *, evaluation: bool = False) -> VecEnv:
    """The training copies, or one copy for evaluation whose task is set from outside."""
    count = 1 if evaluation else args.n_envs
    makers: list[Callable[[], Any]] = [
        partial(_one_env, args, pairs(args.env_kwargs), pairs(args.drift_kwargs), rank, evaluation)
        for rank in (range(count) if not evaluation else [args.n_envs])
    ]
    several = args.vec_env == "subproc" and not evaluation
    if several:
        makers[0]().close()  # a mistake is reported from here, not from a worker's traceback
        makers = [partial(_in_worker, maker) for maker in makers]
    venv = SubprocVecEnv(makers) if several else DummyVecEnv(makers)
    return VecCheckNan(venv, raise_exception=True, check_inf=True)


def _one_env(
    args: Args, env_kwargs: dict[str, Any], drift_kwargs: dict[str, Any], rank: int, evaluation: bool
) -> Snapshot:
    for package in args.gym_packages:
        importlib.import_module(package)
    env = make_env(
        args.env,
        env_kwargs=env_kwargs,
        drift=args.drift,
        drift_kwargs=drift_kwargs,
        change=args.change,
        seed=args.seed,
        n_envs=args.n_envs,
        rank=rank,
        frozen=evaluation,
    )
    _check_observations(env.observation_space)
    monitor = Monitor(env)
    for history in (
        "episode_returns",
        "episode_lengths",
        "episode_times",
    ):  # it would keep all, in every checkpoint too
        setattr(monitor, history, deque(maxlen=1))
    return Snapshot(monitor)


def _in_worker(maker: Callable[[], Any]) -> Any:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the training one ends its workers
    return maker()


def close(env: VecEnv) -> None:
    """Close a vectorised environment, also one whose worker has died."""
    try:
        env.close()
    except (EOFError, OSError):
        for process in getattr(env.unwrapped, "processes", ()):
            process.terminate()
            process.join()


def load_weights(model: BaseAlgorithm, path: str) -> None:
    """Give a fresh model the policy of a checkpoint or ``model.zip``: its weights, its widths, and nothing else.

    The file is not unpickled.

    Raises:
        ValueError: the file holds no policy, or one of another structure.
    """
    weights = policy_weights(path)
    own = {name: tuple(tensor.shape) for name, tensor in model.policy.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if own.keys() != shapes.keys():
        odd = ", ".join(sorted(own.keys() ^ shapes.keys())[:3])
        raise ValueError(f"-i {path}: its policy is built in another way ({odd}). Pass the options it was trained with")
    if own != shapes:
        try:
            reshape(model.policy, shapes, optimizers_of(model.policy))
        except ValueError as error:
            raise ValueError(f"-i {path}: {error}. Pass the options it was trained with") from error
        remember_widths(model)
    model.policy.load_state_dict(weights)


def new_model(args: Args, env: VecEnv) -> BaseAlgorithm:
    """The untrained model.

    Raises:
        ValueError: an option does not fit the algorithm or the environment.
    """
    kind = algorithm(args.algo)
    given = pairs(args.hyperparams)
    known = [n for n in inspect.signature(kind.__init__).parameters if n not in _SET_BY_US and n[0] != "_"]
    defaults = inspect.signature(kind.__init__).parameters
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{args.algo} has no hyperparameter {name!r}: {did_you_mean(name, known)}")
        default = defaults[name].default
        if isinstance(default, (int, float)) and isinstance(value, str):
            raise ValueError(f"{args.algo}'s {name} is a number (by default {default}), got {value!r}")
        if type(default) is int and isinstance(value, float) and value.is_integer():
            given[name] = int(value)  # batch_size:1e3
    policy_kwargs = pairs(args.policy_kwargs)
    if isinstance(policy_kwargs.get("activation_fn"), str):
        policy_kwargs["activation_fn"] = _activation(policy_kwargs["activation_fn"])
    _check_actions(args.algo, env.action_space)
    if args.algo == "maskable_ppo" and not env.has_attr("action_masks"):
        raise ValueError(
            "maskable_ppo asks the environment which actions are allowed, and this one has no method action_masks(). "
            "Use ppo, or an environment that has one"
        )
    policy = _policy(env.observation_space, "Lstm" * (args.algo == "recurrent_ppo"))
    policy = policy if args.policy == "auto" else args.policy
    if args.layer_norm or args.crelu:
        policy_kwargs |= layered_kwargs(kind, policy, layer_norm=args.layer_norm, crelu=args.crelu)
    model = kind(
        layered if args.layer_norm or args.crelu else policy,  # type: ignore[arg-type]
        env,
        seed=args.seed,
        device=args.device,
        policy_kwargs=policy_kwargs or None,
        verbose=args.verbose,
        **given,
    )
    for network in networks_of(model) if args.weight_decay else ():
        for group in (group for optimizer in network.optimizers for group in optimizer.param_groups):
            group["weight_decay"] = args.weight_decay  # optimizer_kwargs would drop SB3's own eps, and A2C's optimizer
    return model


_SET_BY_US = {"self", "policy", "env", "seed", "device", "policy_kwargs", "verbose", "tensorboard_log"}


def _policy(space: spaces.Space[Any], memory: str = "") -> str:
    if isinstance(space, spaces.Dict):
        return f"MultiInput{memory}Policy"
    return f"Cnn{memory}Policy" if is_image_space(space) else f"Mlp{memory}Policy"


def _check_actions(algo: str, space: spaces.Space[Any]) -> None:
    for names, kind in ((CONTINUOUS, spaces.Box), (DISCRETE, spaces.Discrete)):
        if algo in names and not isinstance(space, kind):
            raise ValueError(f"{algo} needs a {kind.__name__} action space, the environment has {space}; ppo takes any")


def _activation(name: str) -> type[torch.nn.Module]:
    layers = {k.lower(): v for k, v in vars(torch.nn.modules.activation).items() if isinstance(v, type)}
    if name.lower() not in layers:
        raise ValueError(f"torch.nn has no activation {name!r}: {did_you_mean(name, layers)}")
    return layers[name.lower()]
