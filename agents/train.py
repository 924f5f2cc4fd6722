"""Train an agent on a task that keeps changing, and recycle its dead units: ``python -m agents.train --help``."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from agents import checkpoint, logs, runs
from agents.build import change_points, close, import_package, load_weights, new_model, vec_env
from agents.callback import RecycleCallback
from agents.checkpoint import Checkpoint
from agents.checks import blamed, writable
from agents.children import end_with_parent
from agents.command_line import MISTAKES, Broken, one_line, pairs, reported
from agents.drifting import ClearBuffer, Evaluation, restarting_exploration
from agents.options import Args, as_config, check
from agents.saving import Checkpoints


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and train; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.train")
    if args.resume is not None:
        return reported(lambda: print(resume(args)))
    return reported(lambda: print(train(args, sys.argv[1:] if argv is None else argv)))


def train(args: Args, words: Sequence[str] = ()) -> Path:
    """Train one agent and return its run folder. Nothing is written before everything has been built.

    ``words``, the options as they were typed, are kept in ``command.txt``.

    Raises:
        ValueError: an option is wrong; the message says what was expected, what came and what to do.
        FileExistsError: the run exists already.
        Stopped: the process was asked to end; a checkpoint was written.
    """
    check(args)
    writable(args.log_folder)
    folder = runs.run_folder(
        args.log_folder,
        env=args.env,
        drift=list(args.drift),
        algo=args.algo,
        method=args.method,
        tag=args.tag,
        seed=args.seed,
    )
    runs.check_free(folder, overwrite=args.overwrite)
    with _built(args, folder) as run:
        config = as_config(args) | {"policy_class": type(run.model.policy).__name__, "change_points": run.changes}
        runs.create(folder, config, words, overwrite=args.overwrite)
        with runs.claim(folder):
            _learn(run)
    return folder


def resume(given: Args) -> Path:
    """Go on with the run in ``given.resume`` from its latest checkpoint, or from zero, as if it had never stopped.

    Of a finished run nothing is left to do. A checkpoint is read as :mod:`agents.checkpoint` says; resume only runs
    that you trust.

    Raises:
        ValueError: another option was given, or the folder's files are not those of a run that can go on.
        FileNotFoundError: there is no run.
        BlockingIOError: another process is training it.
        Stopped: the process was asked to end; a checkpoint was written.
    """
    folder = Path(given.resume or "")
    if given != dataclasses.replace(Args(), resume=given.resume, progress=given.progress, verbose=given.verbose):
        raise ValueError("--resume takes no other option but -P and --verbose: the run's folder knows them all")
    with runs.claim(folder):
        if runs.finished(folder):
            return folder
        args = dataclasses.replace(runs.read_args(folder), progress=given.progress, verbose=given.verbose)
        check(args)
        saved = checkpoint.newest(folder)
        with _built(args, folder, saved) as run:
            logs.cut(folder, saved.state["logs"] if saved else {}, saved.state["columns"] if saved else [])
            _learn(run)
    return folder


@dataclass(frozen=True)
class _Run:
    """One that is ready to learn, or to go on."""

    args: Args
    folder: Path
    model: BaseAlgorithm
    callbacks: list[BaseCallback]
    checkpoints: Checkpoints
    changes: list[int]
    resumed: bool


@contextlib.contextmanager
def _built(args: Args, folder: Path, saved: Checkpoint | None = None) -> Iterator[_Run]:
    """Environments, model and callbacks, where the checkpoint stands if there is one."""
    for package in args.gym_packages:
        import_package(package)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    _check_device(args.device)
    changes = change_points(args) if args.drift else []
    with contextlib.ExitStack() as stack:
        env = vec_env(args)
        stack.callback(close, env)
        env.reset()  # a NaN at the very start leaves no trace
        model = new_model(args, env)
        if args.trained_agent is not None and saved is None:
            load_weights(model, args.trained_agent)
        if saved is not None:
            saved.rebuild(model)
        if isinstance(model, DQN) and args.restart_exploration:
            model.exploration_schedule = restarting_exploration(model, changes, args.n)
        evaluation = vec_env(args, evaluation=True) if args.eval_freq else None
        if evaluation is not None:
            stack.callback(close, evaluation)
        episodes = runs.EpisodeLog(folder / "episodes.csv")
        stack.callback(episodes.close, quietly=True)
        callbacks = [episodes, *_callbacks(args, folder, evaluation)]
        if saved is not None:
            saved.restore(model, callbacks, evaluation)
        for callback in callbacks:
            if isinstance(callback, RecycleCallback):
                callback.prepare(model)
        checkpoints = Checkpoints(
            folder,
            callbacks,
            evaluation,
            every=args.save_freq,
            minutes=args.save_minutes,
            keep=args.keep,
            stop_on_nan=args.stop_on_nan,
            resumed=saved,
        )
        yield _Run(args, folder, model, callbacks, checkpoints, changes, saved is not None)


def _learn(run: _Run) -> None:
    """Train to the end and save the model."""
    model, args = run.model, run.args
    try:
        with run.checkpoints.interruption:
            model.set_logger(logs.logger(run.folder, tables=bool(args.verbose)))
            model.learn(
                args.n - model.num_timesteps * run.resumed,
                callback=[*run.callbacks, run.checkpoints],
                reset_num_timesteps=not run.resumed,
                progress_bar=args.progress,
            )
        model.logger.close()
        runs.save_model(model, run.folder / "model.zip")
    except (*MISTAKES, RuntimeError, EOFError, MemoryError) as error:
        what = "an environment's worker process has died" if isinstance(error, EOFError) else one_line(error)
        raise Broken(f"{what} (go on from the last checkpoint: {run.checkpoints.resume_command})") from error


def _check_device(name: str) -> None:
    with blamed(f"--device {name}"):
        kind = torch.device("cpu" if name == "auto" else name).type
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device must be cpu, cuda or auto, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no GPU here. Pass --device cpu or auto")


def _callbacks(args: Args, folder: Path, evaluation: VecEnv | None) -> list[BaseCallback]:
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
                sample_every=args.sample_every,
                jumps=args.jumps,
                seed=args.seed,
                edits=folder / "edits.jsonl",
                keep_reports=1,
                verbose=args.verbose,
            )
        )
    if evaluation is not None:
        every_task = args.eval_tasks == "all"
        path = folder / "evaluations.csv"
        found.append(
            Evaluation(evaluation, path, every=args.eval_freq, episodes=args.eval_episodes, every_task=every_task)
        )
    return found


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
