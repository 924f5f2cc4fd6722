"""Every arm against one of them, seed by seed: `python -m agents.compare runs/` prints a table and draws it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents.command_line import reported
from agents.figure import COLOURS, FAINT, PLAIN, destination, save, title
from agents.results import BadRun, Curve, Experiment, Run, find_runs, read_run
from agents.statistics import Estimate, Floats, estimate, paired_difference
from agents.summary import arms, task_returns
from recycle.names import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TERMS = (
    "IQMs over seeds with 95 % bootstrap intervals. return: per episode, tasks after the first; -: minus that of the "
    "arm compared with, seed by seed; dead: fraction before and after events, and effective rank, each a mean over "
    "layers and the second half of the run; recycled: units; re-died: the part of them that was found dead again."
)


@dataclass(frozen=True)
class Args:
    """Compare every arm with one of them on the seeds they share; finished runs only."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Run folders, or any folders above them: every run below is found."""
    against: str = "monitor"
    """The arm that the others are compared with."""
    out: Path | None = None
    """Where the figure goes (.png, .pdf, .svg); without it, comparison.png in the folder that all RUNS share."""


@dataclass(frozen=True)
class Line:
    """One arm in numbers; None where nothing was measured."""

    arm: str
    seeds: int
    returns: Estimate
    """Mean return per episode over the tasks after the first (of all episodes, where there is but one task)."""
    difference: Estimate | None
    """Of these returns over the arm compared with, seed by seed; None for that arm itself."""
    last: Estimate | None
    """The same difference on the last task alone."""
    dead: Estimate | None
    dead_after: Estimate | None
    effective_rank: Estimate | None
    recycled: Estimate | None
    re_died: Estimate | None
    """Part of the recycled units that were found dead again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write the figure; 0, or 2 after one line on stderr for bad input."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.compare")
    return reported(lambda: _show(args))


def _show(args: Args) -> None:
    console = Console(width=max(Console().width, 150))
    out = destination(args.runs, args.out, "comparison.png")
    runs = [run for path in find_runs(args.runs) if (run := read_run(path)).finished and len(run.episodes)]
    if not runs:
        raise BadRun("no finished run found. Let one finish, or look at unfinished ones with agents.plot.")
    compared = compare(runs, args.against)
    for experiment, lines in compared.items():
        heading = " · ".join(filter(None, (experiment.algo.upper(), experiment.env, experiment.drift)))
        console.print(heading, markup=False, highlight=False, style="bold")
        console.print(table(lines, args.against))
    console.print(TERMS, markup=False, highlight=False, style="dim")
    found = arms(runs)
    save(draw({title(e, found[e]): lines for e, lines in compared.items()}, args.against), out)
    print(f"figure: {out}")


def compare(runs: Sequence[Run], against: str) -> dict[Experiment, list[Line]]:
    """Every arm of every experiment as a line, best return first.

    Raises:
        BadRun: an experiment lacks the arm that the others are compared with.
    """
    compared = {}
    for experiment, found in arms(runs).items():
        if against not in found:
            raise BadRun(f"no finished run of the arm {against!r} in {experiment.env}: {did_you_mean(against, found)}.")
        baseline = {run.seed: run for run in found[against]}
        lines = [_line(arm, of_arm, None if arm == against else baseline) for arm, of_arm in found.items()]
        compared[experiment] = sorted(lines, key=lambda line: -line.returns.value)
    return compared


def _line(arm: str, runs: Sequence[Run], baseline: Mapping[int, Run] | None) -> Line:
    shared = [run for run in runs if baseline and run.seed in baseline]
    difference = last_difference = None
    if baseline and shared:
        difference, last_difference = (
            paired_difference([value(run) for run in shared], [value(baseline[run.seed]) for run in shared])
            for value in (_later_return, _last_return)
        )
    counts = [(run.recycled, run.re_died) for run in runs if run.recycled is not None and run.re_died is not None]
    return Line(
        arm,
        seeds=len(runs),
        returns=estimate([_later_return(run) for run in runs]),
        difference=difference,
        last=last_difference,
        dead=_known([_level(run.dead) for run in runs]),
        dead_after=_known([_level(run.dead_after) for run in runs]),
        effective_rank=_known([_level(run.effective_rank) for run in runs]),
        recycled=_known([recycled for recycled, _ in counts]),
        re_died=_known([re_died / recycled for recycled, re_died in counts if recycled]),
    )


def _later_return(run: Run) -> float:
    returns = list(task_returns(run).values())
    return float(np.mean(returns[1:] or returns))


def _last_return(run: Run) -> float:
    return list(task_returns(run).values())[-1]


def _level(curves: Mapping[str, Curve]) -> float:
    """Mean over layers and the second half of what was measured; nan where nothing was."""
    values = [curve.values[len(curve.values) // 2 :].mean() for curve in curves.values() if len(curve.values)]
    return float(np.mean(values)) if values else float("nan")


def _known(values: Sequence[float]) -> Estimate | None:
    found: Floats = np.array([value for value in values if np.isfinite(value)], dtype=np.float64)
    return estimate(found) if len(found) else None


def table(lines: Sequence[Line], against: str) -> Table:
    """Lay out an experiment: a line for each arm."""
    shown = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    shown.add_column("arm", no_wrap=True)
    columns = ("seeds", "return", f"- {against}", f"last task\n- {against}", "dead\nbefore", "dead\nafter",
               "effective\nrank", "recycled", "re-died")  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        levels = (_value(estimated) for estimated in (line.dead, line.dead_after))
        rank, recycled, re_died = _value(line.effective_rank, 1), _value(line.recycled, 0), _value(line.re_died)
        differences = (str(line.difference or "-"), str(line.last or "-"))
        shown.add_row(
            escape(line.arm), str(line.seeds), str(line.returns), *differences, *levels, rank, recycled, re_died
        )
    return shown


def _value(found: Estimate | None, digits: int = 2) -> str:
    return "-" if found is None else f"{found.value:,.{digits}f}"


def draw(compared: Mapping[str, Sequence[Line]], against: str) -> Figure:
    """Draw a row of panels for each experiment, an arm at each height, best on top, dots with their intervals."""
    from matplotlib.figure import Figure

    heights = [0.26 * len(lines) + 1.0 for lines in compared.values()]
    figure = Figure(figsize=(14, sum(heights) + 0.3), layout="constrained", facecolor="white")
    *rows, foot = np.ravel(np.array(figure.subfigures(len(heights) + 1, 1, height_ratios=[*heights, 0.3])))
    for row, (heading, lines) in zip(rows, compared.items(), strict=True):
        row.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
        panels = row.subplots(1, 5, sharey=True, width_ratios=(2.2, 1.2, 1, 1, 1))
        places = np.arange(len(lines), dtype=np.float64)[::-1]
        panels[0].set_yticks(places, [line.arm for line in lines])
        panels[0].axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
        _dots(panels[0], places, [line.difference for line in lines], f"return, minus that of {against}")
        own = [i for i, line in zip(places, lines, strict=True) if line.arm == against]
        panels[0].plot([0] * len(own), own, "o", color=PLAIN, ms=5)
        _dots(panels[1], places, [line.dead for line in lines], "dead before ●, after ○ events")
        _dots(panels[1], places, [line.dead_after for line in lines], "dead before ●, after ○ events", hollow=True)
        _dots(panels[2], places, [line.effective_rank for line in lines], "effective rank")
        _dots(panels[3], places, [line.recycled for line in lines], "units recycled")
        _dots(panels[4], places, [line.re_died for line in lines], "part that died again")
        for panel in (panels[1], panels[2], panels[4]):
            panel.set_xlim(left=0)
        panels[3].set_xscale("symlog", linthresh=10)
        panels[3].set_xlim(-1, 3 * max([10.0, *(line.recycled.value for line in lines if line.recycled)]))
    note = f"IQM of seeds with its 95 % bootstrap interval; differences from {against} seed by seed"
    foot.text(0.995, 0.5, note, ha="right", va="center", color=FAINT, fontsize=9)
    return figure


def _dots(panel: Axes, places: Floats, found: Sequence[Estimate | None], label: str, *, hollow: bool = False) -> None:
    colour = COLOURS[0]
    for place, value in zip(places, found, strict=True):
        if value is None:
            continue
        if not np.isnan(value.low):
            panel.plot([value.low, value.high], [place, place], color=colour, linewidth=1.6, alpha=0.6)
        panel.plot(value.value, place, "o", color=colour, ms=5, markerfacecolor="white" if hollow else colour)
    panel.set_title(label, fontsize=9, loc="left", pad=3)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(labelsize=9)
    panel.grid(axis="y", color="#eeeeee", zorder=0)


if __name__ == "__main__":
    sys.exit(main())
