"""Compare runs: `python -m agents.plot runs/` prints tables and draws return, dead units and widths over time."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from agents.command_line import reported
from agents.figure import FEWEST_POINTS, destination, draw, save, seed_count, shared_changes
from agents.results import BadRun, Run, find_runs, read_run
from agents.statistics import Floats, estimate
from agents.summary import By, Row, arms, counted, summarise

TERMS = (
    "first, later, last task: return per episode; area: under return over steps, per step; "
    "dead: last measured fraction, mean over layers; recycled, re-died: units. "
    "All are IQMs over seeds; 95 % is the bootstrap interval of the later tasks."
)
MOST_POINTS = 100_000  # more than any figure has dots
FEW_SEEDS = 5  # below, an interval is rough
MOST_TASKS = 10  # columns of the second table
TASK_OPTIONS = ("change", "drift_kwargs", "total_timesteps", "n_envs")
ARM_OPTIONS = ("method", "method_kwargs", "algo", "tag", "every", "hyperparams")


@dataclass(frozen=True)
class Args:
    """Draw return and dead units of all runs below some folders, and print their numbers."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Run folders, or any folders above them: every run below is found."""
    out: Path | None = None
    """Where the figure goes (.png, .pdf, .svg); without it, curves.png in the folder that all RUNS share."""
    by: By | None = None
    """What sets arms apart; without it, algorithm, method and tag together."""
    points: int = 200
    """Bins over lifetime steps that smooth the return; fewer where episodes are long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write the figure; 0, or 2 after one line on stderr for bad input."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.plot")
    return reported(lambda: _show(args))


def _show(args: Args) -> None:
    console = Console(width=max(Console().width, 100))  # rather a wrapped line than a number cut short
    if not FEWEST_POINTS <= args.points <= MOST_POINTS:
        raise BadRun(f"--points must be at least {FEWEST_POINTS} and at most {MOST_POINTS}, got {args.points}.")
    out = destination(args.runs, args.out, "curves.png")
    paths = find_runs(args.runs)
    bar = tqdm(paths, desc="reading runs", unit="run", delay=1, disable=None, leave=False)
    runs = [read_run(path) for path in bar]
    begun = [run for run in runs if len(run.episodes)]
    if not begun:
        raise BadRun(f"{len(runs)} runs found, but no finished episode in any. Train for longer first.")
    for heading, table in tables(summarise(begun, args.by)):
        console.print(heading, markup=False, highlight=False, style="bold")
        console.print(table)
    console.print(TERMS, markup=False, highlight=False, style="dim")
    for note in notes(runs, args.by):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    save(draw(begun, by=args.by, points=args.points), out)
    print(f"figure: {out}")


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, Table]]:
    """Lay out two tables per experiment, with headings: a line per arm, and each arm's return by task."""
    for experiment in dict.fromkeys(row.experiment for row in rows):
        of_experiment = [row for row in rows if row.experiment == experiment]
        name = " · ".join(filter(None, (experiment.algo.upper(), experiment.env, experiment.drift)))
        counts = [len(row.seeds) for row in of_experiment]
        rough = f": intervals from fewer than {FEW_SEEDS} are rough" if 1 < min(counts) < FEW_SEEDS else ""
        yield f"{name} (n = {seed_count(counts)}{rough})", _summary(of_experiment)
        if any(len(row.tasks) > 1 for row in of_experiment):
            yield f"{name}: return by task (IQM over seeds)", _by_task(of_experiment)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _summary(rows: Sequence[Row]) -> Table:
    tasks = ("first\ntask", "later\ntasks", "95 %", "last\ntask", "area")
    table = _table(("seeds", *tasks, "dead", "recycled", "re-died"))
    for row in rows:
        returns = (_iqm(row.first_task), _iqm(row.later_tasks), _bounds(row.later_tasks), _iqm(row.last_task))
        others = map(_iqm, (row.area, row.dead, row.recycled, row.re_died))
        table.add_row(_name(row), str(len(row.seeds)), *returns, *others)
    return table


def _by_task(rows: Sequence[Row]) -> Table:
    """Lay out return per task; where tasks are many, per block of consecutive tasks."""
    tasks = sorted({task for row in rows for task in row.tasks})
    blocks = np.array_split(tasks, min(len(tasks), MOST_TASKS))
    heads = [f"{block[0]}" if len(block) == 1 else f"{block[0]}-{block[-1]}" for block in blocks]
    table = _table(heads)
    for row in rows:
        inside = [np.isin(row.tasks, block) for block in blocks]
        means = [row.per_task[:, own].mean(axis=1) if own.any() else np.array([]) for own in inside]
        table.add_row(_name(row), *map(_iqm, means))
    return table


def _name(row: Row) -> str:
    return escape(row.arm if row.until is None else f"{row.arm} (unfinished)")


def _iqm(values: Floats) -> str:
    """Write the IQM over seeds; "-" for what is not known of every seed."""
    return _number(estimate(values).value) if len(values) and np.isfinite(values).all() else "-"


def _bounds(values: Floats) -> str:
    """Write the interval of the IQM; "-" where fewer than two seeds are known."""
    if len(values) < 2 or not np.isfinite(values).all():
        return "-"
    found = estimate(values)
    return f"{_number(found.low)} to {_number(found.high)}"


def _number(value: float) -> str:
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def notes(runs: Sequence[Run], by: By | None = None) -> Iterator[str]:
    """Say, a line each, what a reader of the tables and the figure must know about these runs."""
    if empty := [str(run.path) for run in runs if not len(run.episodes)]:
        yield f"no finished episode yet, left out: {', '.join(empty)}"
    for experiment, found in arms([run for run in runs if len(run.episodes)], by).items():
        where = " · ".join(filter(None, experiment))
        if shared_changes(found) is None:
            yield f"{where}: the runs changed task at different steps, so no change is drawn"
        if mixed := _differing([run for of_arm in found.values() for run in of_arm], TASK_OPTIONS):
            yield f"{where}: the arms are not alike, runs differ in {mixed}"
        for arm, of_arm in found.items():
            yield from _arm_notes(f"{where} · {arm}", of_arm)


def _arm_notes(where: str, runs: Sequence[Run]) -> Iterator[str]:
    unfinished = [run for run in runs if not run.finished]
    _, until = counted(runs)
    if until is not None:
        yield f"{where}: unfinished; averaged only up to step {until:,}, which every run has reached"
    elif unfinished:
        reached = ", ".join(f"seed {run.seed} at step {run.last_step:,}" for run in unfinished)
        yield f"{where}: unfinished runs ({reached}) are dotted and left out of every average"
    if mixed := _differing(runs, ARM_OPTIONS):
        yield f"{where}: one arm, but its runs differ in {mixed}"
    elif len({run.seed for run in runs}) < len(runs):
        yield f"{where}: a seed occurs more than once"
    if len({frozenset(run.dead) for run in counted(runs)[0]}) > 1:
        yield f"{where}: not every run measured every layer; a layer is drawn only where all did"


def _differing(runs: Sequence[Run], options: Sequence[str]) -> str:
    """Name the options in which runs differ."""
    return ", ".join(key for key in options if len({repr(run.config.get(key)) for run in runs}) > 1)


if __name__ == "__main__":
    sys.exit(main())
