"""Draw runs: return on the left, dead units (and widths) of every layer on the right, task changes as thin lines."""

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agents.results import BadRun, Curve, Experiment, Run
from agents.statistics import Floats, align, band
from agents.summary import By, arms, change_points, counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, told apart by colour-blind readers; without the yellow, too faint for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PLAIN, FAINT = "#4d4d4d", "#8c8c8c"  # agents that nothing was done to; notes in the figure
PLAIN_ARMS = ("none", "monitor")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # once the colours are used up
LEAST_EPISODES = 3  # in a bin of the return curve
MOST_CHANGES = 60  # lines beyond that would be a grey wall
READING = "line: IQM over seeds · band: 95 % bootstrap interval over seeds · grey verticals: the task changes"
FEWEST_POINTS = 10
SUFFIXES = (".png", ".pdf", ".svg")

Arms = Mapping[str, list[Run]]
What = tuple[str, str]  # return, or dead or width and the layer


class Style(NamedTuple):
    """How one arm looks in every panel."""

    colour: str
    dash: Any


def destination(runs: Sequence[Path], out: Path | None, name: str) -> Path:
    """Return where a figure goes: ``out``, or ``name`` in the folder that all runs share.

    BadRun on what would fail after the work is done: no matplotlib, or a file that it cannot write.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise BadRun("figures need matplotlib: pip install recycle-rl[plots]") from error
    if not runs:
        raise BadRun("expected folders of runs, got none. Name one, such as runs/.")
    path = out or Path(os.path.commonpath([path.absolute() for path in runs])) / name
    if path.suffix not in SUFFIXES or path.is_dir():
        raise BadRun(f"--out must be a file ending in {', '.join(SUFFIXES)}; got {path}.")
    return path


def save(figure: "Figure", path: Path) -> None:
    """Write the figure whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=150)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def draw(runs: Sequence[Run], *, by: By | None = None, points: int = 200) -> "Figure":
    """Draw a row of panels per experiment: return on the left, the dead fraction of each layer on the right.

    Where layers grew or shrank, their widths stand beside that.

    An arm is the IQM of its finished runs; unfinished runs beside them are dotted, each for itself.
    """
    from matplotlib.figure import Figure

    experiments = arms(runs, by)
    names = sorted({arm for found in experiments.values() for arm in found}, key=lambda a: (a not in PLAIN_ARMS, a))
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
    plain = (Style(PLAIN, dash) for dash in DASHES)
    return {name: next(plain) if name in PLAIN_ARMS else next(looks) for name in names}


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
    kinds = ["dead", "width"] if any(run.resized for runs in found.values() for run in runs) else ["dead"]
    ratios = [1.5 if columns == 1 else 1.1 * columns - 0.6, *[1] * columns * len(kinds)]
    grid = row.add_gridspec(rows, len(ratios), width_ratios=ratios)
    left = row.add_subplot(grid[:, 0])
    left.set_ylabel("return per episode")
    for arm, runs in found.items():
        _draw_arm(left, runs, styles[arm], points, ("return", ""))
    changes = shared_changes(found) or []
    left.set_xlabel("lifetime agent steps")
    _dress(left, changes, numbered=True)
    for number, kind in enumerate(kinds):
        small: list[Axes] = []
        for index, layer in enumerate(layers or [""]):
            place = grid[index % rows, 1 + number * columns + index // rows]
            axes = row.add_subplot(place, sharex=left, sharey=small[0] if small else None)
            axes.set_title(_short(layer, layers or [""]), fontsize=9, loc="left", pad=3)
            small.append(axes)
            for arm, runs in found.items() if layer else ():
                _draw_arm(axes, runs, styles[arm], points, (kind, layer))
        for axes in small:
            if axes in small[rows - 1 :: rows]:
                axes.set_xlabel("lifetime agent steps")
            _dress(axes, changes, numbered=bool(axes.get_xlabel()) or axes is small[-1])
        _dress_small(small, rows, kind, measured=bool(layers))
    left.set_xlim(0, 1.01 * max(run.last_step for runs in found.values() for run in runs))


def title(experiment: Experiment, found: Arms) -> str:
    """Say what a row of panels shows: algorithm, environment, drift and number of seeds."""
    algo = [experiment.algo.upper()] if experiment.algo else []
    drift = experiment.drift if experiment.drift == "no drift" else f"drift: {experiment.drift}"
    return " · ".join([*algo, experiment.env, drift, seed_count([len(runs) for runs in found.values()])])


def seed_count(counts: Sequence[int]) -> str:
    """``2 seeds``, or ``1 to 3 seeds`` where arms differ."""
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


def _dress_small(small: Sequence["Axes"], rows: int, kind: str, measured: bool) -> None:
    """Give the panels of one kind one scale from 0 up, labelled in their first column only."""
    if measured:
        high = small[0].get_ylim()[1]
        small[0].set_ylim(0, min(1.02, max(0.1, high)) if kind == "dead" else high)
    else:
        small[0].set_yticks([])
        small[0].text(0.5, 0.5, "not measured", transform=small[0].transAxes, ha="center", color=FAINT)
    for index, axes in enumerate(small):
        axes.tick_params(labelleft=index < rows)
        if index < rows:
            name = "dead fraction" if kind == "dead" else "units"
            axes.set_ylabel(name if rows > 1 else f"{name} of the layer")


def _draw_arm(axes: "Axes", runs: Sequence[Run], style: Style, points: int, what: What) -> None:
    """Draw the runs that count as one line with its band, and unfinished runs beside them dotted."""
    least = LEAST_EPISODES if what == ("return", "") else 1
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


def _flag(axes: "Axes", style: Style, steps: Floats, values: Floats, what: What) -> None:
    """Write "(unfinished)" where a line of returns ends."""
    if what == ("return", "") and len(steps):
        text = axes.annotate(" (unfinished)", (steps[-1], values[-1]), color=style.colour, fontsize=9, va="center")
        text.set_bbox({"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 0.5})


def _curve(run: Run, what: What) -> Curve:
    """Return one measured curve of a run."""
    kind, layer = what
    if kind == "return":
        return Curve(run.episodes.timesteps, run.episodes.returns)
    return (run.dead if kind == "dead" else run.width).get(layer, Curve(np.array([], dtype=np.int64), np.array([])))


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
