"""How wide a self-expanding network becomes, and how that depends on how many examples there are.

The headline of Mitchell et al. (2023, arXiv 2307.04526): the hidden layer of a converged network is the wider the more
examples per class it was trained on. Here on scikit-learn's 8 x 8 digits, with 30 test images of each class, full
batches and Adam. Every seed draws its own images; a larger training set contains the smaller ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import recycle
from agents.checks import at_least, writable
from agents.children import processes
from agents.figure import COLOURS, FAINT, PLAIN
from agents.statistics import Estimate, band, estimate, paired_difference
from recycle.methods.senn import SelfExpanding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST = 30
"""Test images of each class."""
MOST = 140
"""Training images of a class that every class has."""
ARMS = {"grown": COLOURS[0], "final width": COLOURS[1], "initial width": PLAIN}
"""The self-expanding network, and fixed ones of its final and its initial width, trained for as many updates."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Args:
    """Grow one hidden layer on more and more digits, with fixed layers as controls; print a table, draw a figure.

    Runs that are there already, with the same settings, are kept.
    """

    examples: tuple[int, ...] = (5, 10, 20, 40, 80, 140)
    """Training images of each class, at most 140."""
    seeds: int = 6
    """Networks for each of them."""
    initial: int = 2
    """Hidden units at the start."""
    every: int = 50
    """Updates from event to event."""
    patience: int = 8
    """A network has converged after so many events in a row at which it did not grow."""
    events: int = 60
    """Events, at most."""
    learning_rate: float = 3e-3
    """Of Adam."""
    relative: float = 0.03
    """The expansion test's relative threshold, see the method ``senn``."""
    absolute: float = 0.0025
    """Its absolute threshold."""
    certainty: float = 1.0
    """Standard errors by which a gain must be above zero."""
    workers: int = 2
    """Runs at a time, one core each."""
    log_folder: str = "runs/self_expanding"
    """Where results, table and figure go."""


def compare(args: Args) -> None:
    """Run what is missing, then print the table and draw the figure."""
    _check(args)
    writable(args.log_folder)
    folder = Path(args.log_folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(examples, seed) for seed in range(args.seeds) for examples in args.examples]
    found = {key: kept for key in wanted if (kept := _load(folder, key, args)) is not None}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress, processes(args.workers) as pool:
        job = progress.add_task("networks", total=len(wanted), completed=len(found))
        jobs = {pool.submit(run, *key, args): key for key in wanted if key not in found}
        for ended in as_completed(jobs):
            found[jobs[ended]] = ended.result()
            _save(folder, jobs[ended], args, ended.result())
            progress.advance(job)
    results = {n: [found[n, seed] for seed in range(args.seeds)] for n in args.examples}
    console = Console()
    console.print(_table(results, args))
    if len(args.examples) > 1:
        console.print(f"units for each doubling of the examples: {_shown(slope(results))}", highlight=False)
    path = folder / "self_expanding.png"
    draw(results, args).savefig(path, dpi=110)
    console.print(f"figure: {path}", soft_wrap=True)


def run(examples: int, seed: int, args: Args) -> Result:
    """Grow one network until it has converged, then train the controls for as many updates.

    Returns ``widths``, after each event; ``updates``; ``accuracy`` on the test images and ``loss`` on the training
    images of each of :data:`ARMS`.
    """
    torch.set_num_threads(1)
    x, y, test_x, test_y = digits(examples, seed)
    net = _network(args.initial, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.learning_rate)
    method = SelfExpanding(relative=args.relative, absolute=args.absolute, certainty=args.certainty)
    graph = recycle.trace(net, lambda: net(x[:2]))
    recycler = recycle.Recycler(
        graph,
        method,
        optimizers=[optimizer],
        generator=torch.Generator().manual_seed(seed),
        sample_every=args.every,  # the batch is the whole set: the first update of a window shows all there is
    )
    recycler.attach()
    widths: list[int] = []
    idle = 0
    while idle < args.patience and len(widths) < args.events:
        _train(net, optimizer, x, y, args.every)
        idle = 0 if recycler.step().edits else idle + 1
        widths.append(graph["0"].width)
    recycler.detach()
    nets = {"grown": net}
    for arm, width in (("final width", widths[-1]), ("initial width", args.initial)):
        nets[arm] = _network(width, seed)
        adam = torch.optim.Adam(nets[arm].parameters(), lr=args.learning_rate)
        _train(nets[arm], adam, x, y, args.every * len(widths))
    with torch.no_grad():
        accuracy = {arm: float((of(test_x).argmax(1) == test_y).double().mean()) for arm, of in nets.items()}
        loss = {arm: float(nn.functional.cross_entropy(of(x), y)) for arm, of in nets.items()}
    return {"widths": widths, "updates": args.every * len(widths), "accuracy": accuracy, "loss": loss}


def digits(examples: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(10 * examples, 64)`` in [0, 1] and labels, then 30 test images of each class and theirs."""
    images, labels = _all_digits()
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.concatenate([order[:TEST] for order in orders])
    train = np.concatenate([order[TEST : TEST + examples] for order in orders])
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    return x[train], y[train], x[test], y[test]


@cache
def _all_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int64)


def _network(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, updates: int) -> None:
    for _ in range(updates):
        torch.autograd.backward(nn.functional.cross_entropy(net(x), y))
        optimizer.step()
        optimizer.zero_grad()


# -- what came of it ---------------------------------------------------------------------------------------


def slope(results: Mapping[int, Sequence[Result]]) -> Estimate:
    """Units for each doubling of the examples: of every seed's least-squares line, their IQM and interval."""
    doublings = np.log2(np.array(list(results), dtype=np.float64))
    widths = _last_widths(results)
    centred = doublings - doublings.mean()
    return estimate(centred @ widths / (centred @ centred))


def _last_widths(results: Mapping[int, Sequence[Result]]) -> NDArray[np.float64]:
    """``(sizes, seeds)``."""
    return np.array([[run["widths"][-1] for run in runs] for runs in results.values()], dtype=np.float64)


def _accuracies(results: Mapping[int, Sequence[Result]], arm: str) -> NDArray[np.float64]:
    """In percent, ``(sizes, seeds)``."""
    return 100 * np.array([[run["accuracy"][arm] for run in runs] for runs in results.values()])


def _table(results: Mapping[int, Sequence[Result]], args: Args) -> Table:
    """Widths and test accuracies: IQM over seeds with its 95 % bootstrap interval."""
    table = Table(title=f"digits, from {args.initial} hidden units, {args.seeds} seeds", title_justify="left")
    columns = ("examples per class", "hidden units", "updates", *(f"{arm}, test %" for arm in ARMS))
    for column in (*columns, "grown - final width"):
        table.add_column(column, justify="right")
    of_arm = {arm: _accuracies(results, arm) for arm in ARMS}
    for i, (examples, runs) in enumerate(results.items()):
        cells = [_shown(estimate(of_arm[arm][i])) for arm in ARMS]
        over = _shown(paired_difference(of_arm["grown"][i], of_arm["final width"][i]))
        updates = f"{np.mean([run['updates'] for run in runs]):.0f}"
        table.add_row(str(examples), _shown(estimate(_last_widths(results)[i])), updates, *cells, over)
    return table


def _shown(found: Estimate) -> str:
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def draw(results: Mapping[int, Sequence[Result]], args: Args) -> Figure:
    """Hidden units on the left, test accuracy on the right, over examples: IQM and its 95 % bootstrap interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    examples, widths = np.array(list(results)), _last_widths(results)
    for seed in range(widths.shape[1]):
        left.plot(examples, widths[:, seed], color=FAINT, linewidth=0.6, alpha=0.6)
    for panel, arm, values in [(left, "grown", widths), *((right, arm, _accuracies(results, arm)) for arm in ARMS)]:
        middle, low, high = band(values.T)
        errors = np.nan_to_num(np.stack([middle - low, high - middle]).clip(min=0))
        panel.errorbar(examples, middle, errors, color=ARMS[arm], label=arm, marker="o", ms=4, capsize=3, linewidth=1.8)
    for panel, title in ((left, "hidden units of the converged network"), (right, "test accuracy, %")):
        panel.set_xscale("log")
        panel.set_xticks(examples)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("examples per class")
        panel.set_title(title, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    right.legend(frameon=False)
    note = f"IQM of {args.seeds} seeds with its 95 % bootstrap interval; thin lines: seeds"
    figure.supxlabel(note, x=0.995, ha="right", color=FAINT, fontsize=9)
    return figure


# -- keeping what is there ---------------------------------------------------------------------------------


def _check(args: Args) -> None:
    if not args.examples or min(args.examples) < 1 or max(args.examples) > MOST:
        raise ValueError(f"--examples takes 1 to {MOST} images of each class, got {args.examples}")
    if sorted(set(args.examples)) != list(args.examples):
        raise ValueError(f"--examples takes numbers in rising order, each once, got {args.examples}")
    at_least(args, seeds=1, initial=2, every=1, patience=1, events=1, workers=1)
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be above 0 and finite, got {args.learning_rate}")
    SelfExpanding(relative=args.relative, absolute=args.absolute, certainty=args.certainty)


def _settings(args: Args) -> Result:
    """What decides the result of a run, beside its number of examples and its seed."""
    return {k: v for k, v in asdict(args).items() if k not in ("examples", "seeds", "workers", "log_folder")}


def _load(folder: Path, key: tuple[int, int], args: Args) -> Result | None:
    path = folder / f"{key[0]}-{key[1]}.json"
    if not path.exists():
        return None
    saved: Result = json.loads(path.read_text(encoding="utf-8"))
    settings = saved.pop("settings")
    return saved if settings == _settings(args) else None


def _save(folder: Path, key: tuple[int, int], args: Args, result: Result) -> None:
    path = folder / f"{key[0]}-{key[1]}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"settings": _settings(args), **result}), encoding="utf-8")
    os.replace(unfinished, path)
