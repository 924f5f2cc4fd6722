"""Look at a saved model's units without changing it: ``python -m agents.inspect model.zip --env CartPole-v1``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

import recycle
from agents.algorithms import ALGOS, algorithm_of
from agents.build import import_package
from agents.checks import blamed
from agents.command_line import pairs, reported
from agents.envs import make_env
from agents.networks import Network, networks_of
from recycle import metrics
from recycle.stats import Stats
from recycle.track import Tracker


@dataclass(frozen=True)
class Args:
    """Look at the units of a saved model, on observations from a rollout of its policy."""

    model: Annotated[Path, tyro.conf.Positional]
    """The zip that model.save wrote. Loading one unpickles it: open only files that you trust."""
    env: str
    """The environment it was trained on."""
    env_kwargs: tuple[str, ...] = ()
    """key:value pairs for the environment."""
    drift: tuple[str, ...] = ()
    """Drifts to put round it; --task says which task to look at."""
    drift_kwargs: tuple[str, ...] = ()
    """key:value pairs for the drifts."""
    task: int = 0
    """The task of the drift."""
    steps: int = 2048
    """Environment steps to look at."""
    seed: int = 0
    """Of the rollout and the drift."""
    vecnormalize: Path | None = None
    """The VecNormalize statistics (.pkl) that the model was trained with."""
    gym_packages: tuple[str, ...] = ()
    """Modules to import first, for environments that they register."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.inspect")
    return reported(lambda: show(inspect(args)))


@dataclass(frozen=True, eq=False)
class Inspection:
    """One network: what can be edited in it, and how its units fared on the observations."""

    network: Network
    graph: recycle.Graph
    tracker: Tracker

    def stats(self, name: str) -> Stats:
        """Statistics of a group."""
        return self.tracker.stats(self.graph[name])

    def certified(self) -> dict[str, float]:
        """The share of each group's units that is dead for every possible observation; empty if that has no bounds."""
        proofs = {} if self.network.box is None else recycle.certify(self.graph, *self.network.box)
        return {name: float(units.double().mean()) for name, units in proofs.items()}


def inspect(args: Args) -> list[Inspection]:
    """Roll the policy out, run its networks on what it saw, and return what each group did.

    Raises:
        ValueError: no such file or environment, an unsupported algorithm, or spaces that do not fit.
    """
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    if args.seed < 0 or args.task < 0:
        raise ValueError(f"--seed and --task must be 0 or more, got {args.seed} and {args.task}")
    if args.task and not args.drift:
        raise ValueError(f"--task {args.task} says which task of a drift to look at; name the drift with --drift")
    if args.seed + args.steps >= 2**32:
        raise ValueError(f"--seed and --steps are below 2**32 together, got {args.seed} and {args.steps}")
    for package in args.gym_packages:
        import_package(package)
    env = _env(args)
    try:
        model = load(args.model, env)
        model.set_random_seed(args.seed)
        seen = _rollout(model, env, args.steps)
    finally:
        env.close()
    found = []
    for network in networks_of(model):
        graph = network.trace()
        tracker = Tracker(graph, sample_every=1, training_only=False)
        with tracker, torch.no_grad():
            for start in range(0, args.steps, 256):
                network.watch(model.policy.obs_to_tensor(_part(seen, start, start + 256))[0])
        found.append(Inspection(network, graph, tracker))
    return found


def load(path: Path, env: VecEnv) -> BaseAlgorithm:
    """The model in a zip, as the algorithm that wrote it.

    Raises:
        ValueError: the file is no model, or of an algorithm that is not supported.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        data, _, _ = load_from_zip_file(path, device="cpu")
    except Exception as error:  # SB3 raises whatever zipfile, json or pickle raise
        raise ValueError(f"{path} is no stable-baselines3 model: {error}") from error
    kind = algorithm_of(data or {})
    if kind is None:
        raise ValueError(f"{path} was written by an algorithm that is not supported; known are {', '.join(ALGOS)}")
    with blamed(f"{path} cannot be loaded for this environment"):
        return kind.load(path, env=env, device="cpu")


def _env(args: Args) -> VecEnv:
    def build() -> Any:
        env_kwargs, drift_kwargs = pairs(args.env_kwargs), pairs(args.drift_kwargs)
        with blamed(
            f"--env {args.env} with {env_kwargs} and the drifts {' '.join(args.drift) or 'none'} {drift_kwargs}"
        ):
            env = make_env(
                args.env,
                env_kwargs=env_kwargs,
                drift=args.drift,
                drift_kwargs=drift_kwargs,
                seed=args.seed,
                frozen=True,
            )
        if args.drift:
            env.get_wrapper_attr("set_task")(args.task)
        return env

    env: VecEnv = DummyVecEnv([build])
    if args.vecnormalize is not None:
        try:
            env = VecNormalize.load(str(args.vecnormalize), env)
        except Exception as error:  # whatever pickle raises
            raise ValueError(f"{args.vecnormalize} holds no VecNormalize statistics: {error}") from error
        env.training = False
    return env


def _rollout(model: BaseAlgorithm, env: VecEnv, steps: int) -> Any:
    """Observations of one copy acting as it does in training, ``(steps, ...)``, or a dict of them."""
    obs, seen = env.reset(), []
    state, starts = None, np.ones(env.num_envs, dtype=bool)  # of a recurrent policy
    for _ in track(range(steps), "rolling out", transient=True):
        seen.append(obs)
        action, state = model.predict(obs, state, starts, deterministic=False)  # type: ignore[arg-type]
        obs, _, starts, _ = env.step(action)
    if isinstance(seen[0], dict):
        return {key: np.concatenate([o[key] for o in seen]) for key in seen[0]}  # type: ignore[call-overload]
    return np.concatenate(seen)  # type: ignore[arg-type]


def _part(seen: Any, start: int, end: int) -> Any:
    return {k: v[start:end] for k, v in seen.items()} if isinstance(seen, dict) else seen[start:end]


def show(found: Sequence[Inspection]) -> None:
    """Print one table for each network, and what cannot be edited."""
    console = Console()
    for part in found:
        table = Table(title=f"{part.network.name}: units over {_samples(part)} observations", title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("units", "dead", "certified", "dormant", "constant", "saturated", "dupl.", "rank"):
            table.add_column(name, justify="right", no_wrap=True)
        certified = part.certified()
        for group in part.graph:
            stats, seen = part.stats(group.name), part.tracker.latest(group)
            rank = "-" if seen is None else f"{metrics.effective_rank(seen):.1f}"
            counts = [metrics.dead(stats), metrics.dormant(stats), metrics.constant(stats), metrics.saturated(stats),
                      float(metrics.duplicates(group).double().mean())]  # fmt: skip
            cells = [f"{c:.0%}" for c in counts] if stats.samples else ["-"] * 5
            proved = f"{certified[group.name]:.0%}" if group.name in certified else "-"
            table.add_row(group.name, str(group.width), cells[0], proved, *cells[1:], rank)
        console.print(table)
        for name, why in {**part.tracker.unobserved, **part.graph.frozen}.items():
            console.print(f"  not recycled: {name} ({why})", style="dim", highlight=False)


def _samples(part: Inspection) -> int:
    return max((part.stats(group.name).samples for group in part.graph), default=0)


if __name__ == "__main__":
    sys.exit(main())
