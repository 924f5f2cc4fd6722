"""Measure what watching, recycling and tracing cost: ``python -m agents.bench overhead|methods|trace|slopes``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

import recycle
from agents.bench import costs, scaling, slopes
from agents.bench.inside import inside
from agents.callback import RecycleCallback
from agents.checks import at_least, threads
from agents.command_line import reported
from agents.method_names import build_methods
from agents.networks import networks_of
from agents.statistics import estimate


@dataclass(frozen=True)
class Overhead:
    """Time learn() with and without a RecycleCallback at its defaults, in alternating pairs."""

    pairs: int = 10
    """Pairs of runs for each algorithm and size."""
    steps: int = 8192
    """Environment steps of each run."""
    method: str = "split"
    """The method of the callback."""
    num_threads: int = 1
    """Threads for torch."""


@dataclass(frozen=True)
class Methods:
    """What each method costs an update, over the plain update, at its published schedule."""

    pairs: int = 40
    """Alternating pairs of watched and plain stretches of 16 updates, for each method and network."""
    method: tuple[str, ...] = ()
    """Only these."""
    num_threads: int = 1
    """Threads for torch."""


@dataclass(frozen=True)
class Trace:
    """Time and peak memory of recycle.trace against width and depth, and of recycle.apply; one thread."""

    quick: bool = False
    """Only the small cases: seconds instead of minutes."""


@dataclass(frozen=True)
class Slopes:
    """Cost of watching, events and files against the size of a network, and of reading runs against their number."""

    quick: bool = False
    """Only the two smallest cases of each: a minute instead of ten."""


METHOD_TERMS = (
    "in pairs: a watched update over a plain one; in hooks: their time over a plain update's; an event: in plain "
    "updates; amortised: 1 + hooks + an event's share of the updates between two"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code."""
    commands: dict[str, Callable[..., Any]] = {
        "overhead": _overhead_args,
        "methods": _methods_args,
        "trace": _trace_args,
        "slopes": _slopes_args,
    }
    args: Overhead | Methods | Trace | Slopes = tyro.extras.subcommand_cli_from_dict(
        commands, args=argv, prog="python -m agents.bench"
    )
    return reported(lambda: _report(args))


def _report(args: Overhead | Methods | Trace | Slopes) -> None:
    if isinstance(args, Slopes):
        slopes_of(args)
    elif isinstance(args, Trace):
        trace(args)
    elif isinstance(args, Methods):
        methods(args)
    else:
        overhead(args)


def _overhead_args(args: Annotated[Overhead, tyro.conf.arg(name="")] = Overhead()) -> Overhead:
    """Time learn() with and without a RecycleCallback at its defaults, in alternating pairs."""
    return args


def _methods_args(args: Annotated[Methods, tyro.conf.arg(name="")] = Methods()) -> Methods:
    """What each method costs an update, over the plain update, at its published schedule."""
    return args


def _trace_args(args: Annotated[Trace, tyro.conf.arg(name="")] = Trace()) -> Trace:
    """Time and peak memory of recycle.trace against width and depth, and of recycle.apply; one thread."""
    return args


def _slopes_args(args: Annotated[Slopes, tyro.conf.arg(name="")] = Slopes()) -> Slopes:
    """Cost of watching, events and files against the size of a network, and of reading runs against their number."""
    return args


def overhead(args: Overhead) -> dict[str, list[float]]:
    """Print the median ratio of each algorithm and size; returns the ratios of all pairs.

    The callback's first ``learn`` of a run traces and proves the network, so that is part of what is measured.
    Two equal runs differ by several per cent on most machines. "Inside the callback" is the steadier figure: the part
    of a ``learn`` that its hooks and events take, by their own clock; what they do to caches is only in the ratio.
    """
    at_least(args, pairs=1, steps=1)
    threads(args.num_threads)
    build_methods(args.method)
    torch.set_num_threads(args.num_threads)
    cases: dict[str, Callable[[], BaseAlgorithm]] = {
        f"{name} {width}x{width}": _maker(kind, width)
        for name, kind in (("PPO", PPO), ("DQN", DQN))
        for width in (64, 256)
    }
    found: dict[str, list[float]] = {}
    table = Table(title=f"learn({args.steps}) with the callback over without, {args.pairs} pairs", title_justify="left")
    for column in (
        "case",
        "median",
        "25-75 %",
        "IQM [95 %]",
        "inside the callback",
        "trace and proof, of a learn(2048)",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    with Progress(transient=True) as progress:
        job = progress.add_task("measuring", total=len(cases) * args.pairs)
        for name, make in cases.items():
            _learn(make(), 512, None)  # warm up
            ratios = []
            for pair in range(args.pairs):
                with_first = pair % 2 == 0
                times = {
                    w: _learn(make(), args.steps, args.method if w else None) for w in (with_first, not with_first)
                }
                ratios.append(times[True] / times[False])
                progress.advance(job)
            found[name] = ratios
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            iqm = estimate(ratios)
            spread = f"{iqm.value:.3f} [{iqm.low:.3f}, {iqm.high:.3f}]"
            shares = (
                f"{np.median([_inside(make(), args.steps, args.method) for _ in range(3)]):.2%}",
                f"{_trace_share(make):.2%}",
            )
            table.add_row(name, f"{middle:.3f}", f"{low:.3f} - {high:.3f}", spread, *shares)
    Console().print(table)
    return found


def methods(args: Methods) -> dict[tuple[str, str], costs.MethodCost]:
    """Print what watching and events of each method cost on each network; returns the costs."""
    at_least(args, pairs=1)
    threads(args.num_threads)
    chosen = args.method or tuple(recycle.METHODS)
    for name in chosen:
        build_methods(name)
    torch.set_num_threads(args.num_threads)
    found: dict[tuple[str, str], costs.MethodCost] = {}
    table = Table(title=f"cost of an update over a plain one, {args.pairs} pairs", title_justify="left")
    for column in ("network", "method", "in pairs", "in hooks", "an event", "every", "amortised"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    with Progress(transient=True) as progress:
        job = progress.add_task("measuring", total=len(costs.NETWORKS) * len(chosen))
        for network in costs.NETWORKS:
            for method in chosen:
                cost = found[network, method] = costs.cost_of(method, network, args.pairs)
                progress.advance(job)
                shown = f"{cost.watching:.3f}", f"{cost.hooks:.1%}", f"{cost.event:.1f}", f"{cost.every:,}"
                table.add_row(network, method, *shown, f"{cost.amortised:.3f}")
    console = Console()
    console.print(table)
    console.print(METHOD_TERMS, style="dim")
    return found


def trace(args: Trace) -> dict[str, scaling.Cost]:
    """Print what each case took, and the exponents of time against the number of parameters; returns the costs.

    Exponents are slopes of a least-squares line through log time and log parameters: 1 is linear, 2 quadratic.
    """
    part = slice(2) if args.quick else slice(None)
    families = {"wider": scaling.MLPS[part], "deeper": scaling.DEEP[part], "apply": scaling.APPLY[part]}
    cases = [*families["wider"], *families["deeper"], *(() if args.quick else scaling.LARGE), *families["apply"]]
    found: dict[str, scaling.Cost] = {}
    table = Table(title="one thread, each case in a process of its own", title_justify="left")
    for column in ("case", "parameters", "seconds", "peak memory / model", "time / copying"):
        table.add_column(column, justify="left" if column == "case" else "right")
    with Progress(transient=True) as progress:
        job = progress.add_task("measuring", total=len(cases))
        for case in cases:
            cost = found[case] = scaling.measured(case)
            progress.advance(job)
            edits = cost.copying > 0
            memory, ratio = ("", f"{cost.seconds / cost.copying:.1f}") if edits else (f"{cost.growth:.2f}", "")
            table.add_row(case, f"{cost.parameters:,}", f"{cost.seconds:.4f}", memory, ratio)
    console = Console()
    console.print(table)
    for name, members in families.items():
        sizes, times = ([getattr(found[c], field) for c in members] for field in ("parameters", "seconds"))
        slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        console.print(f"{name}: time grows as parameters ** {slope:.2f}", highlight=False)
    return found


def slopes_of(args: Slopes) -> dict[str, dict[str, float]]:
    """Print what each case cost, and the exponents of growth between two neighbours; returns the costs."""
    part = slice(2) if args.quick else slice(None)
    families = {
        "units": slopes.WATCH[part],
        "parameters": slopes.FILES[:3][part],
        "groups": (slopes.FILES[0], *slopes.FILES[3:])[part],
        "runs": slopes.FLEET[part],
    }
    cases = list(dict.fromkeys(case for members in families.values() for case in members))
    with Progress(transient=True) as progress:
        found = {case: slopes.measured(case) for case in progress.track(cases, description="measuring")}
    console = Console(width=max(Console().width, 150))
    for against, members in families.items():
        table = Table(title=f"against {against}: cost, and exponent from the size before", title_justify="left")
        names = list(found[members[0]])
        for name in ("case", *names):
            table.add_column(name, justify="left" if name == "case" else "right")
        for number, case in enumerate(members):
            before = found[members[number - 1]] if number else None
            table.add_row(case, *(_grown(found[case], before, name, against) for name in names))
        console.print(table)
    return found


def _grown(now: dict[str, float], before: dict[str, float] | None, name: str, against: str) -> str:
    """A cost, and by which power of the size it grew."""
    shown = f"{now[name]:,.0f}" if now[name] >= 100 else f"{now[name]:.3g}"
    if before is None or name == against or not (now[name] > 0 and before[name] > 0):
        return shown
    return f"{shown} ^{np.log(now[name] / before[name]) / np.log(now[against] / before[against]):.2f}"


def _maker(kind: Any, width: int) -> Callable[[], BaseAlgorithm]:
    kwargs = {"net_arch": [width, width], "activation_fn": nn.ReLU}
    return lambda: kind("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, seed=0, device="cpu")


def _learn(model: BaseAlgorithm, steps: int, method: str | None) -> float:
    """Seconds of processor time that ``learn`` takes, tracing and proof included: other programs do not count."""
    callback = None if method is None else RecycleCallback(method=method)
    start = time.process_time()
    model.learn(steps, callback=callback)
    return time.process_time() - start


def _inside(model: BaseAlgorithm, steps: int, method: str) -> float:
    """The part of a ``learn`` that is spent in the callback and in the tracker's hooks."""
    with inside() as clock:
        start = time.perf_counter()
        model.learn(steps, callback=RecycleCallback(method=method))
        return clock.seconds / (time.perf_counter() - start)


def _trace_share(make: Callable[[], BaseAlgorithm], repeats: int = 5) -> float:
    """Median time of tracing and proving over that of a ``learn(2048)`` of the same model, by turns."""
    model = make()
    whole, times = [], []
    for _ in range(repeats):
        whole.append(_learn(model, 2048, None))
        start = time.process_time()
        for network in networks_of(model):
            network.trace()
        times.append(time.process_time() - start)
    return float(np.median(times) / np.median(whole))


if __name__ == "__main__":
    sys.exit(main())
