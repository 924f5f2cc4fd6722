"""What the processes of a data-parallel training do in test_distributed.py: each scenario runs on every rank."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import recycle
from recycle import Recycler, Reset
from recycle.methods.selection import Units
from recycle.ranks import RanksDiffer
from recycle.report import Report
from recycle.stats import Stats

METHODS = ("redo", "split", "mirror", "cbp", "snr", "regrama", "revive", "random", "gradient_cutoff")
OPTIONS = {"cbp": {"rate": 0.01, "maturity": 4}, "snr": {"eta": 0.05}}
BATCH = 32


def run(world: int, *scenarios: str) -> list[dict[str, Any]]:
    """What each rank returned from each scenario: results[rank][scenario]."""
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_work, (world, folder, scenarios), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: str, scenarios: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        found = {name: globals()[name](rank, world) for name in scenarios}
        torch.save(found, Path(folder) / str(rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


# -- what they train ---------------------------------------------------------------------------------------


class Turns:
    """Methods that take turns, one an event."""

    def __init__(self, *names: str) -> None:
        self.methods = [recycle.find(name)(**OPTIONS.get(name, {})) for name in names]
        self.needs = tuple(dict.fromkeys(need for method in self.methods for need in method.needs))

    def __call__(self, group: Units, stats: Stats) -> Any:
        return self.methods[stats.event % len(self.methods)](group, stats)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    wound(net, range(4))
    return net


@torch.no_grad()
def wound(net: nn.Module, units: Sequence[int]) -> None:
    """Let units of both hidden layers fall silent."""
    for layer in (net[0], net[2]):  # type: ignore[index]
        layer.bias[list(units)] = -100.0


def batch(update: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(update)
    return tuple(torch.randn(BATCH, n, generator=draw, dtype=torch.double) for n in (6, 3))  # type: ignore[return-value]


class Training:
    """One rank's part of it: ``sizes`` are the ranks' parts of every batch; of one rank that is alone, all of it."""

    def __init__(self, rank: int, sizes: Sequence[int], method: Any, net: nn.Module | None = None, **how: Any) -> None:
        self.rank, self.sizes = rank, list(sizes)
        self.net = net if net is not None else network()
        together = len(sizes) > 1
        apart = {"broadcast_buffers": False} if list(self.net.buffers()) else {}
        self.model = DistributedDataParallel(self.net, **apart) if together else self.net
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        self.graph = recycle.trace(self.net, lambda: self.net(batch(0)[0]))
        group = dist.group.WORLD if together else None
        how = {"sample_every": 1, "process_group": group} | how
        self.recycler = Recycler(self.graph, method, optimizers=[self.optimizer], **how)
        self.update = 0

    def mine(self, values: Tensor) -> Tensor:
        return values.split(self.sizes)[self.rank]

    def train(self, updates: int) -> None:
        """The mean loss of all examples, which is the mean of these losses over the ranks."""
        for _ in range(updates):
            x, y = map(self.mine, batch(self.update))
            self.optimizer.zero_grad()
            with self.recycler.listening():
                errors = (self.model(x) - y).square().mean(1)
                (errors.sum() * len(self.sizes) / sum(self.sizes)).backward()
            self.optimizer.step()
            self.update += 1

    def events(self, count: int, updates: int = 2) -> list[Report]:
        reports = []
        for event in range(count):
            self.train(updates)
            reports.append(self.recycler.step())
            wound(self.net, [event % 12, (5 * event) % 12])
        return reports

    @property
    def outcome(self) -> dict[str, Any]:
        """All that must be the same on every rank."""
        state = self.recycler.state_dict()
        return {
            "weights": {name: p.detach().clone() for name, p in self.net.named_parameters()},
            "moments": [list(state.values()) for state in self.optimizer.state.values()],
            "books": [state[key] for key in ("events", "windows", "generator", "recycled_at", "newborn", "parent")],
            "tracker": [state["tracker"][key] for key in ("passes", "steps", "cleared_at", "born")],
            "silences": [w["firing"] for seen in state["tracker"]["seen"].values() for w in seen["windows"]],
        }


def alike(world: int) -> list[int]:
    return [BATCH // world] * world


def error_of(act: Any) -> str:
    """The type and text of what it raises; "" if nothing."""
    try:
        act()
    except (RanksDiffer, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# -- scenarios ---------------------------------------------------------------------------------------------


def in_turns(rank: int, world: int) -> dict[str, Any]:
    """100 events."""
    training = Training(rank, alike(world), Turns(*METHODS))
    return {"reports": training.events(100)} | training.outcome


def one_by_one(rank: int, world: int) -> dict[str, Any]:
    """100 events of each method."""
    found = {}
    for name in METHODS:
        training = Training(rank, alike(world), Turns(name))
        found[name] = {"reports": training.events(100)} | training.outcome
    return found


def uneven(rank: int, world: int) -> dict[str, Any]:
    """Ranks with different parts of the batch, the second with none of it."""
    sizes = [BATCH] if world == 1 else [BATCH - 7 * (world - 2), 0, *[7] * (world - 2)]
    generator = torch.Generator().manual_seed(rank)  # all take the first rank's
    training = Training(rank, sizes, Turns(*METHODS), generator=generator)
    return {"reports": training.events(18)} | training.outcome


def spoiled(rank: int, world: int) -> list[Report]:
    """A NaN on the last rank, in one pass that trains nothing; then a window without."""
    training = Training(rank, alike(world), Turns("redo"))
    x = batch(0)[0][:4].clone()
    x[0, 0] = float("nan") if rank == world - 1 else 0.0
    with training.recycler.listening():
        training.model(x).sum().backward()
    before = training.outcome["weights"]
    reports = [training.recycler.step()]
    assert all(torch.equal(before[name], p) for name, p in training.net.named_parameters())
    return reports + training.events(1)


class FlatParameter(nn.Parameter):
    """Named as that of FullyShardedDataParallel, which needs an accelerator."""


def _drawn(name: str, tensor: Tensor, generator: Any) -> None:
    tensor.normal_()  # from torch's own generator


def refusals(rank: int, world: int) -> dict[str, str]:
    """What is refused, and with which words; every rank says something, and the next thing works."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns

    last = rank == world - 1
    other = network()
    with torch.no_grad():
        other[2].weight[1, 1] += 1e-9 * last
    whole = [BATCH // world] * world
    net = network()
    graph = recycle.trace(net, lambda: net(batch(0)[0]))
    redo = recycle.find("redo")()
    group = {"process_group": dist.group.WORLD}
    zero = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=1e-3)
    wrapped = DistributedDataParallel(network())
    found = {
        "weights": error_of(lambda: Recycler(recycle.trace(other, lambda: other(batch(0)[0])), redo, **group)),
        "options": error_of(lambda: Recycler(graph, redo, warmup=int(last), **group)),
        "groups": error_of(lambda: Recycler(graph.select(["0"]) if last else graph, redo, **group)),
        "method": error_of(lambda: Recycler(graph, recycle.find("cbp" if last else "redo")(), **group)),
        "zero": error_of(lambda: Recycler(graph, redo, optimizers=[zero], **group)),
        "target": error_of(lambda: Recycler(graph, redo, targets=[(wrapped, 0.5)], **group)),
        "growth": error_of(lambda: Recycler(graph, recycle.find("tiny")(), **group)),
        "group": error_of(lambda: Recycler(graph, redo, process_group="gloo")),
        "wrapper": error_of(lambda: recycle.trace(wrapped, lambda: wrapped(batch(0)[0]))),
    }
    sharded = network()
    half = recycle.trace(sharded, lambda: sharded(batch(0)[0]))
    sharded[2].weight = FlatParameter(sharded[2].weight.detach().flatten())
    found["sharded"] = error_of(lambda: Recycler(half, redo, **group))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Recycler(graph, redo)
    found["by itself"] = "; ".join(str(warning.message) for warning in caught)
    training = Training(rank, whole, redo)
    training.train(2)
    with torch.no_grad():
        training.net[4].bias[0] += 1e-9 * last
    before = training.outcome
    found["drifted"] = error_of(training.recycler.step)
    assert str(training.outcome) == str(before), "a refused event has changed something"
    training = Training(rank, whole, redo)
    training.train(2)
    found["calls"] = error_of(training.recycler.report if last else training.recycler.step)
    training = Training(rank, whole, redo, init=_drawn)
    torch.manual_seed(rank)
    training.train(2)
    found["init"] = error_of(training.recycler.step)
    return found


class Failing:
    """Fails on one rank, at the second group of the second event, after it has had the first group reset."""

    needs = ("minimum", "maximum")

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __call__(self, group: Units, stats: Stats) -> list[Any]:
        if self.fails and stats.event == 2 and group.name == "2":
            raise ValueError("no more ideas")
        return [Reset(stats.dead.nonzero()[:, 0].tolist())]


def failing(rank: int, world: int) -> dict[str, Any]:
    """A method that fails on one rank, before and between exchanges; and training goes on with another recycler."""
    found: dict[str, Any] = {}
    for name, targets in (("plain", []), ("polyak", [(network(), 0.9)])):
        training = Training(rank, alike(world), Failing(rank == world - 1), targets=targets)
        training.events(1)
        training.train(2)
        window = training.recycler.tracker.samples
        found[name] = error_of(training.recycler.step)
        assert training.recycler.tracker.samples == window, "the window is this rank's own again"
    later = Training(rank, alike(world), Turns("redo"))
    found["later"] = {"reports": later.events(2)} | later.outcome
    return found


def polyak(rank: int, world: int) -> list[Report]:
    """Units 0 and 1 are dead in the network; in the target unit 1 is alive on the last rank's data alone."""
    target = network()
    with torch.no_grad():
        target[0].weight[:2] = 0.0
        target[0].bias[:2] = -1.0
        target[0].weight[1, 0] = 1.0
    training = Training(rank, alike(world), Turns("redo"), targets=[(target, 0.5)])
    bounded = batch(0)[0].clamp(-0.9, 0.9)
    bounded[-1, 0] = 2.0
    with training.recycler.listening():
        training.model(training.mine(bounded)).sum().backward()
    training.optimizer.zero_grad()
    return [training.recycler.step()]


def resizing(rank: int, world: int) -> dict[str, Any]:
    """Methods that would change how many units or layers there are."""
    found = {}
    for name in ("near_zero", "net2deeper", "plasticity_injection"):
        training = Training(rank, alike(world), recycle.find(name)())
        found[name] = training.events(1)[0]
    return found


class Reader:
    """Keeps what it is told."""

    needs = ("recorded", "sample", "inputs", "activations", "gradient", "silence")

    def __init__(self) -> None:
        self.told: list[tuple[str, Stats]] = []

    def __call__(self, group: Units, stats: Stats) -> list[Any]:
        kept = stats.activations.clone()  # the next pass may overwrite it
        self.told.append((group.name, replace(stats, activations=kept)))
        return []


FIELDS = (
    "samples", "firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum", "gradient", "weight_gradient",
    "age", "silence", "rarity", "event", "updates", "finite", "activations", "recorded",
)  # fmt: skip


def seen(rank: int, world: int) -> dict[str, Any]:
    """All that a method is told, with looks between that change nothing; and how far the output jumps."""
    reader = Reader()
    net = network()
    training = Training(rank, alike(world), reader, net, probe=lambda: net(batch(rank)[0]), sample_every=2)
    found: dict[str, Any] = {"reports": []}
    for update in range(9):
        training.train(1)
        training.recycler.record("loss", float(10 * update + rank))
        if update == 3:
            found["reports"] += [training.recycler.report(), training.recycler.observe(keep_window=True)]
        if update in (5, 8):
            found["reports"].append(training.recycler.step())
    found["told"] = [
        {field: getattr(stats, field) for field in FIELDS}
        | {"group": name, "inputs": stats.inputs, "sample": list(vars(stats.sample).values())}
        for name, stats in reader.told
    ]
    return found


def resumed(rank: int, world: int) -> dict[str, Any]:
    """Interrupted within a window, each rank with a state of its own; and behind an event, all with rank 0's."""
    outcomes = []
    for interrupted in ("never", "within a window", "behind an event"):
        training = Training(rank, alike(world), Turns("redo", "snr", "random"))
        training.events(3)
        if interrupted == "within a window":
            training.train(1)
        if interrupted != "never":
            saved = training.recycler.state_dict()
            if interrupted == "behind an event":
                box = [saved]
                dist.broadcast_object_list(box)
                saved = box[0]
            training.recycler.detach()
            other = Recycler(
                training.graph,
                Turns("redo", "snr", "random"),
                optimizers=[training.optimizer],
                sample_every=1,
                process_group=dist.group.WORLD,
            )
            other.load_state_dict(saved)
            training.recycler = other
        if interrupted != "within a window":
            training.train(1)
        training.train(1)
        training.recycler.step()
        training.events(3)
        outcomes.append(training.outcome)
    return {str(number): outcome for number, outcome in enumerate(outcomes)}


def normalised(rank: int, world: int) -> dict[str, Any]:
    """Running statistics differ from rank to rank: edits must not."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.BatchNorm1d(10), nn.Linear(10, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)
    ).double()  # fmt: skip
    with torch.no_grad():
        net[0].bias[:3] = -100.0
        net[2].running_var[:3] = 0.0 if rank else 1.0
    training = Training(rank, alike(world), Turns("redo", "revive", "split"), net)
    reports = []
    for _ in range(6):
        training.train(2)
        reports.append(training.recycler.step())
    return {"reports": reports, "means": net[2].running_mean.clone()} | training.outcome


def resized_elsewhere(rank: int, world: int) -> list[Report]:
    """All ranks change the network behind the recycler's back, and the first alone sees a pass of it."""
    training = Training(rank, alike(world), Turns("redo"))
    training.train(1)
    recycle.apply(recycle.Prune([0]), recycle.trace(training.net, lambda: training.net(batch(0)[0]))["0"])
    if rank == 0:
        with training.recycler.listening():
            training.net(batch(0)[0]).sum().backward()
    return [training.recycler.step(), training.recycler.step()]


def absent(rank: int, world: int) -> dict[str, Any]:
    """One rank never comes."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    training = Training(rank, alike(world), Turns("redo"), process_group=group)
    training.train(1)
    return {"error": error_of(training.recycler.step) if rank == 0 else ""}


def reads_inside(rank: int, world: int) -> str:
    """step() where a backward pass may be pending, on one rank alone."""
    training = Training(rank, alike(world), Turns("redo"))
    training.train(1)
    if rank == world - 1:
        with training.recycler.listening():
            return error_of(training.recycler.step)
    return error_of(training.recycler.step)
