"""Observe, decide, apply, report: the one place that knows both statistics and surgery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.anchor import Anchor
from recycle.books import Books
from recycle.deepening import Insertion
from recycle.editing import Editor
from recycle.edits import Edit
from recycle.folding import Examples
from recycle.fresh import Init
from recycle.graph import Graph, NotRecyclable, UnitGroup
from recycle.interventions import Deepen, Inject, Intervention
from recycle.jumps import Jumps
from recycle.kinds import check_arguments
from recycle.layers import intervene, layers_of
from recycle.methods import Method, NetworkMethod
from recycle.methods.together import check_method, check_together
from recycle.mistakes import mistakes_of
from recycle.ranks import NO_RESIZE, ranks_of
from recycle.remodelling import Remodelling, each_asked_for, renewed
from recycle.report import GroupReport, Report, after, before
from recycle.stats import Stats
from recycle.surgery import check_holders
from recycle.targets import SoftTargets
from recycle.track import Tracker

AnyMethod: TypeAlias = Method | NetworkMethod


_NO_EXAMPLES = ": pass examples=..., a function that returns outputs, losses and targets"


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
        method: decides what to do; see :data:`recycle.METHODS`. Several in a list, of which one may edit units.
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
        probe: runs the network on a batch of one's own, ``lambda: net(x)``: reports then say how far events move the
            output, see :attr:`Report.jumps`; six passes over that batch an event. None: they do not.
        loss: the loss of a batch, a scalar, for births that try new units out (firefly; gradmax where it has no closed
            form): ``lambda: loss(net(x), y)``. It should be the same batch throughout one event.
        examples: runs the network and returns outputs, losses and targets, for a method that sees where the network
            is wrong and was not built with a function of its own, see :data:`recycle.folding.Examples`. It may raise
            :class:`recycle.NotRecyclable`: then nothing is done, and the report says why.
        process_group: of data-parallel training, where every rank has a recycler of its own, built alike: each event
            looks at what all ranks saw, and makes the same edits on each. All must then build it, and call
            :meth:`step`, :meth:`observe` and :meth:`report`, together. See :mod:`recycle.ranks`.
    """

    def __init__(
        self,
        graph: Graph,
        method: AnyMethod | Sequence[AnyMethod],
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
        probe: Callable[[], Any] | None = None,
        loss: Callable[[], Tensor] | None = None,
        examples: Examples | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_arguments(
            Recycler.__init__, "Recycler", graph=graph, init=init, generator=generator, warmup=warmup,
            cooldown=cooldown, cap=cap, sample_every=sample_every, certify=certify, probe=probe, loss=loss,
            examples=examples,
        )  # fmt: skip
        check_holders(optimizers, targets)
        self.method = method
        for each in self.methods:
            check_method(each)
        check_together(self.methods)
        if warmup < 0 or cooldown < 0 or not 0 < cap <= 1:
            raise ValueError(
                "a Recycler needs warmup >= 0 (updates), cooldown >= 0 (events) and 0 < cap <= 1, "
                f"got warmup={warmup}, cooldown={cooldown}, cap={cap}"
            )
        self.graph = graph
        self.optimizers = tuple(optimizers)
        self.targets = tuple(targets)
        self.init = init
        self.generator = generator or torch.Generator().manual_seed(0)
        self.warmup, self.cooldown, self.cap = warmup, cooldown, cap
        self._sample_every = sample_every
        self._ranks = ranks_of(process_group, graph.module, self.optimizers, self.targets, self.needs)
        self.tracker = self._watching(graph)
        self.loss = loss
        self.examples = examples
        self.certify = certify
        self.insertions: list[Insertion] = []
        """The hidden layers that this recycler has inserted, in order."""
        self.deepened = 0
        """Events at which hidden layers were inserted, those before a :meth:`load_state_dict` included."""
        self.events = 0
        self._books = Books(graph)
        self._soft = SoftTargets(graph.module, self.targets)
        self._recorded: dict[str, tuple[int, float | Tensor]] = {}  # how often, and the sum
        self._listening = False
        self._anchors = self._anchored()
        if probe is not None and not self.optimizers:
            raise ValueError("a probe counts updates by optimizer steps: pass optimizers=[...]")
        self._jumps = None if probe is None else Jumps(graph.module, probe)
        self._jump_handles: list[Any] = []
        if self._ranks is not None:
            named = [type(each).__name__ for each in self.methods]
            options = {"method": named, "warmup": warmup, "cooldown": cooldown, "cap": cap}
            self._ranks.begin_alike(graph, options | {"sample_every": sample_every}, self.generator)

    def _watching(self, graph: Graph) -> Tracker:
        needs = self.needs
        return Tracker(
            graph,
            optimizers=self.optimizers,
            sample_every=self._sample_every,
            firing="silence" in needs or "rarity" in needs,
            sample="sample" in needs,
            inputs="inputs" in needs,
            junction="junction" in needs,
            growth="growth" in needs,
            shared=self._ranks is not None,
        )

    @property
    def methods(self) -> tuple[AnyMethod, ...]:
        """Its methods, in the order in which they act."""
        return tuple(self.method) if isinstance(self.method, (list, tuple)) else (self.method,)  # type: ignore[return-value]

    # -- observing -----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Watch from now on until :meth:`detach`; a second call does nothing."""
        self.tracker.attach()
        self._soft.attach()
        self._attach_to_optimizers()

    def detach(self) -> None:
        """Stop watching; what was seen stays."""
        for anchor in self._anchors:
            anchor.detach()
        for handle in self._jump_handles:
            handle.remove()
        self._jump_handles.clear()
        self.tracker.detach()
        self._soft.detach()

    def _attach_to_optimizers(self) -> None:
        """Behind the tracker, which reads the gradients of the loss alone."""
        for anchor in self._anchors:
            anchor.attach()
        if self._jumps is not None and not self._jump_handles:
            self._jump_handles.append(self.optimizers[0].register_step_post_hook(self._look_again))

    def _look_again(self, *_: Any) -> None:
        assert self._jumps is not None
        self._jumps.after_update(self.tracker.passes)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch inside the block, round forward and backward; ``optimizer.step()`` may stand outside it."""
        before, self._listening = self._listening, True
        attached = self._soft.attached
        self._soft.attach()
        try:
            with self.tracker.listening():
                self._attach_to_optimizers()
                yield
        finally:
            self._listening = before
            if not attached:
                self._soft.detach()

    # -- deciding ------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """The health of the current window; nothing is edited, and the window goes on."""
        return self._together("report()", self._look, keep_window=True)

    def _look(self) -> Report:
        groups = {}
        certified = self._certified()
        for group in self.graph:
            stats = self.tracker.stats(group)
            groups[group.name] = self._report(group, stats, self._why_unseen(group, stats), certified)
        return Report(self.events, groups)

    def observe(self, *, keep_window: bool = False) -> Report:
        """Like :meth:`step` without the edits: report, keep the books, begin a new window (or keep this one)."""
        check_arguments(Recycler.observe, "observe", keep_window=keep_window)
        act = partial(self._event, edit=False, keep_window=keep_window)
        return self._together("observe()", act, keep_window=keep_window)

    def step(self) -> Report:
        """Decide and apply, between two updates; then begin a new window.

        Raises:
            NotRecyclable: called inside :meth:`listening`, where a backward pass may be pending.
        """
        return self._together("step()", partial(self._event, edit=True, keep_window=False), keep_window=False)

    def _together(self, doing: str, act: Callable[[], Report], *, keep_window: bool) -> Report:
        """Do it: with what all ranks saw, where there are several."""
        if self._ranks is None:
            return act()
        books = {"events": self.events, "windows that have ended": self._books.windows}
        return self._ranks.event(
            doing,
            act,
            tracker=self.tracker,
            recorded=self._recorded,
            books=books,
            generator=self.generator,
            keep_window=keep_window,
        )

    def record(self, name: str, value: float | Tensor) -> None:
        """Hand in what the training loop measures itself, a loss say, for methods that watch it.

        Methods read the mean over all calls since the last event, in :attr:`recycle.stats.Stats.recorded`.

        Args:
            name: of the quantity.
            value: a number, or a tensor that holds one; a tensor is not waited for.
        """
        check_arguments(Recycler.record, "record", name=name)
        if not isinstance(value, (int, float, np.number)) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise TypeError(f"record takes a number, or a tensor that holds one, got {name}={value!r}")
        count, total = self._recorded.get(name, (0, 0.0))
        self._recorded[name] = count + 1, total + (value.detach() if isinstance(value, Tensor) else value)

    def histograms(self) -> dict[str, Tensor]:
        """Per-unit values of the latest report: ``{"<group>/age": (width,), "<group>/firing_rate": (width,)}``."""
        found = {}
        for group in self.graph:
            found[f"{group.name}/age"] = (self.tracker.passes - self.tracker.born[group.name]).float()
            if group.name in self._books.firing:
                found[f"{group.name}/firing_rate"] = self._books.firing[group.name].float()
        return found

    def _event(self, *, edit: bool, keep_window: bool) -> Report:
        if edit and self._listening:
            raise NotRecyclable("step() inside listening(): a backward pass may be pending. Call it after the block")
        names = [group.name for group in self.graph]
        found, edits, all_stats = {}, [], {}
        jumps: dict[int, float] = {}
        if self._jumps is not None:
            jumps = self._jumps.so_far if keep_window else self._jumps.before_event(self.tracker.passes)
        certified = self._certified()
        updates, editor = self.tracker.updates, self._editor()
        for group in self._in_order() if edit else self.graph:
            stats = all_stats[group.name] = self._stats(group)
            note = self._why_not(group, stats)
            seen = self._report(group, stats, note, certified)
            made: list[Edit] = []
            if not note and edit:
                made, note = editor.edit(group, stats)
            if made and not group.exact:
                note = "; ".join(filter(None, (f"approximate: {group.why}", note)))
            edits += [(group.name, edit) for edit in made]
            rewritten = [edit for edit in made if getattr(edit, "weights", True)]
            found[group.name] = after(seen, stats, rewritten, note, group.width)
            self._book(group, stats, rewritten)
        groups = {name: found[name] for name in names}
        interventions, note = self._intervene(all_stats, updates) if edit else ([], "")
        for name in renewed(self.graph, interventions):
            self.tracker.born[name].fill_(self.tracker.passes)
            self._books.forget(name)
            groups[name] = replace(groups[name], dead_after=0.0)
        if not keep_window:
            self.tracker.clear()
            self._recorded.clear()
            self._books.windows += 1
        self.events += 1
        if self._jumps is not None and not keep_window:
            jumps = self._jumps.after_event() | jumps
        return Report(self.events, groups, tuple(edits), tuple(interventions), note, jumps)

    def _stats(self, group: UnitGroup) -> Stats:
        recorded = {name: float(total) / count for name, (count, total) in self._recorded.items()}
        stats = self.tracker.stats(group, self.generator, self.events + 1, recorded)
        if self._ranks is not None:
            stats = self._ranks.agreed(group.name, stats)
        return self._with_mistakes(group, stats)

    def _in_order(self) -> list[UnitGroup]:
        """The groups in the order in which to edit them: a method that chooses among them looks at all first."""
        groups = list(self.graph)
        for method in self.methods:
            if hasattr(method, "survey"):
                every = {group.name: (group, self._stats(group)) for group in groups}
                seen = {name: stats for name, (group, stats) in every.items() if not self._why_not(group, stats)}
                groups = [self.graph[name] for name in method.survey(groups, seen)]
        return groups

    def _with_mistakes(self, group: UnitGroup, stats: Stats) -> Stats:
        """The same statistics with the means to see where the network is wrong, for a method that looks there."""
        for method in self.methods:
            if callable(method) and "mistakes" in method.needs:
                examples = getattr(method, "examples", None) or self.examples
                return stats if examples is None else replace(stats, mistakes=partial(mistakes_of, group, examples))
        return stats

    def _intervene(self, stats: Mapping[str, Stats], updates: int) -> tuple[list[Intervention], str]:
        """What the methods for whole networks ask for, each all or none."""
        methods = [method for method in self.methods if hasattr(method, "on_networks")]
        if not methods:
            return [], ""
        if not updates:
            return [], "no training pass was seen since the last event"
        if self.tracker.passes < self.warmup:
            return [], f"warming up: {self.tracker.passes} of {self.warmup} updates"
        return each_asked_for(methods, lambda: layers_of(self.graph, self.deepened), stats, self._change_layers)

    def _change_layers(self, wanted: Intervention) -> None:
        how: dict[str, Any] = {"optimizers": self.optimizers, "generator": self.generator, "init": self.init}
        if not isinstance(wanted, (Inject, Deepen)):
            intervene(wanted, self.graph, targets=self.targets, **how)
            return
        if self._ranks is not None:
            raise NotRecyclable(NO_RESIZE)
        remodelling = Remodelling(self.graph, self.tracker, self._books)
        attached = self.tracker.attached
        self.tracker.detach()
        try:
            self.insertions += remodelling.make(wanted, [module for module, _ in self.targets], **how)
            self.deepened += isinstance(wanted, Deepen)
            self.graph, self.tracker, self._books = remodelling.follow(self._watching)
        finally:
            if attached:
                self.tracker.attach()

    def _anchored(self) -> list[Anchor]:
        """What pulls at every optimizer step, and where to."""
        methods = [method for method in self.methods if hasattr(method, "at_updates")]
        if methods and not self.optimizers:
            raise ValueError(f"{type(methods[0]).__name__} acts at every optimizer step: pass optimizers=[...]")
        pulls = [pull for method in methods for pull in method.at_updates([layers_of(self.graph)])]
        return [Anchor(pull, self.graph.module, self.optimizers) for pull in pulls]

    def _why_unseen(self, group: UnitGroup, stats: Stats) -> str:
        if self.tracker.outdated:
            return self.tracker.outdated
        if group.name in self.tracker.unobserved:
            return f"unobserved: {self.tracker.unobserved[group.name]}"
        if not stats.samples:
            return "no training pass was seen since the last event"
        return ""

    @cached_property
    def needs(self) -> list[str]:
        """Statistics that the methods of units read."""
        return list(dict.fromkeys(name for method in self.methods if callable(method) for name in method.needs))

    def _why_not(self, group: UnitGroup, stats: Stats) -> str:
        unseen = self._why_unseen(group, stats)
        if unseen:
            return unseen
        if not stats.finite:
            return "NaN or infinite activations were seen: no edit is based on this window"
        if self.tracker.passes < self.warmup:
            return f"warming up: {self.tracker.passes} of {self.warmup} updates"
        for method in self.methods:
            if getattr(method, "lacks", ""):
                return str(getattr(method, "lacks", ""))
        missing = [n for n in self.needs if _unseen(getattr(stats, n))]
        why = self.tracker.why_no_growth(group) if "growth" in missing else ""
        why += _NO_EXAMPLES if "mistakes" in missing else ""
        return f"needs {', '.join(missing)}, which was not observed{why}" if missing else ""

    def _editor(self) -> Editor:
        fixed = "" if self._ranks is None else NO_RESIZE
        if self._anchors:
            fixed = "units cannot come or go while weights are pulled to where they began (l2_init)"
        return Editor(
            methods=[method for method in self.methods if callable(method)],
            optimizers=self.optimizers,
            targets=self.targets,
            peak=self._peak if self._soft.modules else None,
            books=self._books,
            cooldown=self.cooldown,
            cap=self.cap,
            init=self.init,
            generator=self.generator,
            loss=self.loss,
            fixed=fixed,
            unwatched=self._unwatched,
        )

    def _peak(self, group: UnitGroup) -> Tensor | None:
        """Largest |output| of a group's units in Polyak targets, ``(width,)``; None where no batch was seen."""
        highest = self._soft.peak(group)
        return highest if self._ranks is None else self._ranks.largest(highest, f"the targets of {group.name}")

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        kept = self._soft.attached
        self._soft.detach()
        try:
            with self.tracker.unwatched():
                yield
        finally:
            if kept:
                self._soft.attach()

    def _certified(self) -> dict[str, float]:
        """The fraction of certified units of each group, if there is anything to tell it by."""
        proofs = {} if self.certify is None or self.tracker.outdated else self.certify()
        return {name: float(units.double().mean()) for name, units in proofs.items()}

    def _report(self, group: UnitGroup, stats: Stats, note: str, certified: Mapping[str, float]) -> GroupReport:
        """Health as it is."""
        self._books.saw(group, stats)
        newborn, parent = self._books.newborn[group.name], self._books.parent[group.name]
        return before(group, stats, newborn, parent, note, certified.get(group.name, math.nan))

    def _book(self, group: UnitGroup, stats: Stats, edits: list[Edit]) -> None:
        """Ages and who was recycled when: what the next events go by."""
        order = self._books.enter(group, stats, edits)
        self.tracker.reborn(group, [slot for edit in edits for slot in edit.slots])
        if order is not None:
            self.tracker.resized(group, order)

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Windows, ages, books and the generator, as plain tensors and numbers.

        In data-parallel training the windows are this rank's own, and the rest is the same on all: save each rank's,
        or right behind a :meth:`step`, when windows are empty, any one of them.
        """
        remembered = [each.state_dict() if hasattr(each, "state_dict") else None for each in self.methods]
        return {
            "events": self.events,
            "deepened": self.deepened,
            "tracker": self.tracker.state_dict(),
            **self._books.state(),
            "generator": self.generator.get_state(),
            "method": remembered[0] if len(remembered) == 1 else remembered,
            "jumps": None if self._jumps is None else self._jumps.state_dict(),
            "anchors": [anchor.state_dict() for anchor in self._anchors],
            "batch": self._soft.state(),
            "recorded": {name: (count, float(total)) for name, (count, total) in self._recorded.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken, or change nothing.

        Raises:
            ValueError: the state belongs to other groups, or is none.
        """
        before = self.state_dict()
        try:
            self._load(state)
        except Exception as error:
            self._load(before)
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"the state is not what state_dict() of such a Recycler returned: {what}") from error

    def _load(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.events = int(state["events"])
        self.deepened = int(state.get("deepened", 0))
        self._books.load(state)
        self.generator.set_state(state["generator"])
        remembered = [state["method"]] if len(self.methods) == 1 else state["method"]
        for each, kept_of_it in zip(self.methods, remembered, strict=True):
            if hasattr(each, "load_state_dict") and kept_of_it is not None:
                each.load_state_dict(kept_of_it)
        for anchor, initial in zip(self._anchors, state["anchors"], strict=True):
            anchor.load_state_dict(initial)
        self._soft.load(state["batch"])
        self._recorded = dict(state.get("recorded", {}))
        if self._jumps is not None and state["jumps"] is not None:
            device = next((t.device for t in self.graph.module.parameters()), torch.device("cpu"))
            self._jumps.load_state_dict(state["jumps"], device)


def _unseen(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and bool(value.isnan().all()))
