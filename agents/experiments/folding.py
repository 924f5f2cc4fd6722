"""How much of what a small network could approximate does it learn, from scratch and grown by folding?

After the slides' "utilization of approximatability" (Kang 2024): of 1000 networks with 3 hidden units, how many
become as good as the best one? They count 65 trained from random weights, and 360 grown from 2 hidden units by folding.
Added here is the control that the slides omit: the third unit has random incoming weights. All networks of an arm are
trained side by side, full batch, by Adam; all arms for as many steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad

from agents.checks import at_least, chosen, writable
from agents.children import processes
from agents.figure import COLOURS, FAINT, PLAIN
from recycle.folding import Creases, Direction, Mistakes, Score, boundary, fold, unexplained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 500
"""Training points of a task, on which accuracy is measured too."""
LEARNING_RATE = 0.02
FOLDED: dict[str, Direction] = {
    "folding": "gradient",
    "folding, tangent": "tangent",
    "folding, toward": "toward",
    "folding, bias 0": "origin",
}
ARMS = ("random", "grown, random", *FOLDED)
CLOSE, NEAR = 0.005, 0.02
"""How much less accurate than the best network of the task one may be to count."""
AT_ONCE = 100
"""Networks that are folded together; memory grows with it."""
Results = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Args:
    """Train networks of 3 hidden units from random weights, and grown from 2 units; count those that learn it all.

    Tasks and data seeds that are there already, with the same settings, are kept.
    """

    tasks: tuple[str, ...] = ("sine", "period", "interleaved", "stacked")
    """Which tasks: sine (one and a half periods, with a margin), period (one period of it), interleaved and stacked
    (two noisy parabolas)."""
    seeds: int = 3
    """Sets of data (and of initial weights) for each task."""
    networks: int = 1000
    """Networks in each arm."""
    steps: int = 1000
    """Of Adam, before the third unit is added and again behind it; networks from scratch make twice as many."""
    workers: int = 2
    """Tasks at a time, one core each."""
    log_folder: str = "runs/folding"
    """Where results, table and figure go."""


# -- tasks -------------------------------------------------------------------------------------------------


def _sine(reach: float, margin: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Above or below a sine, for x in [-reach, reach]; points within the margin are left out."""
    x = (torch.rand(8 * POINTS, 2, generator=generator) * 2 - 1) * torch.tensor([reach, 2.0])
    above = x[:, 1] - x[:, 0].sin()
    kept = (above.abs() >= margin).nonzero()[:POINTS, 0]
    return x[kept], (above[kept] > 0).long()


def _parabolas(bend: float, shift: tuple[float, float], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The noisy parabola y = -x^2 (class 0), and y = bend x^2 moved by ``shift`` (class 1)."""
    y = torch.arange(POINTS) % 2
    t = (torch.rand(POINTS, generator=generator) * 2 - 1) * 1.5
    parabola = torch.stack([t, torch.where(y == 1, bend, -1.0) * t.square()], 1)
    noise = 0.15 * torch.randn(POINTS, 2, generator=generator)
    return parabola + y[:, None] * torch.tensor(shift) + noise, y


TASKS: dict[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]] = {
    "sine": partial(_sine, 1.5 * torch.pi, 0.25),
    "period": partial(_sine, torch.pi, 0.0),
    "interleaved": partial(_parabolas, 1.0, (1.5, -2.5)),
    "stacked": partial(_parabolas, -1.0, (0.0, 1.0)),
}


def task(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``(500, 2)`` and classes ``(500,)``, 0 or 1."""
    return TASKS[name](torch.Generator().manual_seed(seed))


# -- many networks side by side ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Nets:
    """Networks of 2 inputs, hidden ReLUs and 2 outputs; the last column of both weights is the bias."""

    incoming: Tensor
    """``(nets, hidden, 3)``."""
    outgoing: Tensor
    """``(nets, 2, hidden + 1)``."""

    def __call__(self, points: Tensor) -> Tensor:
        """Outputs ``(nets, points, 2)`` of points ``(points, 2)``, or of each net's own ``(nets, points, 2)``."""
        hidden = (points @ self.incoming[:, :, :2].mT + self.incoming[:, None, :, 2]).relu()
        outputs: Tensor = hidden @ self.outgoing[:, :, :-1].mT + self.outgoing[:, None, :, -1]
        return outputs

    def of(self, which: slice) -> Nets:
        """Some of the networks, in double precision."""
        return Nets(self.incoming[which].double(), self.outgoing[which].double())


def initial(networks: int, hidden: int, generator: torch.Generator) -> Nets:
    """Weights and biases as ``nn.Linear`` draws them."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        drawn: Tensor = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        return drawn

    return Nets(uniform(networks, hidden, 3, fan_in=2), uniform(networks, 2, hidden + 1, fan_in=hidden))


def gradients(nets: Nets, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each network's mean cross-entropy, in both weights; written out, since autograd takes three times as long."""
    count, hidden, _ = nets.incoming.shape
    with_one = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    acts = (nets.incoming.reshape(-1, 3) @ with_one.T).relu_().view(count, hidden, -1)
    apart = nets.outgoing[:, 1:] - nets.outgoing[:, :1]
    logit = torch.baddbmm(apart[:, :, -1:], apart[:, :, :-1], acts)
    slope = logit.sigmoid_().sub_(y).div_(len(x))  # by the second output; by the first it is the opposite
    second = torch.cat([slope @ acts.mT, slope.sum(2, keepdim=True)], 2)
    back = torch.ops.aten.threshold_backward(apart[:, :, :-1].mT * slope, acts, 0)
    return (back.view(-1, len(x)) @ with_one).view_as(nets.incoming), torch.cat([-second, second], 1)


def train(nets: Nets, x: Tensor, y: Tensor, steps: int) -> Nets:
    """A new Adam's steps on the whole batch."""
    weights = [nets.incoming.clone(), nets.outgoing.clone()]
    adam = torch.optim.Adam(weights, lr=LEARNING_RATE)
    trained, target = Nets(*weights), y.to(x.dtype)
    for _ in range(steps):
        for weight, gradient in zip(weights, gradients(trained, x, target), strict=True):
            weight.grad = gradient
        adam.step()
    return Nets(*(weight.detach() for weight in weights))


def accuracy(nets: Nets, x: Tensor, y: Tensor) -> Tensor:
    """Of each network, ``(nets,)``."""
    return (nets(x).argmax(2) == y).double().mean(1)


def mistakes(nets: Nets, x: Tensor, y: Tensor) -> Mistakes:
    """Where each network is wrong: what the library's folding needs to know of it."""
    count = len(nets.incoming)
    outputs, targets = nets(x), y.expand(count, -1)
    coefficients, offset, wrong = boundary(outputs, targets)
    losses = cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(count, -1)
    slopes = (outputs.softmax(2) - one_hot(targets, 2)) / len(x)
    every = torch.arange(count)

    def margin(row: Tensor, point: Tensor) -> Tensor:
        return (coefficients[every, row] * nets(point[:, None])[:, 0]).sum(1) + offset[every, row]

    def score(point: Tensor, directions: Tensor, slopes: Tensor = slopes) -> Tensor:
        acts = ((x - point[:, None]) @ directions.mT).relu()
        return (acts.mT @ slopes).square().sum(2)

    def beside(rows: Tensor) -> Score:
        acts = (x @ rows[:, :, :2].mT + rows[:, None, :, 2]).relu()
        return partial(score, slopes=unexplained(slopes, acts))

    length = nets.incoming[:, :, :2].norm(dim=2).mean(1)
    return Mistakes(x.expand(count, -1, -1), losses, wrong, margin, score, beside, length)


def folded(nets: Nets, x: Tensor, y: Tensor, direction: Direction, generator: torch.Generator) -> Creases:
    """Where to fold each network, and by which unit: ``(nets, 1, ...)``."""
    parts = [
        fold(mistakes(nets.of(slice(at, at + AT_ONCE)), x.double(), y), direction=direction, generator=generator)
        for at in range(0, len(nets.incoming), AT_ONCE)
    ]
    return Creases(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def widened(nets: Nets, rows: Tensor) -> Nets:
    """The networks with one more unit each: incoming weights ``rows``, bias last, ``(nets, 3)``; outgoing zeros."""
    new = pad(nets.outgoing[:, :, :-1], (0, 1))
    incoming = torch.cat([nets.incoming, rows[:, None].to(nets.incoming)], 1)
    return Nets(incoming, torch.cat([new, nets.outgoing[:, :, -1:]], 2))


# -- one task ----------------------------------------------------------------------------------------------


def run(name: str, seed: int, args: Args) -> Results:
    """Train all arms on one task.

    Returns:
        ``accuracy`` ``(arms, nets)``; ``found``, the folds that there were, and ``reached``, those of which whose fold
        point lies on the true boundary, ``(arms,)``, of ``nets``; and of one network that folding helped:
        ``before``, ``after`` and ``trained`` (incoming and outgoing weights in a row), ``instance`` and ``point``.
    """
    torch.set_num_threads(1)
    x, y = task(name, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    scratch = train(initial(args.networks, 3, generator), x, y, 2 * args.steps)
    small = train(initial(args.networks, 2, generator), x, y, args.steps)
    random = initial(args.networks, 1, generator).incoming[:, 0]
    result: Results = {"found": np.zeros(len(ARMS)), "reached": np.zeros(len(ARMS))}
    reached = [accuracy(scratch, x, y), accuracy(train(widened(small, random), x, y, args.steps), x, y)]
    before = accuracy(small, x, y)
    for number, (arm, direction) in enumerate(FOLDED.items(), 2):
        made = folded(small, x, y, direction, generator)
        found = made.found[:, 0]
        rows = torch.where(found[:, None], torch.cat([made.weight[:, 0], made.bias], 1).float(), random)
        wide = widened(small, rows)
        trained = train(wide, x, y, args.steps)
        reached.append(accuracy(trained, x, y))
        result["found"][number] = found.sum()
        result["reached"][number] = (made.reached & made.found).sum()
        if arm == "folding":
            one = int(torch.where(found & made.reached[:, 0], reached[-1] - before, -1).argmax())
            for key, nets in (("before", small), ("after", wide), ("trained", trained)):
                result[key] = np.concatenate([nets.incoming[one].flatten(), nets.outgoing[one].flatten()])
            result["instance"], result["point"] = made.instance[one, 0].numpy(), made.point[one, 0].numpy()
    return {"accuracy": torch.stack(reached).numpy(), **result}


def compare(args: Args) -> None:
    """Run what is missing, then print the table and draw the boundaries.

    Raises:
        ValueError: an option is out of range.
    """
    chosen("--tasks", args.tasks, TASKS)
    at_least(args, seeds=1, networks=1, steps=1, workers=1)
    writable(args.log_folder)
    folder = Path(args.log_folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for name in args.tasks for seed in range(args.seeds)]
    found = {job: kept for job in jobs if (kept := _load(folder, *job, args)) is not None}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress, processes(args.workers) as pool:
        bar = progress.add_task("tasks and seeds", total=len(jobs), completed=len(found))
        running = {pool.submit(run, *job, args): job for job in jobs if job not in found}
        for ended in as_completed(running):
            job = running[ended]
            found[job] = ended.result()
            _save(folder, *job, args, found[job])
            progress.advance(bar)
    results = {name: [found[name, seed] for seed in range(args.seeds)] for name in args.tasks}
    console = Console(width=None if Console().is_terminal else 140)
    table = summary(results, args)
    console.print(table)
    with (folder / "folding.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140).print(table)
    draw(results).savefig(folder / "folding.png", dpi=90)
    console.print(f"table and figure: {folder / 'folding.txt'}, {folder / 'folding.png'}", soft_wrap=True)


def _settings(args: Args) -> str:
    """What decides a task's results, as text."""
    chosen = {k: v for k, v in asdict(args).items() if k in ("networks", "steps")}
    return repr((chosen, POINTS, LEARNING_RATE, FOLDED))


def _load(folder: Path, name: str, seed: int, args: Args) -> Results | None:
    path = folder / f"{name}-{seed}.npz"
    if not path.exists():
        return None
    with np.load(path) as saved:
        if str(saved["settings"]) != _settings(args):
            return None
        return {key: saved[key] for key in saved if key != "settings"}


def _save(folder: Path, name: str, seed: int, args: Args, result: Results) -> None:
    path = folder / f"{name}-{seed}.npz"
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, settings=_settings(args), **result)  # type: ignore[arg-type]
    os.replace(unfinished, path)


# -- table and figure --------------------------------------------------------------------------------------


def counts(results: list[Results], within: float) -> NDArray[np.float64]:
    """Networks of each arm as accurate as the best of the task and data seed, less ``within``: ``(seeds, arms)``."""
    accurate = np.stack([result["accuracy"] for result in results])
    return np.asarray((accurate >= accurate.max((1, 2), keepdims=True) - within - 1e-9).sum(2), dtype=np.float64)


def standard_error(counted: NDArray[np.float64], networks: int) -> NDArray[np.float64]:
    """Of the mean count over data seeds, by arm: what the draw of the networks leaves open on these data sets."""
    part = counted / networks
    return np.asarray(np.sqrt((networks * part * (1 - part)).sum(0)) / len(counted))


def summary(results: dict[str, list[Results]], args: Args) -> Table:
    """Counts of every arm and task, with standard errors; ratios to random, and differences to the control."""
    title = f"of {args.networks} networks 2-3-2, how many get as accurate as the best: mean of {args.seeds} data sets"
    table = Table(title=title, title_justify="left")
    headings = (
        "task",
        "arm",
        "best - 0.5 pt",
        "of random",
        "over control",
        "best - 2 pt",
        "of random",
        "best",
        "folds",
    )
    for column in headings:
        table.add_column(column, justify="left" if column in ("task", "arm") else "right")
    for name, of_seeds in results.items():
        best = np.mean([result["accuracy"].max() for result in of_seeds])
        close, near = counts(of_seeds, CLOSE), counts(of_seeds, NEAR)
        means, errors = close.mean(0), standard_error(close, args.networks)
        wide_means, wide_errors = near.mean(0), standard_error(near, args.networks)
        folds = np.mean([result["found"] for result in of_seeds], 0)
        for i, arm in enumerate(ARMS):
            over = f"{means[i] - means[1]:+.0f} ± {np.hypot(errors[i], errors[1]):.0f}" if i > 1 else ""
            table.add_row(
                "" if i else name, arm, f"{means[i]:.0f} ± {errors[i]:.0f}", _ratio(means[i], means[0]), over,
                f"{wide_means[i]:.0f} ± {wide_errors[i]:.0f}", _ratio(wide_means[i], wide_means[0]),
                "" if i else f"{best:.3f}", f"{folds[i]:.0f}" if i > 1 else "", end_section=i == len(ARMS) - 1,
            )  # fmt: skip
    return table


def _ratio(value: float, of: float) -> str:
    return f"{value / of:.2f}" if of else "-"


def draw(results: dict[str, list[Results]]) -> Figure:
    """Decision boundaries of one network for each task: before the fold, at it and trained on; first data seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 2.7 * len(results)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(results), 3, squeeze=False)
    titles = ("2 units, trained", "3 units: hinge through the fold point", "3 units, trained on")
    for row, (name, of_seeds) in zip(panels, results.items(), strict=True):
        x, y = task(name, 0)
        for panel, key, title in zip(row, ("before", "after", "trained"), titles, strict=True):
            nets = _unpacked(of_seeds[0][key])
            _draw_boundary(panel, nets, x, y)
            panel.set_title(f"{name}: {title}" if key == "before" else title, loc="left", fontsize=9)
            if key != "trained":
                panel.plot(*of_seeds[0]["instance"], marker="*", markersize=13, color=COLOURS[4], mec="black")
                panel.plot(*of_seeds[0]["point"], marker="D", markersize=6, color="white", mec="black")
            shown = f"accuracy {float(accuracy(nets, x, y)[0]):.3f}"
            panel.set_xlabel(shown, fontsize=8, color=FAINT)
    note = "black: decision boundary · dashed: hinges, the new unit's in red · star: typical mispredicted instance · "
    figure.supxlabel(f"{note}diamond: fold point", fontsize=8, color=FAINT)
    return figure


def _unpacked(weights: NDArray[Any]) -> Nets:
    hidden = (len(weights) - 2) // 5
    values = torch.from_numpy(weights)
    return Nets(values[: 3 * hidden].view(1, hidden, 3), values[3 * hidden :].view(1, 2, hidden + 1))


def _draw_boundary(panel: Axes, nets: Nets, x: Tensor, y: Tensor) -> None:
    low, high = x.min(0).values - 0.3, x.max(0).values + 0.3
    across, up = (torch.linspace(float(low[i]), float(high[i]), 200) for i in range(2))
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), 2).reshape(-1, 2)
    outputs = nets(grid)[0]
    apart = (outputs[:, 1] - outputs[:, 0]).reshape(200, 200)
    for kind in (0, 1):
        panel.plot(x[y == kind, 0], x[y == kind, 1], ".", markersize=3, color=COLOURS[kind])
    panel.contour(across, up, apart, levels=[0], colors="black", linewidths=1.6)
    for unit, (a, b, c) in enumerate(nets.incoming[0].tolist()):
        line = (a * grid[:, 0] + b * grid[:, 1] + c).reshape(200, 200)
        panel.contour(across, up, line, levels=[0], colors="red" if unit == 2 else PLAIN, linewidths=0.8,
                      linestyles="dashed")  # fmt: skip
    panel.tick_params(labelsize=7, color=FAINT)
    panel.spines[["top", "right"]].set_visible(False)
