"""Observe, decide, apply, report: the one place that knows both statistics and surgery."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle import metrics
from recycle.anchor import Anchor
from recycle.deepening import Insertion, deepen
from recycle.edits import Edit, Fold, Grow, Prune, Reset, Split, kept, renumbered, resizes
from recycle.fresh import Init
from recycle.graph import Graph, NotRecyclable, UnitGroup
from recycle.injection import inject
from recycle.interventions import Deepen, Inject, Intervention, Renew
from recycle.jumps import Jumps
from recycle.kinds import check_arguments
from recycle.layers import intervene, layers_of
from recycle.methods import Method, NetworkMethod
from recycle.methods.together import check_together
from recycle.mistakes import mistakes_of
from recycle.names import did_you_mean
from recycle.nursery import answers_of
from recycle.proof import difference, tolerance
from recycle.report import GroupReport, Report, after
from recycle.stats import Stats
from recycle.surgery import all_or_none, apply, check, check_holders
from recycle.track import Tracker, peak

AnyMethod: TypeAlias = Method | NetworkMethod

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
    ) -> None:
        check_arguments(
            Recycler.__init__, "Recycler", graph=graph, init=init, generator=generator, warmup=warmup,
            cooldown=cooldown, cap=cap, sample_every=sample_every, certify=certify, probe=probe, loss=loss,
        )  # fmt: skip
        check_holders(optimizers, targets)
        self.method = method
        for each in self.methods:
            _check_method(each)
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
        self.tracker = self._watching(sample_every)
        self.loss = loss
        self.certify = certify
        self.insertions: list[Insertion] = []
        """The hidden layers that this recycler has inserted, in order."""
        self.deepened = 0
        """Events at which hidden layers were inserted, those before a :meth:`load_state_dict` included."""
        self.events = 0
        self._windows = 0  # ended: a look that keeps its window brings no cooldown nearer to its end
        self._open_books()
        self._recorded: dict[str, tuple[int, float | Tensor]] = {}  # how often, and the sum
        self._listening = False
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: Any = None
        self._anchors = self._anchored()
        if probe is not None and not self.optimizers:
            raise ValueError("a probe counts updates by optimizer steps: pass optimizers=[...]")
        self._jumps = None if probe is None else Jumps(graph.module, probe)
        self._jump_handles: list[Any] = []

    def _watching(self, sample_every: int) -> Tracker:
        needs = self.needs
        return Tracker(
            self.graph,
            optimizers=self.optimizers,
            sample_every=sample_every,
            firing="silence" in needs or "rarity" in needs,
            sample="sample" in needs,
            inputs="inputs" in needs,
            junction="junction" in needs,
            growth="growth" in needs,
        )

    def _open_books(self) -> None:
        self._recycled_at = {g.name: torch.full((g.width,), -1, dtype=torch.long) for g in self.graph}
        self._newborn = {g.name: torch.zeros(g.width, dtype=torch.bool) for g in self.graph}
        self._parent = {g.name: torch.full((g.width,), -1, dtype=torch.long) for g in self.graph}
        self._firing: dict[str, Tensor] = {}

    @property
    def methods(self) -> tuple[AnyMethod, ...]:
        """Its methods, in the order in which they act."""
        return tuple(self.method) if isinstance(self.method, (list, tuple)) else (self.method,)  # type: ignore[return-value]

    # -- observing -----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Watch from now on until :meth:`detach`; a second call does nothing."""
        self.tracker.attach()
        self._attach_to_module()
        self._attach_to_optimizers()

    def detach(self) -> None:
        """Stop watching; what was seen stays."""
        for anchor in self._anchors:
            anchor.detach()
        for handle in self._jump_handles:
            handle.remove()
        self._jump_handles.clear()
        self.tracker.detach()
        self._detach_from_module()

    def _attach_to_optimizers(self) -> None:
        """Behind the tracker, which reads the gradients of the loss alone."""
        for anchor in self._anchors:
            anchor.attach()
        if self._jumps is not None and not self._jump_handles:
            self._jump_handles.append(self.optimizers[0].register_step_post_hook(self._look_again))

    def _look_again(self, *_: Any) -> None:
        assert self._jumps is not None
        self._jumps.after_update(self.tracker.passes)

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
                self._attach_to_optimizers()
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
            if group.name in self._firing:
                found[f"{group.name}/firing_rate"] = self._firing[group.name].float()
        return found

    def _event(self, *, edit: bool, keep_window: bool) -> Report:
        names = [group.name for group in self.graph]
        found, edits, all_stats = {}, [], {}
        jumps: dict[int, float] = {}
        if self._jumps is not None:
            jumps = self._jumps.so_far if keep_window else self._jumps.before_event(self.tracker.passes)
        certified = self._certified()
        updates = self.tracker.updates
        for group in self._in_order() if edit else self.graph:
            stats = all_stats[group.name] = self._stats(group)
            note = self._why_not(group, stats)
            seen = self._report(group, stats, note, certified)
            made: list[Edit] = []
            if not note and edit:
                made, note = self._edit(group, stats)
            if made and not group.exact:
                note = "; ".join(filter(None, (f"approximate: {group.why}", note)))
            edits += [(group.name, edit) for edit in made]
            rewritten = [edit for edit in made if getattr(edit, "weights", True)]
            found[group.name] = after(seen, stats, rewritten, note, group.width)
            self._book(group, stats, rewritten)
        groups = {name: found[name] for name in names}
        interventions, note = self._intervene(all_stats, updates) if edit else ([], "")
        for name in self._renewed(interventions):
            groups[name] = replace(groups[name], dead_after=0.0)
        if not keep_window:
            self.tracker.clear()
            self._recorded.clear()
            self._windows += 1
        self.events += 1
        if self._jumps is not None and not keep_window:
            jumps = self._jumps.after_event() | jumps
        return Report(self.events, groups, tuple(edits), tuple(interventions), note, jumps)

    def _stats(self, group: UnitGroup) -> Stats:
        recorded = {name: float(total) / count for name, (count, total) in self._recorded.items()}
        stats = self.tracker.stats(group, self.generator, self.events + 1, recorded)
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
        """The same statistics with the means to see where the network is wrong, for a method that knows examples."""
        for method in self.methods:
            examples = getattr(method, "examples", None)
            if examples is not None and "mistakes" in method.needs:
                return replace(stats, mistakes=partial(mistakes_of, group, examples))
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
        made: list[Intervention] = []
        notes = []
        taken: set[str] = set()
        for method in methods:
            for wanted in method.on_networks([layers_of(self.graph, self.deepened)], stats):
                twice = sorted(taken & set(wanted.layers))
                if twice:
                    notes.append(f"{type(wanted).__name__} of {', '.join(twice)}: changed at this event already")
                    continue
                try:
                    self._change_layers(wanted)
                except NotRecyclable as error:
                    notes.append(str(error))
                    continue
                made.append(wanted)
                taken |= set(wanted.layers)
        return made, "; ".join(notes)

    def _change_layers(self, wanted: Intervention) -> None:
        how: dict[str, Any] = {"optimizers": self.optimizers, "generator": self.generator, "init": self.init}
        if not isinstance(wanted, (Inject, Deepen)):
            intervene(wanted, self.graph, targets=self.targets, **how)
            return
        if self.graph.again is None:
            raise NotRecyclable("a network with other layers must be traced again: pass what recycle.trace returned")
        names = {group.tensor(axis.name): group.name for group in self.graph for axis in group.incoming}
        others = set(self.graph.module.parameters()) - names.keys()
        attached = self.tracker.attached
        self.tracker.detach()  # its hooks may stand on layers that go
        try:
            if isinstance(wanted, Inject):
                inject(self.graph, targets=[module for module, _ in self.targets], **how)
            else:
                self.insertions += deepen(wanted, self.graph, targets=[module for module, _ in self.targets], **how)
                self.deepened += 1
            self._begin_anew(self.graph.again(), names, others)
        finally:
            if attached:
                self.tracker.attach()

    def _begin_anew(self, found: Graph, names: Mapping[Tensor, str], others: Collection[Tensor]) -> None:
        """Watch the groups of a network whose layers are others now: those watched before, and those that are new.

        ``names``: what the groups watched before were called, by their tensors; ``others``: parameters of no such
        group.
        """
        owned = {group.name: [group.tensor(axis.name) for axis in group.incoming] for group in found}
        self.graph = found.select([name for name, tensors in owned.items() if not any(t in others for t in tensors)])
        before = self.tracker
        self.tracker = self._watching(before.sample_every)
        self.tracker.count_on(before.state_dict())
        books = self._recycled_at, self._newborn, self._parent
        self._open_books()
        for group in self.graph:
            old = next((names[tensor] for tensor in owned[group.name] if tensor in names), None)
            if old is not None and len(before.born[old]) == group.width:
                self.tracker.born[group.name] = before.born[old]
                for now, then in zip((self._recycled_at, self._newborn, self._parent), books, strict=True):
                    now[group.name] = then[old]

    def _renewed(self, interventions: Sequence[Intervention]) -> list[str]:
        """Groups whose layers begin anew, and with them their units' ages."""
        layers = {path for i in interventions if isinstance(i, Renew) and i.weights for path in i.layers}
        found = [g for g in self.graph if any(axis.name.rpartition(".")[0] in layers for axis in g.incoming)]
        for group in found:
            self.tracker.born[group.name].fill_(self.tracker.passes)
            self._newborn[group.name].fill_(False)
            self._parent[group.name].fill_(-1)
        return [group.name for group in found]

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

    @property
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
        return f"needs {', '.join(missing)}, which was not observed{why}" if missing else ""

    def _edit(self, group: UnitGroup, stats: Stats) -> tuple[list[Edit], str]:
        """Make the method's edits of one group, all or none."""
        held: dict[str, Any] = {"optimizers": self.optimizers, "targets": self.targets}
        try:
            wanted = [edit for method in self.methods if callable(method) for edit in method(group, stats)]
            for edit in wanted:
                check(edit, group, **held)
            allowed, note = self._allowed(group, wanted)
            edits = [edit for edit in (e.only(allowed) for e in wanted) if edit.slots or resizes(edit)]
            edits = [edit for edit in edits if not (isinstance(edit, Prune) and not edit.units)]
            if edits and not self.optimizers:
                warnings.warn(_NO_OPTIMIZER, stacklevel=4)
            if any(map(resizes, edits)):
                if self._anchors:
                    return [], "units cannot come or go while weights are pulled to where they began (l2_init)"
                with self._unwatched():
                    before = answers_of(group) if any(map(_may_move_the_output, edits)) else []
                    made, note = self._resize(group, edits, note, stats)
                    moved = difference(before, answers_of(group)) if before and made else 0.0
                if moved > tolerance(before):
                    note = "; ".join(filter(None, (f"the output moved by {moved:.1e} of its largest value", note)))
                return made, note
            with all_or_none(group, **held):
                for edit in edits:
                    apply(edit, group, **held, generator=self.generator, init=self.init, inputs=stats.inputs)
        except NotRecyclable as error:
            return [], str(error)
        return edits, note

    def _resize(self, group: UnitGroup, edits: list[Edit], note: str, stats: Stats) -> tuple[list[Edit], str]:
        """Make edits of which some resize, each all or none. Units keep their numbers until the last is made."""
        now = {unit: unit for unit in range(group.width)}
        made: list[Edit] = []
        how: dict[str, Any] = {"generator": self.generator, "init": self.init, "inputs": stats.inputs}
        how |= {"junction": stats.junction or "no pass was sampled", "loss": self.loss}
        for edit in edits:
            try:
                order = kept(renumbered(edit, now), group.width)
                apply(renumbered(edit, now), group, optimizers=self.optimizers, targets=self.targets, **how)
            except KeyError as error:
                return made, f"{type(edit).__name__} names unit {error}, which an earlier edit of the event removed"
            except NotRecyclable as error:
                return made, str(error)
            made.append(edit)
            place = {old: new for new, old in enumerate(order) if old >= 0}
            now = {unit: place[at] for unit, at in now.items() if at in place}
        return made, note

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Births may run the loss, which is no training pass."""
        kept = self._handle is not None
        self._detach_from_module()
        try:
            with self.tracker.unwatched():
                yield
        finally:
            if kept:
                self._attach_to_module()

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
        proofs = {} if self.certify is None or self.tracker.outdated else self.certify()
        return {name: float(units.double().mean()) for name, units in proofs.items()}

    def _report(self, group: UnitGroup, stats: Stats, note: str, certified: Mapping[str, float]) -> GroupReport:
        """Health as it is."""
        health: dict[str, Any] = {"certified": certified.get(group.name, math.nan)}
        again = unparted = 0
        resemblance = lifetime = math.nan
        if stats.samples and stats.finite:
            self._firing[group.name] = stats.firing_rate
            dead_again = self._newborn[group.name] & stats.dead
            again = int(dead_again.sum())
            lifetime = float(stats.age[dead_again].mean()) if again else math.nan
            seen = self.tracker.latest(group)
            children = (self._parent[group.name] >= 0).nonzero()[:, 0]
            cosines = metrics.resemblance(group, children, self._parent[group.name][children])
            unparted = int((cosines > metrics.TWIN).sum())
            resemblance = float(cosines.mean()) if len(children) else math.nan
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
        return GroupReport(group.width, stats.samples, **health, width_after=group.width, unparted=unparted,
                           re_died=again, resemblance=resemblance, re_death_age=lifetime, note=note)  # fmt: skip

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
        self.tracker.reborn(group, slots)
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
        remembered = [each.state_dict() if hasattr(each, "state_dict") else None for each in self.methods]
        return {
            "events": self.events,
            "windows": self._windows,
            "deepened": self.deepened,
            "tracker": self.tracker.state_dict(),
            "recycled_at": {k: v.clone() for k, v in self._recycled_at.items()},
            "newborn": {k: v.clone() for k, v in self._newborn.items()},
            "parent": {k: v.clone() for k, v in self._parent.items()},
            "firing": {k: v.clone() for k, v in self._firing.items()},
            "generator": self.generator.get_state(),
            "method": remembered[0] if len(remembered) == 1 else remembered,
            "jumps": None if self._jumps is None else self._jumps.state_dict(),
            "anchors": [anchor.state_dict() for anchor in self._anchors],
            "batch": moved(self._batch, torch.device("cpu")),
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
            if isinstance(error, ValueError):
                raise
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the state is not what state_dict() of such a Recycler returned ({what})") from error

    def _load(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.events, self._windows = int(state["events"]), int(state["windows"])
        self.deepened = int(state.get("deepened", 0))
        self._recycled_at = {k: v.clone() for k, v in state["recycled_at"].items()}
        self._newborn = {k: v.clone() for k, v in state["newborn"].items()}
        self._parent = {k: v.clone() for k, v in state["parent"].items()}
        self._firing = {k: v.clone() for k, v in state.get("firing", {}).items()}
        self.generator.set_state(state["generator"])
        remembered = [state["method"]] if len(self.methods) == 1 else state["method"]
        for each, kept_of_it in zip(self.methods, remembered, strict=True):
            if hasattr(each, "load_state_dict") and kept_of_it is not None:
                each.load_state_dict(kept_of_it)
        for anchor, initial in zip(self._anchors, state["anchors"], strict=True):
            anchor.load_state_dict(initial)
        device = next((t.device for t in self.graph.module.parameters()), torch.device("cpu"))
        self._batch = moved(state["batch"], device)
        self._recorded = dict(state.get("recorded", {}))
        if self._jumps is not None and state["jumps"] is not None:
            self._jumps.load_state_dict(state["jumps"], device)


def _may_move_the_output(edit: Edit) -> bool:
    """Whether units come with weights that are not exact by themselves."""
    return bool(edit.birth if isinstance(edit, Grow) else isinstance(edit, Split) and edit.noise)


def _unseen(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and bool(value.isnan().all()))


def moved(value: Any, device: torch.device) -> Any:
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
    if isinstance(method, type) or not (callable(method) or hasattr(method, "on_networks")):
        raise TypeError(f"a method is an object called with (group, stats), got {method!r}. Pass ReDo(), not ReDo")
    known = [f.name for f in fields(Stats)] + [k for k, v in vars(Stats).items() if isinstance(v, property)]
    for name in getattr(method, "needs", ()):
        if name not in known:
            raise ValueError(
                f"{type(method).__name__} needs {name!r}, no such statistic: {did_you_mean(str(name), known)}"
            )
    if not hasattr(method, "needs"):
        raise TypeError(f"{type(method).__name__} must name the statistics it reads in `needs`; () if none")
