"""Compare runs: `python -m agents.plot runs/` prints tables and draws return and dead units over time."""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from agents.results import (
    BadRun,
    By,
    Curve,
    Experiment,
    Row,
    Run,
    arms,
    change_points,
    counted,
    find_runs,
    read_run,
    summarise,
)
from agents.statistics import Floats, align, band, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, told apart by colour-blind readers; without the yellow, too faint for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PLAIN, FAINT = "#4d4d4d", "#8c8c8c"  # the arm "none"; notes in the figure
TERMS = (
    "first, later, last task: return per episode; area: under return over steps, per step; "
    "dead: last measured fraction, mean over layers; recycled, re-died: units. "
    "All are IQMs over seeds; 95 % is the bootstrap interval of the later tasks."
)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # once the colours are used up
SUFFIXES = (".png", ".pdf", ".svg")
FEW_SEEDS = 5  # below, an interval is rough
FEWEST_POINTS = 10
LEAST_EPISODES = 3  # in a bin of the return curve
MOST_CHANGES = 60  # lines beyond that would be a grey wall
MOST_TASKS = 10  # columns of the second table
TASK_OPTIONS = ("change", "drift_kwargs", "total_timesteps", "n_envs")
ARM_OPTIONS = ("method", "method_kwargs", "algo", "tag", "every", "hyperparams")
READING = "line: IQM over seeds · band: 95 % bootstrap interval over seeds · grey verticals: the task changes"

Arms = Mapping[str, list[Run]]


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


class Style(NamedTuple):
    """How one arm looks in every panel."""

    colour: str
    dash: Any


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write the figure; 0, or 2 after one line on stderr for bad input."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.plot")
    console = Console(width=max(Console().width, 100))  # rather a wrapped line than a number cut short
    try:
        out = _checked_out(args)
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
        _write(draw(begun, by=args.by, points=args.points), out)
    except (BadRun, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"figure: {out}")
    return 0


def _checked_out(args: Args) -> Path:
    """Return where the figure goes, having refused everything that would fail after the work is done."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise BadRun("figures need matplotlib: pip install recycle-rl[plots]") from error
    if args.points < FEWEST_POINTS:
        raise BadRun(f"--points must be at least {FEWEST_POINTS}, got {args.points}.")
    out = args.out or Path(os.path.commonpath([path.absolute() for path in args.runs])) / "curves.png"
    if out.suffix not in SUFFIXES or out.is_dir():
        raise BadRun(f"--out must be a file ending in {', '.join(SUFFIXES)}; got {out}.")
    return out


def _write(figure: "Figure", out: Path) -> None:
    """Write the figure whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        figure.savefig(unfinished, dpi=150)
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


# ---- the figure ------------------------------------------------------------------------------------------


def draw(runs: Sequence[Run], *, by: By | None = None, points: int = 200) -> "Figure":
    """Draw a row of panels per experiment: return on the left, the dead fraction of each layer on the right.

    An arm is the IQM of its finished runs; unfinished runs beside them are dotted, each for itself.
    """
    from matplotlib.figure import Figure

    experiments = arms(runs, by)
    names = sorted({arm for found in experiments.values() for arm in found}, key=lambda a: (a != "none", a))
    styles = _styles(names)
    heights = [max(3.3, 1.55 * _grid(found)[0] + 0.7) for found in experiments.values()]
    columns = max(1, 120 // (max(map(len, names)) + 8))
    heights = [0.12 + 0.26 * -(-len(names) // columns), *heights, 0.25]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained", facecolor="white")
    head, *rows, foot = np.ravel(np.array(figure.subfigures(len(heights), 1, height_ratios=heights)))
    _legend(head, styles, columns)
    for row, (experiment, found) in zip(rows, experiments.items(), strict=True):
        _draw_experiment(row, experiment, found, styles, points)
    foot.text(0.995, 0.5, READING, ha="right", va="center", color=FAINT, fontsize=9)
    return figure


def _styles(names: Sequence[str]) -> dict[str, Style]:
    """Give every arm its own colour, and dashes once the colours are used up."""
    looks = cycle(Style(colour, dash) for dash in DASHES for colour in COLOURS)
    return {name: Style(PLAIN, "-") if name == "none" else next(looks) for name in names}


def _legend(head: "SubFigure", styles: Mapping[str, Style], columns: int) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=s.colour, linestyle=s.dash, linewidth=2.5, label=n) for n, s in styles.items()]
    head.legend(handles=lines, loc="upper left", ncols=columns, frameon=False, fontsize=11)


def _layers(found: Arms) -> list[str]:
    """List the layers of all runs in the order in which they were logged."""
    return list(dict.fromkeys(name for runs in found.values() for run in runs for name in run.dead))


def _grid(found: Arms) -> tuple[int, int]:
    """Lay out one small panel per layer: (rows, columns)."""
    layers = max(1, len(_layers(found)))
    columns = 1 if layers <= 2 else 2 if layers <= 6 else 3
    return -(-layers // columns), columns


def _draw_experiment(
    row: "SubFigure", experiment: Experiment, found: Arms, styles: Mapping[str, Style], points: int
) -> None:
    layers, (rows, columns) = _layers(found), _grid(found)
    row.suptitle(title(experiment, found), x=0.01, ha="left", fontsize=12, fontweight="bold")
    ratios = [1.5 if columns == 1 else 1.1 * columns - 0.6, *[1] * columns]
    grid = row.add_gridspec(rows, 1 + columns, width_ratios=ratios)
    left = row.add_subplot(grid[:, 0])
    left.set_ylabel("return per episode")
    small: list[Axes] = []
    for index, layer in enumerate(layers or [""]):
        axes = row.add_subplot(grid[index % rows, 1 + index // rows], sharex=left, sharey=small[0] if small else None)
        axes.set_title(_short(layer, layers or [""]), fontsize=9, loc="left", pad=3)
        small.append(axes)
    for arm, runs in found.items():
        _draw_arm(left, runs, styles[arm], points, "return")
        for axes, layer in zip(small, layers, strict=False):
            _draw_arm(axes, runs, styles[arm], points, layer)
    changes = shared_changes(found) or []
    for axes in (left, *small):
        if axes is left or axes in small[rows - 1 :: rows]:
            axes.set_xlabel("lifetime agent steps")
        _dress(axes, changes, numbered=bool(axes.get_xlabel()) or axes is small[-1])
    _dress_dead(small, rows, measured=bool(layers))
    left.set_xlim(0, 1.01 * max(run.last_step for runs in found.values() for run in runs))


def title(experiment: Experiment, found: Arms) -> str:
    """Say what a row of panels shows: algorithm, environment, drift and number of seeds."""
    algo = [experiment.algo.upper()] if experiment.algo else []
    drift = experiment.drift if experiment.drift == "no drift" else f"drift: {experiment.drift}"
    return " · ".join([*algo, experiment.env, drift, _seeds([len(runs) for runs in found.values()])])


def _seeds(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"


def _short(layer: str, layers: Sequence[str]) -> str:
    """Drop what all names begin with, but for the last two parts: policy/mlp.net.0 -> net.0."""
    parts = [re.split(r"(?<=[/.])", name) for name in layers]
    most = min(map(len, parts)) - 2
    shared = 0
    while shared < most and len({tuple(own[: shared + 1]) for own in parts}) == 1:
        shared += 1
    return "".join(re.split(r"(?<=[/.])", layer)[max(shared, 0) :])


def _dress(axes: "Axes", changes: Sequence[int], numbered: bool) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, labelbottom=numbered, color=FAINT)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for step in changes if len(changes) <= MOST_CHANGES else ():
        axes.axvline(step, color="#d0d0d0", linewidth=0.7, zorder=0)


def _dress_dead(small: Sequence["Axes"], rows: int, measured: bool) -> None:
    """Give the dead panels one scale from 0 up, labelled in their first column only."""
    if measured:
        small[0].set_ylim(0, min(1.02, max(0.1, small[0].get_ylim()[1])))
    else:
        small[0].set_yticks([])
        small[0].text(0.5, 0.5, "not measured", transform=small[0].transAxes, ha="center", color=FAINT)
    for index, axes in enumerate(small):
        axes.tick_params(labelleft=index < rows)
        if index < rows:
            axes.set_ylabel("dead fraction" if rows > 1 else "dead fraction of the layer")


def _draw_arm(axes: "Axes", runs: Sequence[Run], style: Style, points: int, what: str) -> None:
    """Draw the runs that count as one line with its band, and unfinished runs beside them dotted."""
    least = LEAST_EPISODES if what == "return" else 1
    used, until = counted(runs)
    end = min((run.last_step for run in used), default=0) if until is None else until
    curves = [curve for run in used if len((curve := _curve(run, what)).steps)]
    if curves and len(curves) == len(used):
        steps, values = align(curves, end, points, least=least)
        middle, low, high = band(values)
        marker = "o" if len(steps) <= 25 else ""
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.18, linewidth=0)
        axes.plot(steps, middle, color=style.colour, linestyle=style.dash, linewidth=1.6, marker=marker, ms=3)
        if until is not None:
            _flag(axes, style, steps, middle, what)
    for run in runs if until is None else ():
        if not run.finished and len((curve := _curve(run, what)).steps):
            steps, values = align([curve], run.last_step, points, least=least)
            axes.plot(steps, values[0], color=style.colour, linestyle=":", linewidth=1.2)
            _flag(axes, style, steps, values[0], what)


def _flag(axes: "Axes", style: Style, steps: Floats, values: Floats, what: str) -> None:
    """Write "(unfinished)" where a line of returns ends."""
    if what == "return" and len(steps):
        text = axes.annotate(" (unfinished)", (steps[-1], values[-1]), color=style.colour, fontsize=9, va="center")
        text.set_bbox({"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.5})


def _curve(run: Run, what: str) -> Curve:
    """Return one measured curve of a run: "return", or a layer's dead fraction."""
    if what == "return":
        return Curve(run.episodes.timesteps, run.episodes.returns)
    return run.dead.get(what, Curve(np.array([], dtype=np.int64), np.array([])))


def shared_changes(found: Arms) -> list[int] | None:
    """Return the steps of the task changes that all runs went through; None where they do not agree.

    A change shows at the next episode, so runs may differ by the length of an episode or two.
    """
    runs = [run for of_arm in found.values() for run in of_arm]
    changes = [change_points(run) for run in runs]
    longest = max(changes, key=len)
    slack = 2 * max(int(max(run.episodes.lengths)) * int(run.config.get("n_envs") or 1) for run in runs)
    for own in changes:
        if any(a[1] != b[1] or abs(a[0] - b[0]) > slack for a, b in zip(own, longest, strict=False)):
            return None
    return [min(own[i][0] for own in changes if i < len(own)) for i in range(len(longest))]


# ---- the tables ------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, Table]]:
    """Lay out two tables per experiment, with headings: a line per arm, and each arm's return by task."""
    for experiment in dict.fromkeys(row.experiment for row in rows):
        of_experiment = [row for row in rows if row.experiment == experiment]
        name = " · ".join(filter(None, (experiment.algo.upper(), experiment.env, experiment.drift)))
        counts = [len(row.seeds) for row in of_experiment]
        rough = f": intervals from fewer than {FEW_SEEDS} are rough" if 1 < min(counts) < FEW_SEEDS else ""
        yield f"{name} (n = {_seeds(counts)}{rough})", _summary(of_experiment)
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
