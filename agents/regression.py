"""Recyclers on the slowly-changing regression problem of Dohare et al. (2024): ``python -m agents.regression``.

An example has 20 bits: 15 stay, of which one flips now and then, and 5 are drawn anew every time. The target is a
fixed random network of 100 linear threshold units, the learner has 5 ReLU units and is trained on one example after
the other by plain SGD. All seeds are trained side by side, in one network of as many groups.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import recycle
from agents.checks import at_least, chosen, writable
from agents.children import processes
from agents.command_line import reported
from agents.figure import COLOURS, DASHES, FAINT, PLAIN
from agents.method_names import build_method
from agents.statistics import band, estimate, paired_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SLOW, BITS, THRESHOLD_UNITS, BETA = 15, 20, 100, 0.7
HIDDEN = 5
BINS = 20
RECENT = 1000
"""Examples on which a unit must be silent to count as dead."""

ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (0, {}),
    "random": (1000, {}),
    "cbp": (100, {"rate": 1e-4, "maturity": 100, "utility": "adaptable"}),
    "redo": (1000, {}),
    "regrama": (1000, {}),
    "split": (1000, {"tau": 0.025}),
    "mirror": (1000, {"tau": 0.025}),
    "snr": (1000, {}),
    "revive": (1000, {"rule": "B"}),
    "gradient_cutoff": (1000, {}),
}
"""Examples from event to event and options of each arm; ``none`` is plain SGD, with no hooks at all."""


@dataclass(frozen=True)
class Args:
    """Train 5 ReLU units on a stream that changes slowly, plain and with each recycler; print a table, draw curves.

    Arms that are there already, with the same settings, are kept.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms to run."""
    seeds: int = 30
    """Learners for each arm; learner i of every arm sees the same stream and begins with the same weights."""
    examples: int = 200_000
    """Length of the stream."""
    flip: int = 2000
    """Examples from one flip of a slow bit to the next."""
    learning_rate: float = 0.01
    """Of SGD."""
    workers: int = 2
    """Arms at a time, one core each."""
    log_folder: str = "runs/regression"
    """Where results, table and figure go."""


class Stream:
    """The examples of ``seeds`` independent problems, each drawn from a generator of its own."""

    def __init__(self, seeds: int, flip: int) -> None:
        self.flip, self.seen = flip, 0
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        signs = self._draw(lambda g: torch.randint(0, 2, (BITS + 1, THRESHOLD_UNITS), generator=g) * 2.0 - 1)
        self.weights = signs
        self.thresholds = (BITS + 1) * BETA - (signs < 0).sum(1)
        self.outgoing = self._draw(lambda g: torch.randint(0, 2, (THRESHOLD_UNITS,), generator=g) * 2.0 - 1)
        self.slow = self._draw(lambda g: torch.randint(0, 2, (SLOW,), generator=g).float())

    def _draw(self, draw: Any) -> Tensor:
        return torch.stack([draw(generator) for generator in self.generators])

    def take(self) -> tuple[Tensor, Tensor]:
        """The examples up to the next flip: bits ``(flip, seeds, 20)`` and targets ``(flip, seeds)``."""
        which = self._draw(lambda g: torch.randint(0, SLOW, (), generator=g))
        if self.seen:
            rows = torch.arange(len(which))
            self.slow[rows, which] = 1 - self.slow[rows, which]
        self.seen += self.flip
        fast = self._draw(lambda g: torch.randint(0, 2, (self.flip, BITS - SLOW), generator=g).float())
        bits = torch.cat([self.slow[:, None].expand(-1, self.flip, -1), fast], 2)
        with_one = torch.cat([bits, torch.ones(len(bits), self.flip, 1)], 2)
        fired = (torch.bmm(with_one, self.weights) > self.thresholds[:, None]).float()
        targets = torch.bmm(fired, self.outgoing[:, :, None])[:, :, 0]
        return bits.transpose(0, 1).contiguous(), targets.t().contiguous()


class Apart(nn.Conv1d):
    """A convolution of width 1 in groups, by one product for all groups: a CPU takes them one after the other."""

    def _conv_forward(self, data: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, groups = len(data), self.groups
        matrices, inputs = weight.view(groups, -1, weight.shape[1]), data.reshape(rows, groups, -1).permute(1, 2, 0)
        if bias is None:
            outputs = torch.bmm(matrices, inputs)
        else:
            outputs = torch.baddbmm(bias.view(groups, -1, 1), matrices, inputs)
        return outputs.permute(2, 0, 1).reshape(rows, -1, 1)


def learners(seeds: int) -> nn.Sequential:
    """Networks of 5 ReLU units, as many as there are seeds: what each sees and says stands in channels of its own."""
    hidden = Apart(BITS * seeds, HIDDEN * seeds, 1, groups=seeds)
    output = Apart(HIDDEN * seeds, seeds, 1, groups=seeds)
    return nn.Sequential(hidden, nn.ReLU(), output)


def run(arm: str, args: Args) -> dict[str, NDArray[np.float64]]:
    """Train one arm.

    Returns ``error``, the mean squared error, and ``dead``, units silent on the last 1000 examples, both ``(seeds,
    20)`` for 20 equal parts of the stream (``dead`` at their ends); ``recycled``, units recycled, ``(seeds,)``.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, stream = learners(args.seeds), Stream(args.seeds, args.flip)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.learning_rate)
    every, options = ARMS[arm]
    recycler = None
    if every:
        probe = torch.rand(2, BITS * args.seeds, 1)
        graph = recycle.trace(net, lambda: net(probe))
        recycler = recycle.Recycler(graph, build_method(arm, options), optimizers=[optimizer])
        recycler.attach()
        seed_of = {group.name: seed for seed, group in enumerate(graph)}
    recycled = np.zeros(args.seeds)
    errors, dead = np.zeros((args.examples, args.seeds)), np.zeros((BINS, args.seeds))
    done = 0
    while done < args.examples:
        bits, targets = stream.take()
        said = []
        for i, (x, y) in enumerate(zip(bits.flatten(1)[:, None, :, None], targets[:, None, :, None], strict=True)):
            squared = (net(x) - y).square()
            squared.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            said.append(squared.detach())
            if recycler is not None and (done + i + 1) % every == 0:
                for name, group in recycler.step().groups.items():
                    recycled[seed_of[name]] += group.recycled
        errors[done : done + len(bits)] = torch.cat(said).flatten(1).numpy()
        done += len(bits)
        recent = bits[-RECENT:].flatten(1)[:, :, None]
        with torch.no_grad():
            silent = (net[:2](recent) == 0).all(0).reshape(args.seeds, HIDDEN).sum(1)
        dead[done * BINS // args.examples - 1] = silent.numpy()
    means = errors.reshape(BINS, -1, args.seeds).mean(1)
    return {"error": means.T, "dead": dead.T, "recycled": recycled}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table and draw the curves; returns the exit code."""
    args = tyro.cli(Args, args=argv, prog="python -m agents.regression", description=__doc__)
    return reported(lambda: _compare(args))


def _compare(args: Args) -> None:
    chosen("--arms", args.arms, ARMS)
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be above 0 and finite, got {args.learning_rate}")
    at_least(args, seeds=1, workers=1, flip=1, examples=1)
    if args.examples % (BINS * args.flip):
        raise ValueError(f"--examples must be a multiple of {BINS} x flip, {BINS * args.flip}, got {args.examples}")
    writable(args.log_folder)
    folder = Path(args.log_folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {arm: kept for arm in args.arms if (kept := _load(folder, arm, args)) is not None}
    missing = [arm for arm in args.arms if arm not in found]
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress, processes(args.workers) as pool:
        job = progress.add_task("arms", total=len(args.arms), completed=len(found))
        jobs = {pool.submit(run, arm, args): arm for arm in missing}
        for ended in as_completed(jobs):
            arm = jobs[ended]
            found[arm] = ended.result()
            _save(folder, arm, args, found[arm])
            progress.advance(job)
    results = {arm: found[arm] for arm in args.arms}
    console = Console(width=max(Console().width, 130))  # rather a wrapped line than a number cut short
    console.print(_table(results, args))
    path = folder / "regression.png"
    draw(results, args).savefig(path, dpi=110)
    console.print(f"figure: {path}", soft_wrap=True)


def _settings(arm: str, args: Args) -> str:
    """What decides an arm's results, as text."""
    chosen = {k: v for k, v in asdict(args).items() if k not in ("arms", "workers", "log_folder")}
    return repr((chosen, ARMS[arm]))


def _load(folder: Path, arm: str, args: Args) -> dict[str, NDArray[np.float64]] | None:
    path = folder / f"{arm}.npz"
    if not path.exists():
        return None
    with np.load(path) as saved:
        if str(saved["settings"]) != _settings(arm, args):
            return None
        return {key: saved[key] for key in ("error", "dead", "recycled")}


def _save(folder: Path, arm: str, args: Args, result: dict[str, NDArray[np.float64]]) -> None:
    path = folder / f"{arm}.npz"
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, settings=_settings(arm, args), **result)  # type: ignore[arg-type]
    os.replace(unfinished, path)


def _table(results: dict[str, dict[str, NDArray[np.float64]]], args: Args) -> Table:
    """Errors and dead units of every arm: IQM over seeds with its 95 % bootstrap interval."""
    table = Table(title=f"{args.seeds} learners of {HIDDEN} units, {args.examples:,} examples", title_justify="left")
    table.add_column("arm")
    for column in (
        "error, first fifth",
        "last fifth",
        "last - first",
        "last, over none",
        "dead at the end",
        "recycled",
    ):
        table.add_column(column, justify="right")
    fifth = BINS // 5
    plain = results["none"]["error"][:, -fifth:].mean(1) if "none" in results else None
    for arm, result in results.items():
        first, last = result["error"][:, :fifth].mean(1), result["error"][:, -fifth:].mean(1)
        over = "" if plain is None or arm == "none" else paired_difference(last, plain)
        dead = estimate(result["dead"][:, -fifth:].mean(1))
        shown = (estimate(first), estimate(last), paired_difference(last, first), over, dead)
        table.add_row(arm, *map(str, shown), f"{result['recycled'].mean():.1f}")
    return table


def draw(results: dict[str, dict[str, NDArray[np.float64]]], args: Args) -> Figure:
    """Error on the left, dead units on the right, over examples: IQM over seeds and its 95 % bootstrap band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    edges = np.arange(1, BINS + 1) * args.examples / BINS
    looks = ((colour, dash) for dash in DASHES for colour in COLOURS)
    styles = {arm: (PLAIN, "-") if arm == "none" else next(looks) for arm in results}
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # type: ignore[union-attr, call-arg]
    for panel, key, label in zip(panels, ("error", "dead"), ("mean squared error", "dead units of 5"), strict=True):
        for arm, result in results.items():
            middle, low, high = band(result[key])
            colour, dash = styles[arm]
            panel.plot(edges, middle, color=colour, linestyle=dash, label=arm, linewidth=1.8)
            panel.fill_between(edges, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("examples")
        panel.set_title(label, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(ncols=2, frameon=False)
    note = f"IQM of {args.seeds} seeds with its 95 % bootstrap band; a bit flips every {args.flip:,} examples"
    figure.text(0.995, 0.005, note, ha="right", va="bottom", color=FAINT, fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
