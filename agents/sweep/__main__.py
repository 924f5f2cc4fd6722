"""Many runs, on this machine or on many: ``python -m agents.sweep --help``.

A grid (:mod:`agents.sweep.grid`) is trained with Ray, each run in a process of its own. What is there already is kept:
a run that is finished is not trained again, one that has begun goes on from its checkpoint. So the same command goes on
with a sweep that was interrupted, and adds what is missing to one that has grown.

A run whose process, worker or machine is lost is tried again wherever there is room, from its last checkpoint; so is
one that ends in an error. ``--retries`` counts attempts in a row that bring no new checkpoint.

All machines must see the run folders at one path (a shared file system whose ``flock`` counts on every machine, as
that of NFS does), and have this package and Ray installed alike. The lock of a run's folder dies with the process that
holds it: if a machine is cut off but still trains, the new attempt waits for it up to ten minutes, and then fails as
any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from stable_baselines3.common.vec_env import VecEnv

from agents import runs
from agents.build import close, load_weights, new_model, vec_env
from agents.checks import at_least, writable
from agents.command_line import Stopped, pairs, reported
from agents.interruption import Interruption
from agents.jobs import Job
from agents.method_names import build_methods
from agents.options import Args as Run
from agents.options import as_words, check
from agents.sweep import gathered, grid
from agents.sweep.board import Board
from agents.sweep.cluster import Cluster, connected
from agents.sweep.state import State


@dataclass(frozen=True)
class Args:
    """Train every agent of a grid with Ray, and gather their numbers in one table.

    Options of agents.train for all runs follow after --, as in: --methods none redo --seeds 5 -- -n 50000 --every 1000.
    The same command goes on with a sweep that was interrupted. All machines of a cluster must see the same files.
    """

    grid: Annotated[Path | None, tyro.conf.Positional] = None
    """A yaml file with methods, envs, drifts, algos, seeds and options; agents/sweep/grid.py shows one."""
    methods: tuple[str, ...] = ()
    """Methods of --method, none among them: not even watched. They stand in place of the file's, as all axes do."""
    envs: tuple[str, ...] = ()
    """Environments."""
    drifts: tuple[str, ...] = ()
    """Drifts: permute, or several that go together (permute+scale), or none."""
    algos: tuple[str, ...] = ()
    """Algorithms."""
    seeds: int | None = None
    """How many seeds, from 0."""
    address: str | None = None
    """HOST:PORT of the cluster that this machine belongs to, or auto to find it; without it, this machine alone."""
    cpus_per_run: float = 1.0
    """Cores that a run is given, and threads of torch unless --num-threads says otherwise."""
    gpus_per_run: float = 0.0
    """GPUs that a run is given, 0.25 for a quarter of one; 0: it sees none."""
    retries: int = 2
    """Attempts that may follow on one that failed, counted from the last one that brought a new checkpoint."""
    log_folder: str = "runs"
    """Where runs are kept, with sweep.csv, the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; 0, 1 if a run could not be brought to its end, 2 for bad input, 128 and a signal's number."""
    words = list(sys.argv[1:] if argv is None else argv)
    before, after = _parted(words)
    args = tyro.cli(Args, args=before, prog="python -m agents.sweep")
    failed: list[bool] = []
    code = reported(lambda: failed.append(sweep(args, after, words)))
    return code or int(any(failed))


def _parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def sweep(args: Args, options: Sequence[str] = (), words: Sequence[str] = ()) -> bool:
    """Bring every run of a grid to its end. Returns whether one failed for good.

    ``options`` are those of ``agents.train`` for all runs, ``words`` the sweep's as they were typed.

    Raises:
        ValueError: an option is wrong, of the sweep or of a run, or a run is there with other options.
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        OSError: the runs cannot be kept where they should be.
        Stopped: it was interrupted; the runs have written checkpoints.
    """
    at_least(args, retries=0, seeds=1)
    writable(args.log_folder)
    if not 0 < args.cpus_per_run < float("inf") or not 0 <= args.gpus_per_run < float("inf"):
        given = f"{args.cpus_per_run:g} and {args.gpus_per_run:g}"
        raise ValueError(f"--cpus-per-run must be more than 0 and --gpus-per-run 0 or more, got {given}")
    trained = runs_of(args, options)
    root = Path(args.log_folder)
    states = [State(job) for job in _jobs(root, trained)]
    _try_out(trained)
    missing = [state for state in states if state.stage != "finished"]
    console = Console(width=max(Console().width, 100))
    if missing:
        with connected(args.address, cpus=args.cpus_per_run, gpus=args.gpus_per_run) as cluster:
            cluster.check_room()
            for state in missing:
                state.job.folder.parent.mkdir(parents=True, exist_ok=True)
            with Board(console, states, root) as board, Interruption() as interruption:
                _train(cluster, missing, board, args.retries, interruption)
            if interruption.asked is not None and any(state.stage in ("waiting", "running") for state in missing):
                again = shlex.join(["python", "-m", "agents.sweep", *words])
                gathered.write(root / "sweep.csv", gathered.gather(states))
                told = f"{interruption.asked.name}: the runs have written checkpoints. Go on with: {again}"
                raise Stopped(told, interruption.code)
    _await_files(states)
    found = gathered.gather(states)
    gathered.write(root / "sweep.csv", found)
    gathered.show(console, found)
    for state in states:
        if state.stage == "failed":
            print(f"failed: {state.job.folder}: {state.error} (all it said: {state.log})", file=sys.stderr)
    finished = sum(state.stage == "finished" for state in states)
    console.print(
        f"{finished} of {len(states)} runs finished; table: {root / 'sweep.csv'}", highlight=False, soft_wrap=True
    )
    return finished < len(states)


def runs_of(args: Args, options: Sequence[str] = ()) -> list[Run]:
    """The runs that a sweep consists of, by their options.

    Raises:
        ValueError: the grid is empty, or an entry of it is wrong.
    """
    base, axes = (Run(), {}) if args.grid is None else grid.read(args.grid)
    typed = {axis: getattr(args, axis) for axis in grid.AXES}
    axes |= {axis: grid.entries(axis, value) for axis, value in typed.items() if value not in (None, ())}
    if not axes:
        raise ValueError("the grid is empty: name a yaml file, or --methods, --envs, --drifts, --algos or --seeds")
    base = tyro.cli(Run, args=options, default=base, prog="python -m agents.sweep ... --")
    for name in grid.OURS:
        if getattr(base, name) != getattr(Run(), name):
            raise ValueError(f"--{name.replace('_', '-')} is not for a run of a grid: the sweep sees to it")
    threads = max(1, int(args.cpus_per_run)) if base.num_threads is None else base.num_threads
    base = dataclasses.replace(base, log_folder=args.log_folder, num_threads=threads)
    found = grid.expand(base, axes)
    for run in found:
        check(run)
        if run.device.startswith("cuda") and not args.gpus_per_run:
            raise ValueError(f"--device {run.device}: without --gpus-per-run a run sees no GPU")
    return found


def _jobs(root: Path, trained: Sequence[Run]) -> list[Job]:
    """The runs with their folders, each of which is free or holds the same run."""
    jobs: dict[Path, Job] = {}
    for run in trained:
        folder = runs.run_folder(
            root, env=run.env, drift=list(run.drift), algo=run.algo, method=run.method, tag=run.tag, seed=run.seed
        )
        if folder in jobs:
            raise ValueError(f"two runs of the grid are kept in {folder}: tell them apart with tag: NAME")
        runs.check_same(folder, run)
        jobs[folder] = Job(folder, as_words(run), run.n)
    return list(jobs.values())


SHOWN = 90.0
"""Seconds within which what one machine has written is to be seen on another."""


def _try_out(trained: Sequence[Run]) -> None:
    """Build every agent once, whatever its method and seed: what is wrong with it shows before anything is written."""
    tried: dict[Run, None] = {}
    methods: dict[tuple[str, tuple[str, ...]], None] = {}
    for run in trained:
        if run.method != "none":
            methods[run.method, run.method_kwargs] = None
        plain = dataclasses.replace(run, method="none", method_kwargs=(), seed=0, tag=None)
        tried[dataclasses.replace(plain, vec_env="dummy", device="cpu")] = None
    for method, options in methods:
        build_methods(method, pairs(options))
    for run in tried:
        with warnings.catch_warnings(), _closed(vec_env(run)) as env:
            warnings.simplefilter("ignore")
            model = new_model(run, env)
            if run.trained_agent is not None:
                load_weights(model, run.trained_agent)


def _await_files(states: Sequence[State]) -> None:
    """A network file system may be slow to tell; what is never to be seen here is not shared."""
    until = time.monotonic() + SHOWN
    for state in states:
        while state.stage == "finished" and not state.job.finished:
            if time.monotonic() > until:
                state.stage = "failed"
                state.error = f"it ended well on {state.host}, but not here: all machines must see the same files"
            time.sleep(1)


@contextlib.contextmanager
def _closed(env: VecEnv) -> Iterator[VecEnv]:
    try:
        yield env
    finally:
        close(env)


def _train(cluster: Cluster, missing: Sequence[State], board: Board, retries: int, interruption: Interruption) -> None:
    """Attempt and attempt again, until every run has ended or failed for good, or a signal asks to end."""

    def queue(state: State) -> None:
        state.queued()
        running[cluster.submit(state.job.folder, state.job.options, state.log)] = state

    running: dict[Any, State] = {}
    for state in missing:
        queue(state)
    while running and interruption.asked is None:
        board.update()
        for attempt, ended in cluster.ended(list(running), seconds=0.25):
            state = running.pop(attempt)
            state.ended(*ended, retries)
            board.ended(state, retries)
            if state.stage == "waiting":
                queue(state)
    if running:
        board.say("stopping: the runs write their checkpoints; interrupt once more to leave at once")
        cluster.stop(list(running))


if __name__ == "__main__":
    sys.exit(main())
