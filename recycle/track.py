"""Watch every unit of a network while it trains: hooks that add to a window of per-unit statistics.

Nothing here touches training: hooks only read, draw no random number, leave ``.grad`` alone and never wait for
the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.graph import Axis, Graph, Observer, UnitGroup, of_units, per_channel, per_unit
from recycle.growth_sample import Examples, GrowthSample, Recorder, why_not_sampled
from recycle.junction import Crossing
from recycle.samples import Sample, as_sample, few
from recycle.stats import Gradients, Stats, Window, joined, kept_inputs, largest, wide

_MOMENTS = ("firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum")


class Tracker:
    """Hooks that keep a :class:`Stats` window for each group of a graph.

    Only training passes count (gradients enabled and the layer in training mode), and of those the ones of
    every ``sample_every``-th update. Use it as a context manager, or :meth:`attach` and :meth:`detach`.

    Args:
        graph: what to watch.
        optimizers: their steps are where the gradients of incoming weights are read.
        sample_every: look at the passes of every so many updates; 1 sees all, 8 costs about a percent.
        training_only: False counts every pass, for looking at a network that is not being trained.
        firing: keep the times between each unit's firings as well.
        sample: keep some inputs, pre-activations and gradients of the latest sampled pass as well.
        inputs: keep a part of what the layers read on the latest sampled pass as well.
        junction: keep what the units' layers read, and what their consumers read and need, of that pass as well.
        growth: keep rows that say what a new unit would be worth as well.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        optimizers: Sequence[Optimizer] = (),
        sample_every: int = 8,
        training_only: bool = True,
        firing: bool = False,
        sample: bool = False,
        inputs: bool = False,
        junction: bool = False,
        growth: bool = False,
    ) -> None:
        if sample_every < 1:
            raise ValueError(f"sample_every counts updates and must be at least 1, got {sample_every}")
        self.graph = graph
        self.optimizers = tuple(optimizers)
        self.sample_every = sample_every
        self.training_only = training_only
        self.unobserved: dict[str, str] = {}
        """Groups that no hook can watch, and why: they are never recycled."""
        self.outdated = ""
        """Why this tracker has stopped for good: something else resized the module. "" while all is well."""
        self.passes = 0
        """Updates so far: steps of the first optimizer, or training passes where no optimizer was given."""
        self.born: dict[str, Tensor] = {}
        """The pass at which each unit was last recycled, ``(width,)``."""
        self._windows: dict[str, list[Window]] = {}  # of the consumers' inputs, then of the normalisations'
        self._consumers: dict[str, int] = {}
        self._pre: dict[str, list[Gradients]] = {}
        self._weights: dict[str, Gradients] = {}
        self._sample = sample
        self._latest: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # inputs, pre-activations, gradients
        self._inputs: dict[str, Tensor] | None = {} if inputs else None  # by weight
        self._crossings = {group.name: Crossing(group) for group in graph} if junction else {}
        self._recorders: dict[str, Recorder] = _recorders(graph) if growth else {}
        self._handles: list[Any] = []
        self._step_handles: list[Any] = []
        self._points: list[tuple[nn.Module, Callable[..., None], bool]] = []
        self._shapes: dict[nn.Module, list[torch.Size]] = {}  # of the watched layers' parameters
        self._incoming: list[list[tuple[Gradients, list[tuple[Tensor, int, Tensor | None]]]]] = []
        self._attached = self._paused = False
        self._resumed_at, self._between_pauses = 0, -1  # in updates; tells when the next pause is to be expected
        self._steps = [0] * len(self.optimizers)
        self._root_calls = self._cleared_at = 0
        self._calls: dict[object, int] = {}  # by observation point, where neither steps nor root calls tell updates
        for group in graph:
            self.born[group.name] = torch.zeros(group.width, dtype=torch.long)
            points = group.observers()
            if not points:
                self.unobserved[group.name] = (
                    "a consumer is no Linear, Conv or first or last recurrent layer, so no hook sees what it reads"
                )
            self._windows[group.name] = [Window(firing) for _ in (*points, *_norms(group, points))]
            self._consumers[group.name] = len(points)
            self._pre[group.name] = [Gradients() for _ in group.producers()]
            self._weights[group.name] = Gradients()
        self._measure()

    # -- hooks ---------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the tracker is watching."""
        return self._attached

    def attach(self) -> None:
        """Begin to watch; a second call does nothing."""
        if self.outdated:
            return
        self._attached = True
        self._attach_to_optimizers()
        self._follow()

    def detach(self) -> None:
        """Remove all hooks; what was seen stays."""
        self._attached = self._paused = False
        self._detach(self._handles)
        self._detach(self._step_handles)

    def pause(self) -> None:
        """Take the hooks off the layers where no training pass can come, a rollout say, until :meth:`resume`."""
        self._paused = True
        self._between_pauses = self.passes - self._resumed_at
        if self._handles:
            self._detach(self._handles)

    def resume(self) -> None:
        """End a :meth:`pause`."""
        self._paused = False
        self._resumed_at = self.passes
        self._follow()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Look away from the layers inside the block."""
        self._detach(self._handles)
        try:
            yield
        finally:
            self._follow()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch the layers inside the block only, and optimizer steps from then on.

        Between blocks the network carries no hook, so it can be copied, pickled and evaluated unseen.
        """
        before = self._attached
        self.attach()
        try:
            yield
        finally:
            self._attached = before
            self._follow()

    def _follow(self) -> None:
        """Hooks slow every pass down, so layers carry them only during updates that are sampled."""
        due = not self.optimizers or self.passes % self.sample_every == 0
        wanted = due and self._attached and not self._paused
        if wanted and not self._handles:
            self._attach_to_layers()
        elif self._handles and not wanted:
            self._detach(self._handles)

    def _attach_to_layers(self) -> None:
        if not self._points:
            self._points = list(self._observation_points())
        if not self.optimizers:
            self._handles.append(self.graph.module.register_forward_pre_hook(self._watch_pass))
        for layer, hook, before in self._points:
            if before:
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(layer.register_forward_hook(hook))

    def _observation_points(self) -> Iterator[tuple[nn.Module, Callable[..., None], bool]]:
        """Layer, hook, and whether it watches the input (or else the output)."""
        yield from self._points_of_units()
        for group in self.graph:
            if self._sample and len(group.producers()) == 1 and not group.norms():
                hook = partial(self._watch_producer, self._pre[group.name][0], group.name)
                yield group.producers()[0][0], hook, False
        if self._inputs is not None:
            for name, layer in {axis.name: layer for group in self.graph for layer, axis in group.fed()}.items():
                yield layer, partial(self._keep_input, self._inputs, name), True
        for crossing in self._crossings.values():
            for layer, keep in crossing.points():
                yield layer, partial(self._watch_crossing, keep), False
        for recorder in self._recorders.values():
            yield recorder.producer, partial(self._watch_growth, recorder), False
            for layer, hook in recorder.points():
                yield layer, hook, False

    def _points_of_units(self) -> Iterator[tuple[nn.Module, Callable[..., None], bool]]:
        """Those for moments and gradients; all groups that one layer reads, or makes, share a hook."""
        read: dict[nn.Module, list[tuple[Window, Tensor | None]]] = {}
        made: dict[nn.Module, list[tuple[Gradients, Tensor | None]]] = {}
        for group in self.graph:
            points = group.observers()
            watched = (*points, *_norms(group, points))
            for observer, window in zip(watched, self._windows[group.name], strict=True):
                index = None if observer.whole else observer.index.to(group.tensor(group.incoming[0].name).device)
                layer = group.module.get_submodule(observer.name)
                if observer.at_output:
                    yield layer, partial(self._watch_recurrent, window, index, observer), False
                else:
                    read.setdefault(layer, []).append((window, index))
            for (layer, axis), seen in zip(group.producers(), self._pre[group.name], strict=True):
                made.setdefault(layer, []).append((seen, _columns(axis.index, group.tensor(axis.name), axis.dim)))
        for layer, windows in read.items():
            yield layer, partial(self._watch_input, windows), True
        for layer, gradients in made.items():
            yield layer, partial(self._watch_output, gradients), False

    def _attach_to_optimizers(self) -> None:
        if self._step_handles:
            return
        self._incoming = [list(self._weights_of(optimizer)) for optimizer in self.optimizers]
        for number, optimizer in enumerate(self.optimizers):
            self._step_handles.append(optimizer.register_step_pre_hook(partial(self._watch_step, number)))

    def _weights_of(self, optimizer: Optimizer) -> Iterator[tuple[Gradients, list[tuple[Tensor, int, Tensor | None]]]]:
        """The incoming weights of each group that this optimizer updates: parameter, axis, and the units' entries."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for group in self.graph:
            axes = [(axis, group.tensor(axis.name)) for axis in group.incoming if axis.role == "weight"]
            own = [(w, axis.dim, _columns(axis.index, w, axis.dim)) for axis, w in axes if id(w) in held]
            if own:
                yield self._weights[group.name], own

    @staticmethod
    def _detach(handles: list[Any]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    def __enter__(self) -> Tracker:
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _watch_pass(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self.training_only or (module.training and torch.is_grad_enabled()):
            self._root_calls += 1
            self.passes = max(self.passes, self._root_calls)

    def _due(self, point: object) -> bool:
        """Whether a pass is sampled. Between two optimizer steps all passes are, or none: layers that are called
        twice, and accumulated gradients, are seen whole."""
        if self.optimizers:
            return self.passes % self.sample_every == 0
        if self._root_calls:
            return (self._root_calls - 1) % self.sample_every == 0
        count = self._calls.get(point, 0)  # an entry point other than forward
        self._calls[point] = count + 1
        self.passes = max(self.passes, count + 1)
        return count % self.sample_every == 0

    def _counts(self, layer: nn.Module, value: Any) -> bool:
        """Rollouts, evaluations and target networks run without gradients or in evaluation mode."""
        counts = not self.training_only or (layer.training and torch.is_grad_enabled())
        return counts and isinstance(value, Tensor) and value.numel() > 0 and self._knows(layer)

    def _knows(self, layer: nn.Module) -> bool:
        """Whether a layer is as it was; one that was resized behind the tracker's back ends the watch."""
        now = _shapes(layer)
        if now != self._shapes[layer] and not self.outdated:
            name = next(name for name, module in self.graph.module.named_modules() if module is layer)
            self.outdated = (
                f"{name!r} was resized by something other than this tracker's Recycler "
                f"({_listed(self._shapes[layer])} became {_listed(now)}); trace again and attach a new tracker"
            )
            warnings.warn(f"a tracker stops watching: {self.outdated}", stacklevel=2)
            self.detach()
            self.clear()
        return not self.outdated

    def _measure(self) -> None:
        for group in self.graph:
            points = group.observers()
            names = [observer.name for observer in (*points, *_norms(group, points))]
            layers = [*map(group.module.get_submodule, names), *(layer for layer, _ in group.producers())]
            layers += [layer for layer, _ in group.fed()]
            layers += [layer for layer, _ in self._crossings[group.name].points()] if self._crossings else []
            self._shapes |= {layer: _shapes(layer) for layer in layers}

    def _watch_input(
        self,
        windows: list[tuple[Window, Tensor | None]],
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        act = args[0] if args else kwargs.get("input")
        act = act.data if isinstance(act, nn.utils.rnn.PackedSequence) else act
        if isinstance(act, Tensor) and self._counts(layer, act) and self._due(windows[0][0]):
            rows = per_channel(act.detach(), layer)
            for window, index in windows:
                window.add(of_units(rows, index))

    def _keep_input(
        self, inputs: dict[str, Tensor], name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        act = args[0] if args else kwargs.get("input")
        act = getattr(act, "data", act)  # of a packed sequence
        if isinstance(act, Tensor) and self._counts(layer, act) and self._due(name):
            inputs[name] = kept_inputs(act, len(getattr(layer, "kernel_size", ())))

    def _watch_recurrent(
        self, window: Window, index: Tensor | None, observer: Observer, layer: nn.Module, args: Any, output: Any
    ) -> None:
        act = observer.value(args, {}, output)
        if self._counts(layer, act) and self._due(window):
            window.add(per_unit(act.detach(), layer, index))

    def _watch_output(
        self, made: list[tuple[Gradients, Tensor | None]], layer: nn.Module, inputs: Any, output: Any
    ) -> None:
        if self._counts(layer, output) and self._due(made[0][0]) and output.requires_grad:
            output.register_hook(partial(self._watch_gradient, made, layer))

    def _watch_gradient(self, made: list[tuple[Gradients, Tensor | None]], layer: nn.Module, gradient: Tensor) -> None:
        means = per_channel(wide(gradient.detach()), layer).abs().mean(0)
        for seen, index in made:
            seen.add(means if index is None else means[index[:, 0]])

    def _watch_producer(self, seen: Gradients, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._counts(layer, output) and self._due(seen) and output.requires_grad and inputs and output.dim() > 1:
            output.register_hook(partial(self._keep_sample, name, few(inputs[0]), few(output)))

    def _keep_sample(self, name: str, inputs: Tensor, output: Tensor, gradient: Tensor) -> None:
        self._latest[name] = (inputs, output, few(gradient))

    def _watch_crossing(self, keep: Callable[..., None], layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._counts(layer, output) and self._due(keep) and output.requires_grad and inputs and output.dim() > 1:
            keep(inputs[0], output)

    def _watch_growth(self, recorder: Recorder, layer: nn.Module, inputs: Any, output: Any) -> None:
        counts = self._counts(layer, output) and self._due(recorder) and output.requires_grad and inputs
        recorder.begin(inputs[0] if counts else None, output)

    def _watch_step(self, number: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step = self._steps[number]
        self._steps[number] = step + 1
        if step % self.sample_every == 0:
            self._watch_weights(number)
        if number == 0:
            self.passes = step + 1
            if self._paused or self.passes - self._resumed_at != self._between_pauses:  # or else a pause comes next
                self._follow()
            else:
                self._detach(self._handles)

    def _watch_weights(self, number: int) -> None:
        read = {(id(w), dim): (w, dim) for _, weights in self._incoming[number] for w, dim, _ in weights}
        means = {key: _row_means(w.grad, dim) for key, (w, dim) in read.items() if w.grad is not None}
        for seen, weights in self._incoming[number]:
            rows = [_of_rows(means[id(w), dim], i) for w, dim, i in weights if (id(w), dim) in means]
            if rows:
                seen.add(rows[0] if len(rows) == 1 else torch.stack(rows).mean(0))

    def reborn(self, group: UnitGroup, units: Sequence[int]) -> None:
        """These units were recycled: other ones stand in their places."""
        self.born[group.name][list(units)] = self.passes
        for window in self._windows[group.name]:
            if window.firing is not None and units:
                window.firing.follow([-1 if unit in units else unit for unit in range(len(self.born[group.name]))])

    def count_on(self, state: dict[str, Any]) -> None:
        """Count updates from where the :meth:`state_dict` of another tracker stands, with nothing seen."""
        self.passes, self._steps = int(state["passes"]), list(state["steps"])
        self._resumed_at, self._between_pauses = state["pauses"]
        self._root_calls, self._cleared_at = int(state["root_calls"]), self.passes
        for born in self.born.values():
            born.fill_(self.passes)

    def resized(self, group: UnitGroup, kept: Sequence[int]) -> None:
        """Follow a resize: new unit i was unit ``kept[i]``, or is newborn where that is -1. Its window begins anew."""
        old = torch.tensor(kept)
        for crossing in self._crossings.values():
            crossing.follow(group, kept, len(self.born[group.name]))
        born = self.born[group.name][old.clamp_min(0)]
        self.born[group.name] = torch.where(old < 0, torch.full_like(born, self.passes), born)
        self._windows[group.name] = [window.following(kept) for window in self._windows[group.name]]
        self._forget_columns(group)
        self._pre[group.name] = [Gradients() for _ in self._pre[group.name]]
        self._weights[group.name] = Gradients()
        self._detach(self._handles)
        self._points = []  # other groups may have moved in the same tensors
        self._measure()
        if self._step_handles:
            self._detach(self._step_handles)
            self._attach_to_optimizers()
        self._follow()

    def _forget_columns(self, group: UnitGroup) -> None:
        """What was kept of layers that make these units, or read them: those have other rows or columns now."""
        read = {axis.name for axis in group.outgoing}
        touched = read | {axis.name for axis in group.incoming}
        for other in self.graph:
            if touched & {axis.name for axis in other.incoming}:
                self._latest.pop(other.name, None)
        if self._recorders:
            self._recorders = _recorders(self.graph)
        if self._inputs is not None:
            for name in read:
                self._inputs.pop(name, None)

    # -- reading -------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Begin a new window for every group."""
        self._cleared_at = self.passes
        self._latest.clear()
        if self._inputs is not None:
            self._inputs.clear()
        for crossing in self._crossings.values():
            crossing.clear()
        for recorder in self._recorders.values():
            recorder.clear()
        for group in self.graph:
            for window in self._windows[group.name]:
                window.clear()
            for seen in (*self._pre[group.name], self._weights[group.name]):
                seen.clear()

    @property
    def updates(self) -> int:
        """Updates in the window, sampled or not."""
        return self.passes - self._cleared_at

    @property
    def samples(self) -> int:
        """Values of each unit in the window, of the layer that was seen most."""
        return max((w.count for windows in self._windows.values() for w in windows), default=0)

    def latest(self, group: UnitGroup) -> Tensor | None:
        """Up to 256 activations of the latest sampled pass, ``(values, width)``, or None."""
        windows = self._windows[group.name]
        return windows[0].latest if windows and not self.outdated else None

    def stats(
        self,
        group: UnitGroup,
        generator: torch.Generator | None = None,
        event: int = 0,
        recorded: Mapping[str, float] | None = None,
    ) -> Stats:
        """The group's window so far. This is the one place that waits for the device."""
        windows = self._windows[group.name]
        samples = min((w.count for w in windows), default=0)
        nan = torch.full((group.width,), float("nan"), dtype=torch.double)
        found = dict.fromkeys((*_MOMENTS, "silence", "rarity"), nan)
        finite = True
        live = not self.outdated  # or else the group's entries are others' by now
        if samples:
            found |= _active(group, [w.read() for w in windows], self._consumers[group.name])
            finite = bool(found["mean_abs"].isfinite().all() and found["variance"].isfinite().all())
        return Stats(
            samples=samples,
            **found,
            gradient=largest([seen.mean(group.width) for seen in self._pre[group.name]], nan),
            weight_gradient=self._weights[group.name].mean(group.width),
            age=(self.passes - self.born[group.name]).double(),
            incoming_norm=_norm(group, [a for a in group.incoming if a.role == "weight"], 2) if live else nan,
            outgoing_norm=_norm(group, group.outgoing, 1) if live else nan,
            event=event,
            updates=self.updates,
            finite=finite,
            settled=_settled(group) if live else None,
            sample=self._sample_of(group),
            inputs=self._inputs_of(group),
            activations=self.latest(group),
            recorded=recorded or {},
            junction=self._crossings[group.name].junction() if group.name in self._crossings else None,
            growth=self._growth_of(group),
            mistakes=None,  # the recycler knows whether a method has examples
            generator=generator,
        )

    def _sample_of(self, group: UnitGroup) -> Sample | None:
        if group.name not in self._latest:
            return None
        ((layer, axis),) = group.producers()
        return as_sample(layer, axis.index[:, 0], *self._latest[group.name])

    def _inputs_of(self, group: UnitGroup) -> dict[str, Tensor] | None:
        if self._inputs is None:
            return None
        return {axis.name: self._inputs[axis.name].cpu() for _, axis in group.fed() if axis.name in self._inputs}

    def why_no_growth(self, group: UnitGroup) -> str:
        """Why there are no rows that say what a new unit of a group would be worth."""
        return f": {why_not_sampled(group) or 'no gradient has come back to its consumers yet'}"

    def _growth_of(self, group: UnitGroup) -> GrowthSample | None:
        return self._recorders[group.name].sample() if group.name in self._recorders else None

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, as plain tensors and numbers."""
        return {
            "passes": self.passes,
            "steps": list(self._steps),
            "pauses": [self._resumed_at, self._between_pauses],
            "root_calls": self._root_calls,
            "cleared_at": self._cleared_at,
            "born": {k: v.clone() for k, v in self.born.items()},
            "windows": {k: [w.state() for w in ws] for k, ws in self._windows.items()},
            "pre": {k: [g.state() for g in gs] for k, gs in self._pre.items()},
            "weights": {k: g.state() for k, g in self._weights.items()},
            "latest": {k: [t.cpu().clone() for t in kept] for k, kept in self._latest.items()},
            "inputs": {k: x.to("cpu", copy=True) for k, x in (self._inputs or {}).items()},
            "crossings": {name: crossing.state() for name, crossing in self._crossings.items()},
            "growth": {k: recorder.state() for k, recorder in self._recorders.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to other groups.
        """
        widths = {name: len(born) for name, born in state["born"].items()}
        mine = {group.name: group.width for group in self.graph}
        if widths != mine:
            raise ValueError(f"the state was saved for the groups {widths}, this graph has {mine}")
        self.passes, self._steps = int(state["passes"]), list(state["steps"])
        self._resumed_at, self._between_pauses = state["pauses"]
        self._root_calls, self._cleared_at = int(state["root_calls"]), int(state["cleared_at"])
        self.born = {k: v.clone() for k, v in state["born"].items()}
        self._latest = {k: (x.clone(), z.clone(), g.clone()) for k, (x, z, g) in state["latest"].items()}
        for name, windows in self._windows.items():
            device = self.graph[name].tensor(self.graph[name].incoming[0].name).device
            for window, saved in zip(windows, state["windows"][name], strict=True):
                window.load(saved, device)
            for seen, kept in zip(self._pre[name], state["pre"][name], strict=True):
                seen.load(kept, device)
            self._weights[name].load(state["weights"][name], device)
        if self._inputs is not None:
            self._inputs.clear()
            for name, kept in state["inputs"].items():
                self._inputs[name] = kept.to(self.graph.module.get_parameter(name).device, copy=True)
        for name, crossing in self._crossings.items():
            crossing.load(state["crossings"][name])
        for name, recorder in self._recorders.items():
            recorder.load(state.get("growth", {}).get(name, []))


def _shapes(layer: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in layer._parameters.values() if parameter is not None]


def _listed(shapes: list[torch.Size]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _recorders(graph: Graph) -> dict[str, Recorder]:
    examples = Examples()
    able = sorted((group for group in graph if not why_not_sampled(group)), key=lambda group: group.first)
    return {group.name: Recorder(group, examples, first=group is able[0]) for group in able}


def _norms(group: UnitGroup, consumers: list[Observer]) -> list[Observer]:
    """A norm's input says what is dead before it, but not what the consumers read: alone it would say too much."""
    return group.norms() if consumers else []


def _active(group: UnitGroup, seen: list[dict[str, Tensor]], consumers: int) -> dict[str, Tensor]:
    """The units as their activation leaves them.

    Behind a normalisation nothing looks dead (its shift is trained, it mixes units), and before one that precedes the
    activation nothing does either: so it is where they fire least. A unit that is dead before a batch normalisation
    gives its consumers the shift, if that is what they saw.
    """
    read = joined(seen[:consumers])
    if not seen[consumers:]:
        return read
    before = joined(seen[consumers:])
    if float(before["firing_rate"].mean()) >= float(read["firing_rate"].mean()):
        return read
    shift = group.shift()
    if shift is None:
        return before
    low, high = read["minimum"], read["maximum"]
    slack = (high - low) + 1e-3 * (1 + shift.abs())
    as_told = (shift >= low - slack) & (shift <= high + slack)
    dead = before["minimum"] == before["maximum"]
    found = before | {"mean": torch.where(dead & as_told, shift, read["mean"])}
    for key in ("minimum", "maximum"):
        found[key] = torch.where(dead, torch.where(as_told, shift, read[key]), before[key])
    return found


def _settled(group: UnitGroup) -> Tensor | None:
    """Where running variances have come down to nothing, as those of a constant do, and the means with them."""
    units, settled = torch.arange(group.width), None
    for axis in group.incoming:
        owner, _, leaf = axis.name.rpartition(".")
        eps = getattr(group.module.get_submodule(owner), "eps", None)
        if leaf in ("running_var", "ra_var") and eps is not None:
            largest_of = axis.read(group.tensor(axis.name), units).flatten(1).amax(1).cpu()
            settled = (largest_of <= 1e-6 * eps) & (True if settled is None else settled)
    return settled


def _columns(index: Tensor, tensor: Tensor, dim: int) -> Tensor | None:
    """``index`` on the tensor's device, or None where it is simply every entry in order."""
    whole = index.shape[1] == 1 and torch.equal(index[:, 0], torch.arange(tensor.shape[dim]))
    return None if whole else index.to(tensor.device)


def _row_means(gradient: Tensor, dim: int) -> Tensor:
    """Mean absolute gradient of the entries along ``dim``, ``(size,)``."""
    return wide(gradient.detach()).abs().mean([d for d in range(gradient.dim()) if d != dim])


def _of_rows(means: Tensor, index: Tensor | None) -> Tensor:
    """The mean over each unit's entries ``(width, span)``, all in order where that is None: ``(width,)``."""
    if index is None:
        return means
    return means[index[:, 0]] if index.shape[1] == 1 else means[index].mean(1)


def _norm(group: UnitGroup, axes: Sequence[Axis], order: int) -> Tensor:
    units = torch.arange(group.width)
    with torch.no_grad():
        parts = [axis.read(group.tensor(axis.name), units).double().flatten(1).cpu() for axis in axes]
        norms: Tensor = torch.linalg.vector_norm(torch.cat(parts, 1), order, dim=1)
        return norms


@torch.no_grad()
def peak(group: UnitGroup, module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Largest |output| of each of the group's units in another network of the same shape, on one batch: ``(width,)``.

    Runs ``module`` (a target network) once without gradients, in evaluation mode.
    """
    highest = torch.zeros(group.width, dtype=torch.double)

    def watch(observer: Observer, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        act = observer.value(args, kwargs, output)
        seen = per_unit(act.detach(), layer, observer.index.to(act.device)).abs().amax(0).double().cpu()
        torch.maximum(highest, seen, out=highest)

    handles = []
    for observer in group.observers():
        layer = module.get_submodule(observer.name)
        handles.append(layer.register_forward_hook(partial(watch, observer), with_kwargs=True))
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        module.eval()
        module(*inputs[0], **inputs[1])
    finally:
        for layer, mode in modes:
            layer.training = mode
        for handle in handles:
            handle.remove()
    return highest
