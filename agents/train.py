"""Train an agent on a task that keeps changing, and recycle its dead units: ``python -m agents.train --help``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecCheckNan, VecEnv

from agents import runs
from agents.algorithms import CONTINUOUS, DISCRETE, algorithm
from agents.callback import RecycleCallback
from agents.command_line import MISTAKES, pairs, reported
from agents.drifting import ClearBuffer, Evaluation, restarting_exploration
from agents.envs import make_env, parse
from recycle.names import did_you_mean

Pairs = tuple[str, ...]
"""``key:value`` words; a value is a Python literal where it reads as one, else a string."""


@dataclass(frozen=True)
class Args:
    """Train an agent on a task that keeps changing, and recycle its dead units.

    Everything lands in <log-folder>/<env>-<drift>/<algo>-<method>[-<tag>]/<seed>/.
    """

    algo: str = "ppo"
    """ppo, a2c, dqn, sac, td3, ddpg; with the contrib extra recurrent_ppo, maskable_ppo, trpo, qrdqn, tqc, crossq."""
    env: str = "CartPole-v1"
    """A registered gymnasium id. DigitsBandit-v1 is a fast one of our own."""
    env_kwargs: Pairs = ()
    """key:value pairs for the environment, e.g. images:200."""
    drift: tuple[str, ...] = ()
    """What changes: permute, offset, scale, mask, remap, reward_scale, reward_flip, physics, relabel; none: nothing."""
    drift_kwargs: Pairs = ()
    """key:value pairs for the drifts, e.g. strength:0.5."""
    change: str = "every:10000"
    """When, in environment steps of all copies: every:N, at:N,M,..., cyclic:N[,TASKS] or random:MEAN."""
    method: str = "split"
    """A method of recycle.METHODS, my_module:MyMethod, several that go together (redo+l2_init), or none (not even
    statistics)."""
    method_kwargs: Pairs = ()
    """key:value pairs for the method, e.g. noise:0.01; of several methods redo.tau:0.1."""
    every: int = 10_000
    """Environment steps from one recycling event to the next."""
    warmup: int = 0
    """Environment steps before the first edit."""
    cooldown: int = 0
    """Events for which a unit that was just recycled is left alone."""
    cap: float = 1.0
    """Largest part of a layer that one event may recycle."""
    n: Annotated[int, tyro.conf.arg(name="n-timesteps", aliases=("-n",))] = 100_000
    """Environment steps to train for, all copies together."""
    seed: int = 0
    """Of the agent, its environments and their changes."""
    n_envs: int = 1
    """Copies of the environment."""
    vec_env: Literal["dummy", "subproc"] = "dummy"
    """Run the copies in this process, or in one process each."""
    policy: str = "auto"
    """MlpPolicy, CnnPolicy or MultiInputPolicy (MlpLstmPolicy, ... for recurrent_ppo); auto: by the observations."""
    hyperparams: Pairs = ()
    """key:value pairs for the algorithm, e.g. learning_rate:3e-3 n_steps:128."""
    policy_kwargs: Pairs = ()
    """key:value pairs for the policy, e.g. net_arch:[64,64] activation_fn:relu (PPO's own default is tanh)."""
    clear_buffer: bool = False
    """DQN: empty the replay buffer at each change; old transitions are wrong then."""
    restart_exploration: bool = False
    """DQN: let epsilon fall again from its initial value at each change."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    num_threads: int | None = None
    """Threads for torch; 1 is fastest for small networks. None: torch's own choice."""
    progress: Annotated[bool, tyro.conf.arg(aliases=("-P",))] = False
    """Show a progress bar."""
    eval_freq: int = 0
    """Evaluate every so many environment steps; 0: never."""
    eval_episodes: int = 5
    """Episodes for each evaluation."""
    eval_tasks: Literal["current", "all"] = "current"
    """Evaluate on the task of the moment, or on all so far, which measures forgetting."""
    save_freq: int = 0
    """Save a checkpoint every so many environment steps; 0: only the final model."""
    log_folder: str = "runs"
    """Where runs are kept."""
    tag: str | None = None
    """Keeps two settings of one arm apart."""
    overwrite: bool = False
    """Replace an earlier run of the same name."""
    gym_packages: tuple[str, ...] = ()
    """Modules to import first, for environments that they register."""
    verbose: int = 0
    """1 prints SB3's tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and train; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.train")
    return reported(lambda: print(train(args, sys.argv[1:] if argv is None else argv)))


def train(args: Args, words: Sequence[str] = ()) -> Path:
    """Train one agent and return its run folder. Nothing is written before everything has been built.

    ``words``, the options as they were typed, are kept in ``command.txt``.

    Raises:
        ValueError: an option is wrong; the message says what was expected, what came and what to do.
        FileExistsError: the run exists already.
    """
    _check(args)
    for package in args.gym_packages:
        importlib.import_module(package)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    _check_device(args.device)
    folder = runs.run_folder(
        args.log_folder,
        env=args.env,
        drift=list(args.drift),
        algo=args.algo,
        method=args.method,
        tag=args.tag,
        seed=args.seed,
    )
    if folder.exists() and not args.overwrite:
        raise FileExistsError(f"{folder} exists already. Pass --overwrite to replace it, or --tag NAME")
    schedule = parse(args.change, args.seed)
    changes = [*schedule.change_points(args.n), args.n] if args.drift else [args.n]
    env = _vec_env(args)
    try:
        env.reset()  # a NaN at the very start leaves no trace
        model = _model(args, env)
        if isinstance(model, DQN) and args.restart_exploration:
            model.exploration_schedule = restarting_exploration(model, changes[:-1], args.n)
        episodes = runs.EpisodeLog(folder / "episodes.csv")
        callbacks = [episodes, *_callbacks(args, folder)]
        for callback in callbacks:
            if isinstance(callback, RecycleCallback):
                callback.prepare(model)
        runs.create(folder, _config(args, model, changes), words, overwrite=args.overwrite)
        model.set_logger(configure(str(folder), ["csv", "tensorboard", *(["stdout"] if args.verbose else [])]))
        try:
            model.learn(args.n, callback=callbacks, progress_bar=args.progress)
        except MISTAKES as error:
            raise RuntimeError(f"{error} ({folder} keeps what was logged; --overwrite starts again)") from error
        finally:
            episodes.close()
            for callback in callbacks:
                if isinstance(callback, Evaluation):
                    callback.env.close()
        model.logger.close()
        runs.save_model(model, folder / "model.zip")
    finally:
        env.close()
    return folder


def _check_device(name: str) -> None:
    kind = torch.device("cpu" if name == "auto" else name).type  # refuses a name that is none
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no GPU here. Pass --device cpu or auto")


def _check(args: Args) -> None:
    algorithm(args.algo)
    counts = {"n-timesteps": args.n, "every": args.every, "n-envs": args.n_envs, "eval-episodes": args.eval_episodes}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for name, value in {"eval-freq": args.eval_freq, "save-freq": args.save_freq, "seed": args.seed}.items():
        if value < 0:
            raise ValueError(f"--{name} must be 0 or more, got {value}")
    if args.num_threads is not None and args.num_threads < 1:
        raise ValueError(f"--num-threads must be at least 1, got {args.num_threads}")
    if args.tag is not None and not re.fullmatch(r"[\w.+-]+", args.tag):
        raise ValueError(f"--tag becomes part of a folder's name: letters, digits, . + - and _ only, got {args.tag!r}")
    if args.algo != "dqn" and (args.clear_buffer or args.restart_exploration):
        raise ValueError("--clear-buffer and --restart-exploration are for dqn: ppo keeps no replay and no epsilon")
    if not args.drift and (args.clear_buffer or args.restart_exploration):
        raise ValueError("--clear-buffer and --restart-exploration act at task changes: name what changes with --drift")


def _check_observations(space: spaces.Space[Any]) -> None:
    """SB3 takes a long way to say what it cannot read."""
    parts = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    for part in parts:
        if not isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                "stable-baselines3 reads Box, Discrete, MultiDiscrete and MultiBinary observation spaces, and a flat "
                f"Dict of them, got {space}. Wrap the environment so that it gives one of these"
            )


def _vec_env(args: Args, *, evaluation: bool = False) -> VecEnv:
    """The training copies, or one copy for evaluation whose task is set from outside."""
    count = 1 if evaluation else args.n_envs
    makers: list[Callable[[], Any]] = [
        partial(_one_env, args, pairs(args.env_kwargs), pairs(args.drift_kwargs), rank, evaluation)
        for rank in (range(count) if not evaluation else [args.n_envs])
    ]
    several = args.vec_env == "subproc" and not evaluation
    if several:
        makers[0]().close()  # a mistake is reported from here, not from a worker's traceback
    venv = SubprocVecEnv(makers) if several else DummyVecEnv(makers)
    return VecCheckNan(venv, raise_exception=True, check_inf=True)


def _one_env(
    args: Args, env_kwargs: dict[str, Any], drift_kwargs: dict[str, Any], rank: int, evaluation: bool
) -> Monitor[Any, Any]:
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
    return Monitor(env)


def _model(args: Args, env: VecEnv) -> BaseAlgorithm:
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
    policy = _policy(env.observation_space, "Lstm" * (args.algo == "recurrent_ppo"))
    policy = policy if args.policy == "auto" else args.policy
    return kind(
        policy,
        env,
        seed=args.seed,
        device=args.device,
        policy_kwargs=policy_kwargs or None,
        verbose=args.verbose,
        **given,
    )


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


def _callbacks(args: Args, folder: Path) -> list[BaseCallback]:
    found: list[BaseCallback] = []
    if args.clear_buffer:
        found.append(ClearBuffer())
    if args.method != "none":
        found.append(
            RecycleCallback(
                method=args.method,
                method_kwargs=pairs(args.method_kwargs),
                every=args.every,
                warmup=args.warmup,
                cooldown=args.cooldown,
                cap=args.cap,
                seed=args.seed,
                edits=folder / "edits.jsonl",
                verbose=args.verbose,
            )
        )
    if args.eval_freq:
        env = _vec_env(args, evaluation=True)
        every_task = args.eval_tasks == "all"
        path = folder / "evaluations.csv"
        found.append(Evaluation(env, path, every=args.eval_freq, episodes=args.eval_episodes, every_task=every_task))
    if args.save_freq:
        every = max(1, args.save_freq // args.n_envs)
        found.append(CheckpointCallback(every, str(folder / "checkpoints"), "model", save_replay_buffer=True))
    return found


def _config(args: Args, model: BaseAlgorithm, changes: Sequence[int]) -> dict[str, Any]:
    """The options as given, values parsed, and what they came to."""
    config: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        is_pairs = field.name.endswith("kwargs") or field.name == "hyperparams"
        config[field.name] = pairs(value) if is_pairs else list(value) if isinstance(value, tuple) else value
    config["total_timesteps"] = config.pop("n")
    config["policy_class"] = type(model.policy).__name__
    config["change_points"] = list(changes[:-1])
    return config


if __name__ == "__main__":
    sys.exit(main())
