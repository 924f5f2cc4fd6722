"""Build what the options of a run name: environments, model and policy."""

from __future__ import annotations

import importlib
import signal
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecCheckNan, VecEnv

from agents.algorithms import CONTINUOUS, DISCRETE, algorithm
from agents.checkpoint import policy_weights
from agents.checks import blamed
from agents.command_line import pairs
from agents.elastic import optimizers_of, remember_widths
from agents.envs import make_env, parse
from agents.envs.snapshot import Snapshot
from agents.hyperparameters import hyperparameters, policy_arguments
from agents.layered import layered, layered_kwargs
from agents.networks import networks_of
from agents.options import Args
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


def import_package(name: str) -> None:
    """Import a module that registers environments.

    Raises:
        ValueError: its name is none.
        ImportError: there is no such module.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--gym-packages takes names of modules, such as my_package.envs, got {name!r}")
    importlib.import_module(name)


def change_points(args: Args) -> list[int]:
    """The steps at which the task of a run changes.

    Raises:
        ValueError: the schedule is none, or changes more often than a run's folder can tell.
    """
    schedule = parse(args.change, args.seed)
    interval = getattr(schedule, "interval", getattr(schedule, "mean_interval", args.n))
    if args.n // interval > MOST_CHANGES:
        raise ValueError(f"--change {args.change} is {args.n // interval} changes in {args.n} steps: make them fewer")
    return schedule.change_points(args.n)


MOST_CHANGES = 1_000_000


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
        import_package(package)
    with blamed(f"--env {args.env} --env-kwargs {env_kwargs} --drift-kwargs {drift_kwargs}"):
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
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the training one ends its workers
        signal.signal(number, signal.SIG_IGN)
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
    given = hyperparameters(args.algo, kind, pairs(args.hyperparams))
    _check_actions(args.algo, env.action_space)
    if args.algo == "maskable_ppo" and not env.has_attr("action_masks"):
        raise ValueError(
            "maskable_ppo asks the environment which actions are allowed, and this one has no method action_masks(). "
            "Use ppo, or an environment that has one"
        )
    policy = _policy(env.observation_space, "Lstm" * (args.algo == "recurrent_ppo"))
    policy = policy if args.policy == "auto" else args.policy
    policy_kwargs = policy_arguments(args.algo, kind, policy, pairs(args.policy_kwargs))
    if args.layer_norm or args.crelu:
        policy_kwargs |= layered_kwargs(kind, policy, layer_norm=args.layer_norm, crelu=args.crelu)
    with blamed(f"{args.algo} cannot be built with --hyperparams {given} and --policy-kwargs {policy_kwargs}"):
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


def _policy(space: spaces.Space[Any], memory: str = "") -> str:
    if isinstance(space, spaces.Dict):
        return f"MultiInput{memory}Policy"
    return f"Cnn{memory}Policy" if is_image_space(space) else f"Mlp{memory}Policy"


def _check_actions(algo: str, space: spaces.Space[Any]) -> None:
    for names, kind in ((CONTINUOUS, spaces.Box), (DISCRETE, spaces.Discrete)):
        if algo in names and not isinstance(space, kind):
            raise ValueError(f"{algo} needs a {kind.__name__} action space, the environment has {space}; ppo takes any")
