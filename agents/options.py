"""The options of ``python -m agents.train``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from agents.algorithms import algorithm
from agents.checks import at_least, threads
from agents.command_line import pairs, words, written

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
    sample_every: int = 8
    """Statistics look at the passes of every so many updates."""
    jumps: bool = False
    """Log how far each event moves the outputs, at once and 5, 20, 50 and 200 updates later."""
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
    layer_norm: bool = False
    """Normalise before every activation."""
    crelu: bool = False
    """Concatenated ReLUs: half the units in each hidden layer, both signs of each."""
    weight_decay: float = 0.0
    """Decay of all weights, as the algorithm's own optimizer has it (Adam: an L2 penalty in the gradient)."""
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
    """Save a checkpoint every so many environment steps; 0: by the clock alone."""
    save_minutes: float = 15.0
    """Save a checkpoint every so many minutes, or less often where saving is slow; 0: never."""
    keep: int = 2
    """Checkpoints to keep; older ones are deleted."""
    stop_on_nan: bool = False
    """End the run if a weight is NaN or infinite when a checkpoint is due. Otherwise it says so, and keeps the good
    checkpoints that it has."""
    trained_agent: Annotated[str | None, tyro.conf.arg(aliases=("-i",))] = None
    """Begin with the policy of this checkpoint or model.zip: its weights, and nothing else of its run."""
    resume: str | None = None
    """Go on with the run in this folder as if it had never stopped. Takes no other option but -P and --verbose."""
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


def check(args: Args) -> None:
    """Refuse what no run could be made of.

    Raises:
        ValueError: an option is out of range, or does not go with another.
    """
    algorithm(args.algo)
    if args.n < 1:
        raise ValueError(f"--n-timesteps must be at least 1, got {args.n}")
    at_least(args, every=1, sample_every=1, n_envs=1, eval_episodes=1, keep=1)
    threads(args.num_threads)
    at_least(args, eval_freq=0, save_freq=0, seed=0, warmup=0, cooldown=0)
    for name, most in {"n": MOST_STEPS, "seed": 2**32 - 1 - args.n_envs, "n_envs": 4096}.items():
        value = getattr(args, name)
        if value > most:
            raise ValueError(f"--{'n-timesteps' if name == 'n' else name.replace('_', '-')} is at most {most}: {value}")
    if "/" in args.method or "\0" in args.method + args.env:
        raise ValueError(f"--method and --env become part of a folder's name, got {args.method!r} and {args.env!r}")
    if not 0 <= args.save_minutes < float("inf"):
        raise ValueError(f"--save-minutes must be 0 or more, got {args.save_minutes}")
    if not 0 <= args.weight_decay < float("inf"):
        raise ValueError(f"--weight-decay must be 0 or more, got {args.weight_decay}")
    if args.tag is not None and not re.fullmatch(r"[\w.+-]+", args.tag):
        raise ValueError(f"--tag becomes part of a folder's name: letters, digits, . + - and _ only, got {args.tag!r}")
    if args.algo != "dqn" and (args.clear_buffer or args.restart_exploration):
        raise ValueError("--clear-buffer and --restart-exploration are for dqn: ppo keeps no replay and no epsilon")
    if not args.drift and (args.clear_buffer or args.restart_exploration):
        raise ValueError("--clear-buffer and --restart-exploration act at task changes: name what changes with --drift")


MOST_STEPS = 2**53
"""Above, step counts would no longer be exact in TensorBoard and tables."""

FORMAT = 2
"""Of run folders: what ``config.yaml`` and checkpoints hold, and how. Raise it when an older one would be misread."""


def as_config(args: Args) -> dict[str, Any]:
    """The options as ``config.yaml`` keeps them: values parsed, and the format of the run's folder first."""
    config: dict[str, Any] = {"format": FORMAT}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if is_pairs(field.name):
            value = {key: written(each) for key, each in pairs(value).items()}
        config[field.name] = list(value) if isinstance(value, tuple) else value
    config["total_timesteps"] = config.pop("n")
    return config


def from_config(config: Mapping[str, Any]) -> Args:
    """The inverse of :func:`as_config`; what else a config says is left out.

    Raises:
        ValueError: the config lacks an option.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Args):
        name = "total_timesteps" if field.name == "n" else field.name
        if name not in config:
            raise ValueError(f"config.yaml lacks {name!r}: it is not as agents.train wrote it")
        value = config[name]
        found[field.name] = words(value) if is_pairs(field.name) else tuple(value) if type(value) is list else value
    return Args(**found)


def as_words(args: Args) -> tuple[str, ...]:
    """The options as they are typed, defaults left out: ``("--algo=dqn", "--drift", "permute", "--jumps")``."""
    found: list[str] = []
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), "--" + field.name.replace("_", "-")
        name = "--n-timesteps" if field.name == "n" else name
        if value == field.default:
            continue
        if isinstance(value, tuple):
            found += [name, *value]
        else:
            found.append(name if value is True else f"{name}={value}")
    return tuple(found)


def is_pairs(name: str) -> bool:
    """Whether the option of that name takes ``key:value`` words."""
    return name.endswith("kwargs") or name == "hyperparams"
