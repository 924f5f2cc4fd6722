"""Observe, decide, apply, report: the one place that knows both statistics and surgery."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle import metrics
from recycle.edits import Edit, Fold, Grow, Prune, Reset, Split, kept, renumbered, resizes
from recycle.fresh import Init
from recycle.graph import Graph, NotRecyclable, UnitGroup
from recycle.methods import Method
from recycle.names import did_you_mean
from recycle.report import GroupReport, Report, after
from recycle.stats import Stats
from recycle.surgery import all_or_none, apply, check
from recycle.track import Tracker, peak

_NO_OPTIMIZER = (
    "this Recycler edits weights and knows no optimizer: momentum and second moments stay those of the units that were "
    "overwritten. Pass optimizers=[...]"
)


class Recycler:
    """Finds dead units of a network while it trains and puts them back to work.

    Holds the window of statistics, the ages of units and the private random generator; training draws from none
    of these. ::

        recycler = Recycler(graph, ReDo(), optimizers=[adam])
        for x, y in batches:
            with recycler.listening():
                loss(net(x), y).backward()
            adam.step(); adam.zero_grad()
            ...
            print(recycler.step())  # now and then, between updates

    Args:
        graph: what :func:`recycle.trace` found.
        method: decides what to do; see :data:`recycle.METHODS`.
        optimizers: every optimizer that holds the network's parameters. Their steps also tell one update from the
            next; without any, a loop that runs the network several times an update may be seen in part.
        targets: ``(target network, tau)`` pairs, see :func:`recycle.apply`. A unit is recycled under a Polyak
            target only if it is dead there too, on the latest batch.
        init: how this model initialises, for fresh units.
        generator: source of randomness; None: one of the recycler's own, seeded with 0.
        warmup: updates before the first edit.
        cooldown: events for which a unit that was just recycled is left alone.
        cap: largest part of a group's units that one event may recycle, in (0, 1].
        sample_every: statistics look at the passes of every so many updates.
        certify: tells at every report which units are dead for every possible input, as :func:`recycle.certify`
            does: ``lambda: recycle.certify(graph, net, low, high)``. None: reports say what was observed only.
    """

    def __init__(
        self,
        graph: Graph,
        method: Method,
        *,
        optimizers: Sequence[Optimizer] = (),
        targets: Sequence[tuple[nn.Module, float]] = (),
        init: Init | None = None,
        generator: torch.Generator | None = None,
        warmup: int = 0,
        cooldown: int = 0,
        cap: float = 1.0,
        sample_every: int = 8,
        certify: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        _check_method(method)
        if warmup < 0 or cooldown < 0 or not 0 < cap <= 1:
            raise ValueError(
                "a Recycler needs warmup >= 0 (updates), cooldown >= 0 (events) and 0 < cap <= 1, "
                f"got warmup={warmup}, cooldown={cooldown}, cap={cap}"
            )
        self.graph = graph
        self.method = method
        self.optimizers = tuple(optimizers)
        self.targets = tuple(targets)
        self.init = init
        self.generator = generator or torch.Generator().manual_seed(0)
        self.warmup, self.cooldown, self.cap = warmup, cooldown, cap
        inputs = "inputs" in method.needs
        self.tracker = Tracker(graph, optimizers=optimizers, sample_every=sample_every, inputs=inputs)
        self.certify = certify
        self.events = 0
        self._windows = 0  # ended: a look that keeps its window brings no cooldown nearer to its end
        self._recycled_at = {g.name: torch.full((g.width,), -1, dtype=torch.long) for g in graph}
        self._newborn = {g.name: torch.zeros(g.width, dtype=torch.bool) for g in graph}
        self._parent = {g.name: torch.full((g.width,), -1, dtype=torch.long) for g in graph}
        self._firing: dict[str, Tensor] = {}
        self._listening = False
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: Any = None

    # -- observing -----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Watch from now on until :meth:`detach`; a second call does nothing."""
        self.tracker.attach()
        self._attach_to_module()

    def detach(self) -> None:
        """Stop watching; what was seen stays."""
        self.tracker.detach()
        self._detach_from_module()

    def _attach_to_module(self) -> None:
        if self._handle is None and any(tau < 1 for _, tau in self.targets):
            self._handle = self.graph.module.register_forward_pre_hook(self._keep_batch, with_kwargs=True)

    def _detach_from_module(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch inside the block, round forward and backward; ``optimizer.step()`` may stand outside it."""
        before, self._listening = self._listening, True
        attached = self._handle is not None
        self._attach_to_module()
        try:
            with self.tracker.listening():
                yield
        finally:
            self._listening = before
            if not attached:
                self._detach_from_module()

    def _keep_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._batch = _detached((args, kwargs))  # an actor's actions come with its whole graph

    # -- deciding ------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The health of the current window; nothing is edited, and the window goes on."""
        groups = {}
        certified = self._certified()
        for group in self.graph:
            stats = self.tracker.stats(group)
            groups[group.name] = self._report(group, stats, self._why_unseen(group, stats), certified)
        return Report(self.events, groups)

    def observe(self, *, keep_window: bool = False) -> Report:
        """Like :meth:`step` without the edits: report, keep the books, begin a new window (or keep this one)."""
        return self._event(edit=False, keep_window=keep_window)

    def step(self) -> Report:
        """Decide and apply, between two updates; then begin a new window.

        Raises:
            NotRecyclable: called inside :meth:`listening`, where a backward pass may be pending.
        """
        if self._listening:
            raise NotRecyclable("step() inside listening(): a backward pass may be pending. Call it after the block")
        return self._event(edit=True, keep_window=False)

    def histograms(self) -> dict[str, Tensor]:
        """Per-unit values of the latest report: ``{"<group>/age": (width,), "<group>/firing_rate": (width,)}``."""
        found = {}
        for group in self.graph:
            found[f"{group.name}/age"] = (self.tracker.passes - self.tracker.born[group.name]).float()
            if group.name in self._firing:
                found[f"{group.name}/firing_rate"] = self._firing[group.name].float()
        return found

    def _event(self, *, edit: bool, keep_window: bool) -> Report:
        groups, edits = {}, []
        certified = self._certified()
        for group in self.graph:
            stats = self.tracker.stats(group, self.generator)
            note = self._why_not(group, stats)
            seen = self._report(group, stats, note, certified)
            made: list[Edit] = []
            if not note and edit:
                made, note = self._edit(group, stats)
            if made and not group.exact:
                note = "; ".join(filter(None, (f"approximate: {group.why}", note)))
            edits += [(group.name, edit) for edit in made]
            groups[group.name] = after(seen, stats, made, note, group.width)
            self._book(group, stats, made)
        if not keep_window:
            self.tracker.clear()
            self._windows += 1
        self.events += 1
        return Report(self.events, groups, tuple(edits))

    def _why_unseen(self, group: UnitGroup, stats: Stats) -> str:
        if group.name in self.tracker.unobserved:
            return f"unobserved: {self.tracker.unobserved[group.name]}"
        if not stats.samples:
            return "no training pass was seen since the last event"
        return ""

    def _why_not(self, group: UnitGroup, stats: Stats) -> str:
        unseen = self._why_unseen(group, stats)
        if unseen:
            return unseen
        if not stats.finite:
            return "NaN or infinite activations were seen: no edit is based on this window"
        if self.tracker.passes < self.warmup:
            return f"warming up: {self.tracker.passes} of {self.warmup} updates"
        wanted = {n: getattr(stats, n) for n in self.method.needs if n != "inputs"}  # these have no units
        missing = [n for n, value in wanted.items() if bool(torch.as_tensor(value).isnan().all())]
        return f"needs {', '.join(missing)}, which was not observed" if missing else ""

    def _edit(self, group: UnitGroup, stats: Stats) -> tuple[list[Edit], str]:
        """Make the method's edits of one group, all or none."""
        wanted = list(self.method(group, stats))
        held: dict[str, Any] = {"optimizers": self.optimizers, "targets": self.targets}
        try:
            for edit in wanted:
                check(edit, group, **held)
            allowed, note = self._allowed(group, wanted)
            edits = [edit for edit in (e.only(allowed) for e in wanted) if edit.slots or resizes(edit)]
            edits = [edit for edit in edits if not (isinstance(edit, Prune) and not edit.units)]
            if edits and not self.optimizers:
                warnings.warn(_NO_OPTIMIZER, stacklevel=4)
            if any(map(resizes, edits)):
                return self._resize(group, edits, note, stats.inputs)
            with all_or_none(group, **held):
                for edit in edits:
                    apply(edit, group, **held, generator=self.generator, init=self.init, inputs=stats.inputs)
        except NotRecyclable as error:
            return [], str(error)
        return edits, note

    def _resize(
        self, group: UnitGroup, edits: list[Edit], note: str, inputs: dict[str, Tensor] | None
    ) -> tuple[list[Edit], str]:
        """Make edits of which some resize, each all or none. Units keep their numbers until the last is made."""
        now = {unit: unit for unit in range(group.width)}
        made: list[Edit] = []
        for edit in edits:
            try:
                order = kept(renumbered(edit, now), group.width)
                apply(renumbered(edit, now), group, optimizers=self.optimizers, targets=self.targets,
                      generator=self.generator, init=self.init, inputs=inputs)  # fmt: skip
            except KeyError as error:
                return made, f"{type(edit).__name__} names unit {error}, which an earlier edit of the event removed"
            except NotRecyclable as error:
                return made, str(error)
            made.append(edit)
            place = {old: new for new, old in enumerate(order) if old >= 0}
            now = {unit: place[at] for unit, at in now.items() if at in place}
        return made, note

    def _allowed(self, group: UnitGroup, edits: list[Edit]) -> tuple[set[int], str]:
        """Slots that cooldown, target networks and the cap let through, and what was held back."""
        slots = list(dict.fromkeys(slot for edit in edits for slot in edit.slots))
        wanted = torch.tensor(slots, dtype=torch.long)
        last = self._recycled_at[group.name][wanted]
        ready = wanted[(last < 0) | (self._windows - last > self.cooldown)]
        notes = [f"{len(slots) - len(ready)} cooling down"] * (len(ready) < len(slots))
        soft = [module for module, tau in self.targets if tau < 1]
        if len(ready) and soft:
            if self._batch is None:
                return set(), "no batch was seen on which to check the target network"
            highest = torch.stack([peak(group, module, self._batch) for module in soft]).amax(0)
            folded = [slot for edit in edits if isinstance(edit, Fold) for slot in edit.slots]
            highest[folded] = torch.inf  # the target's own constant is another one
            dead = ready[highest[ready] == 0]
            notes += [f"{len(ready) - len(dead)} still alive in the target network"] * (len(dead) < len(ready))
            ready = dead
        most = max(1, math.floor(self.cap * group.width + 1e-9))
        notes += [f"{len(ready) - most} over the cap"] * (len(ready) > most)
        return set(ready[:most].tolist()), "; ".join(notes)

    def _certified(self) -> dict[str, float]:
        """The fraction of certified units of each group, if there is anything to tell it by."""
        proofs = {} if self.certify is None else self.certify()
        return {name: float(units.double().mean()) for name, units in proofs.items()}

    def _report(self, group: UnitGroup, stats: Stats, note: str, certified: Mapping[str, float]) -> GroupReport:
        """Health as it is."""
        health: dict[str, Any] = {"certified": certified.get(group.name, math.nan)}
        again = unparted = 0
        if stats.samples and stats.finite:
            self._firing[group.name] = stats.firing_rate
            again = int((self._newborn[group.name] & stats.dead).sum())
            seen = self.tracker.latest(group)
            children = (self._parent[group.name] >= 0).nonzero()[:, 0]
            copies = metrics.resemblance(group, children, self._parent[group.name][children]) > metrics.TWIN
            unparted = int(copies.sum())
            health |= {
                "dead": metrics.dead(stats),
                "dead_after": metrics.dead(stats),
                "dormant": metrics.dormant(stats),
                "constant": metrics.constant(stats),
                "saturated": metrics.saturated(stats),
                "gradient_silent": metrics.gradient_silent(stats),
                "effective_rank": math.nan if seen is None else metrics.effective_rank(seen),
                "duplicates": float(metrics.duplicates(group).double().mean()),
            }
        return GroupReport(group.width, stats.samples, **health, unparted=unparted, re_died=again, note=note)

    def _book(self, group: UnitGroup, stats: Stats, edits: list[Edit]) -> None:
        """Ages and who was recycled when: what the next events go by."""
        slots = [slot for edit in edits for slot in edit.slots]
        if stats.samples and stats.finite:
            self._newborn[group.name] &= ~stats.dead
        self._newborn[group.name][slots] = True
        parent = self._parent[group.name]
        parent[torch.isin(parent, torch.tensor(slots, dtype=torch.long))] = -1  # the parent itself is another unit now
        for edit in edits:
            if isinstance(edit, (Split, Reset)) and not resizes(edit):
                parent[list(edit.slots)] = torch.tensor(edit.parents or -1, dtype=torch.long)
        self._recycled_at[group.name][slots] = self._windows
        self.tracker.born[group.name][slots] = self.tracker.passes
        if any(map(resizes, edits)):
            self._renumber(group, edits)

    def _renumber(self, group: UnitGroup, edits: list[Edit]) -> None:
        """Units have other numbers now, and newborns stand behind them."""
        width = len(self._parent[group.name])
        gone = {slot for edit in edits if resizes(edit) for slot in edit.slots}
        order = [unit for unit in range(width) if unit not in gone]
        place = torch.full((width,), -1)
        place[order] = torch.arange(len(order))
        parents: list[int] = []
        for edit in edits:
            if resizes(edit) and isinstance(edit, (Grow, Split)):
                born = len(edit.parents) if isinstance(edit, Split) else edit.count
                parents += edit.parents or [-1] * born
        old = torch.tensor([*order, *[-1] * len(parents)])
        newborn = old < 0
        for books, value in ((self._recycled_at, self._windows), (self._newborn, True)):
            kept_values = books[group.name][old.clamp_min(0)]
            books[group.name] = torch.where(newborn, torch.full_like(kept_values, value), kept_values)
        parent = torch.cat([self._parent[group.name][order], torch.tensor(parents, dtype=torch.long)])
        self._parent[group.name] = torch.where(parent < 0, parent, place[parent.clamp_min(0)])
        self._firing.pop(group.name, None)
        self.tracker.resized(group, old.tolist())

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Windows, ages, books and the generator, as plain tensors and numbers."""
        return {
            "events": self.events,
            "windows": self._windows,
            "tracker": self.tracker.state_dict(),
            "recycled_at": {k: v.clone() for k, v in self._recycled_at.items()},
            "newborn": {k: v.clone() for k, v in self._newborn.items()},
            "parent": {k: v.clone() for k, v in self._parent.items()},
            "generator": self.generator.get_state(),
            "method": self.method.state_dict() if hasattr(self.method, "state_dict") else None,
            "batch": _moved(self._batch, torch.device("cpu")),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to other groups.
        """
        self.tracker.load_state_dict(state["tracker"])
        self.events, self._windows = int(state["events"]), int(state["windows"])
        self._recycled_at = {k: v.clone() for k, v in state["recycled_at"].items()}
        self._newborn = {k: v.clone() for k, v in state["newborn"].items()}
        self._parent = {k: v.clone() for k, v in state["parent"].items()}
        self.generator.set_state(state["generator"])
        if hasattr(self.method, "load_state_dict") and state["method"] is not None:
            self.method.load_state_dict(state["method"])
        tensors = [t for t in self.graph.module.parameters()]
        self._batch = _moved(state["batch"], tensors[0].device) if tensors else state["batch"]


def _moved(value: Any, device: torch.device) -> Any:
    """Nested tensors on another device."""
    return _mapped(value, lambda tensor: tensor.to(device))


def _detached(value: Any) -> Any:
    """Nested tensors without the graphs that they came from."""
    return _mapped(value, Tensor.detach)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def _check_method(method: Any) -> None:
    if isinstance(method, type) or not callable(method):
        raise TypeError(f"a method is an object called with (group, stats), got {method!r}. Pass ReDo(), not ReDo")
    known = [f.name for f in fields(Stats)] + [k for k, v in vars(Stats).items() if isinstance(v, property)]
    for name in getattr(method, "needs", ()):
        if name not in known:
            raise ValueError(
                f"{type(method).__name__} needs {name!r}, no such statistic: {did_you_mean(str(name), known)}"
            )
    if not hasattr(method, "needs"):
        raise TypeError(f"{type(method).__name__} must name the statistics it reads in `needs`; () if none")
