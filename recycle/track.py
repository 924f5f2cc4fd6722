"""Watch every unit of a network while it trains: hooks that add to a window of per-unit statistics.

Nothing here touches training: hooks only read, draw no random number, leave ``.grad`` alone and never wait for
the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.clock import Clock
from recycle.graph import Graph, Observer, UnitGroup, of_units, per_channel, per_unit
from recycle.growth_sample import why_not_sampled
from recycle.kept import Kept
from recycle.rows import Look, Record
from recycle.seen import Seen, norm, of_rows, settled, watched
from recycle.stats import Gradients, Stats, Window, wide


class _Weights(NamedTuple):
    """The incoming weights that an optimizer updates."""

    read: list[tuple[Tensor, list[int], int]]
    """Each parameter once for each axis along which its entries are units', its other axes, and their size."""
    groups: list[tuple[Gradients, list[tuple[int, Tensor | None]]]]
    """What is kept of each group, and its part: which of those above, and the units' entries (None: all, in order)."""


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
        shared: this is one of several processes that train one network: times between firings wait until all have
            told what they saw, see :mod:`recycle.merged`.
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
        shared: bool = False,
    ) -> None:
        if sample_every < 1:
            raise ValueError(f"sample_every counts updates and must be at least 1, got {sample_every}")
        self.graph = graph
        self.optimizers = tuple(optimizers)
        self.training_only = training_only
        self.unobserved: dict[str, str] = {}
        """Groups that no hook can watch, and why: they are never recycled."""
        self.outdated = ""
        """Why this tracker has stopped for good: something else resized the module. "" while all is well."""
        self.born: dict[str, Tensor] = {}
        """The pass at which each unit was last recycled, ``(width,)``."""
        self._clock = Clock(len(self.optimizers), sample_every)
        self._seen = {group.name: Seen(group, firing, shared) for group in graph}
        asked = {"sample": sample, "inputs": inputs, "junction": junction, "growth": growth}
        self._kept = Kept(graph, [need for need, wanted in asked.items() if wanted])
        self._handles: list[Any] = []
        self._step_handles: list[Any] = []
        self._points: list[tuple[nn.Module, Callable[..., None]]] = []  # layers, and what watches them
        self._shapes: dict[nn.Module, list[torch.Size]] = {}  # of the watched layers' parameters
        self._incoming: list[_Weights] = []
        self._attached = False
        for group in graph:
            self.born[group.name] = torch.zeros(group.width, dtype=torch.long)
            if not group.observers():
                self.unobserved[group.name] = (
                    "a consumer is no Linear, Conv or first or last recurrent layer, so no hook sees what it reads"
                )
        self._measure()

    @property
    def sample_every(self) -> int:
        """The passes of one of so many updates are looked at."""
        return self._clock.sample_every

    @property
    def passes(self) -> int:
        """Updates so far: steps of the first optimizer, or training passes where no optimizer was given."""
        return self._clock.passes

    @property
    def updates(self) -> int:
        """Updates in the window, sampled or not."""
        return self._clock.updates

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
        self._attached = self._clock.paused = False
        self._detach(self._handles)
        self._detach(self._step_handles)

    def pause(self) -> None:
        """Take the hooks off the layers where no training pass can come, a rollout say, until :meth:`resume`."""
        self._clock.pause()
        if self._handles:
            self._detach(self._handles)

    def resume(self) -> None:
        """End a :meth:`pause`."""
        self._clock.resume()
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
        wanted = self._attached and self._clock.sampling
        if wanted and not self._handles:
            self._attach_to_layers()
        elif self._handles and not wanted:
            self._detach(self._handles)

    def _attach_to_layers(self) -> None:
        if not self._points:
            self._points = list(self._observation_points())
        if not self.optimizers:
            self._handles.append(self.graph.module.register_forward_pre_hook(self._watch_pass))
        self._handles += [layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in self._points]

    def _observation_points(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Layers and hooks. All groups that one layer reads, and those that it makes, share its hook."""
        read: dict[nn.Module, list[tuple[Window, Tensor | None]]] = {}
        made: dict[nn.Module, list[tuple[Gradients, Tensor | None]]] = {}
        for group in self.graph:
            seen = self._seen[group.name]
            for observer, window in zip(watched(group), seen.windows, strict=True):
                index = None if observer.whole else observer.index.to(group.tensor(group.incoming[0].name).device)
                layer = group.module.get_submodule(observer.name)
                if observer.at_output:
                    yield layer, partial(self._watch_recurrent, window, index, observer)
                else:
                    read.setdefault(layer, []).append((window, index))
            for (layer, axis), gradients in zip(group.producers(), seen.gradients, strict=True):
                made.setdefault(layer, []).append((gradients, _columns(axis.index, group.tensor(axis.name), axis.dim)))
        for layer in {**read, **made}:
            yield layer, partial(self._watch_layer, read.get(layer, []), made.get(layer, []))
        for record in self._kept:
            for look in record.looks:
                yield look.layer, partial(self._watch_rows, record, look)

    def _attach_to_optimizers(self) -> None:
        if self._step_handles:
            return
        self._incoming = [self._weights_of(optimizer) for optimizer in self.optimizers]
        for number, optimizer in enumerate(self.optimizers):
            self._step_handles.append(optimizer.register_step_pre_hook(partial(self._watch_step, number)))

    def _weights_of(self, optimizer: Optimizer) -> _Weights:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = _Weights([], [])
        places: dict[tuple[int, int], int] = {}
        for group in self.graph:
            axes = [(axis, group.tensor(axis.name)) for axis in group.incoming if axis.role == "weight"]
            own = []
            for axis, weight in axes:
                if id(weight) in held:
                    place = places.setdefault((id(weight), axis.dim), len(found.read))
                    if place == len(found.read):
                        others = [d for d in range(weight.dim()) if d != axis.dim]
                        found.read.append((weight, others, weight.numel() // weight.shape[axis.dim]))
                    own.append((place, _columns(axis.index, weight, axis.dim)))
            if own:
                found.groups.append((self._seen[group.name].weights, own))
        return found

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
            self._clock.called()

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
            layers = [group.module.get_submodule(observer.name) for observer in watched(group)]
            self._shapes |= {layer: _shapes(layer) for layer in (*layers, *(at for at, _ in group.producers()))}
        self._shapes |= {look.layer: _shapes(look.layer) for record in self._kept for look in record.looks}

    def _watch_layer(
        self,
        read: list[tuple[Window, Tensor | None]],
        made: list[tuple[Gradients, Tensor | None]],
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        act = args[0] if args else kwargs.get("input")
        act = act.data if isinstance(act, nn.utils.rnn.PackedSequence) else act
        value = act if read else output
        if not (isinstance(value, Tensor) and self._counts(layer, value) and self._clock.due(layer)):
            return
        if read:
            rows = per_channel(value.detach(), layer)
            for window, index in read:
                window.add(of_units(rows, index))
        if made and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(self._watch_gradient, made, layer))  # type: ignore[no-untyped-call]

    def _watch_recurrent(
        self,
        window: Window,
        index: Tensor | None,
        observer: Observer,
        layer: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        act = observer.value(args, kwargs, output)
        if self._counts(layer, act) and self._clock.due(window):
            window.add(per_unit(act.detach(), layer, index))

    def _watch_gradient(self, made: list[tuple[Gradients, Tensor | None]], layer: nn.Module, gradient: Tensor) -> None:
        rows = per_channel(wide(gradient.detach()), layer)
        sums = rows.abs().sum(0)
        for seen, index in made:
            seen.add(sums if index is None else sums[index[:, 0]], len(rows))

    def _watch_rows(self, record: Record, look: Look, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read = args[0] if args else kwargs.get("input")
        read = read.data if isinstance(read, nn.utils.rnn.PackedSequence) else read
        counts = self._counts(layer, read)
        if look is record.looks[0] and not (counts and self._clock.due(record)):
            record.end()
        elif counts:
            record.see(look, read, output)

    def _watch_step(self, number: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._clock.stepped(number):
            self._watch_weights(number)
        if number == 0 and (self._handles or self._clock.sampling):
            if self._clock.pause_is_next:
                self._detach(self._handles)
            else:
                self._follow()

    def _watch_weights(self, number: int) -> None:
        weights = self._incoming[number]
        sums = [None if w.grad is None else wide(w.grad.detach()).abs().sum(others) for w, others, _ in weights.read]
        for seen, own in weights.groups:
            rows = [
                (of_rows(found, index), weights.read[place][2])
                for place, index in own
                if (found := sums[place]) is not None
            ]
            if len(rows) == 1:
                seen.add(*rows[0])
            elif rows:
                seen.add(torch.stack([total / count for total, count in rows]).mean(0), 1)

    def reborn(self, group: UnitGroup, units: Sequence[int]) -> None:
        """These units were recycled: other ones stand in their places."""
        self.born[group.name][list(units)] = self.passes
        self._seen[group.name].reborn(units, len(self.born[group.name]))

    def count_on(self, before: Tracker) -> None:
        """Count updates from where another tracker stands, with nothing seen."""
        self._clock.load(before._clock.state())
        self._clock.clear()
        for born in self.born.values():
            born.fill_(self.passes)

    def resized(self, group: UnitGroup, kept: Sequence[int]) -> None:
        """Follow a resize: new unit i was unit ``kept[i]``, or is newborn where that is -1. Its window begins anew."""
        old = torch.tensor(kept)
        self._kept.follow(group, kept, len(self.born[group.name]))
        born = self.born[group.name][old.clamp_min(0)]
        self.born[group.name] = torch.where(old < 0, torch.full_like(born, self.passes), born)
        self._seen[group.name].resized(kept)
        self._detach(self._handles)
        self._points = []  # other groups may have moved in the same tensors
        self._clock.new_points()
        self._measure()
        if self._step_handles:
            self._detach(self._step_handles)
            self._attach_to_optimizers()
        self._follow()

    # -- reading -------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Begin a new window for every group."""
        self._clock.clear()
        self._kept.clear()
        for seen in self._seen.values():
            seen.clear()

    @property
    def samples(self) -> int:
        """Values of each unit in the window, of the layer that was seen most."""
        return max((window.count for seen in self._seen.values() for window in seen.windows), default=0)

    def latest(self, group: UnitGroup) -> Tensor | None:
        """Up to 256 activations of the latest sampled pass, ``(values, width)``, or None."""
        return None if self.outdated else self._seen[group.name].latest

    def stats(
        self,
        group: UnitGroup,
        generator: torch.Generator | None = None,
        event: int = 0,
        recorded: Mapping[str, float] | None = None,
    ) -> Stats:
        """The group's window so far. This is the one place that waits for the device."""
        live = not self.outdated  # or else the group's entries are others' by now
        nan = torch.full((group.width,), float("nan"), dtype=torch.double)
        return Stats(
            **self._seen[group.name].read(group),
            age=(self.passes - self.born[group.name]).double(),
            incoming_norm=norm(group, [a for a in group.incoming if a.role == "weight"], 2) if live else nan,
            outgoing_norm=norm(group, group.outgoing, 1) if live else nan,
            event=event,
            updates=self.updates,
            settled=settled(group) if live else None,
            activations=self.latest(group),
            recorded=recorded or {},
            **self._kept.read(group),
            mistakes=None,  # the recycler knows whether a method has examples
            generator=generator,
        )

    def why_no_growth(self, group: UnitGroup) -> str:
        """Why there are no rows that say what a new unit of a group would be worth."""
        return f": {why_not_sampled(group) or 'no gradient has come back to its consumers yet'}"

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, as plain tensors and numbers."""
        return {
            **self._clock.state(),
            "born": {k: v.clone() for k, v in self.born.items()},
            "seen": {name: seen.state() for name, seen in self._seen.items()},
            "rows": self._kept.state(),
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
        self._clock.load(state)
        self.born = {k: v.clone() for k, v in state["born"].items()}
        for name, seen in self._seen.items():
            seen.load(state["seen"][name], self.graph[name].tensor(self.graph[name].incoming[0].name).device)
        self._kept.load(state["rows"])


def _shapes(layer: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in layer._parameters.values() if parameter is not None]


def _listed(shapes: list[torch.Size]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _columns(index: Tensor, tensor: Tensor, dim: int) -> Tensor | None:
    """``index`` on the tensor's device, or None where it is simply every entry in order."""
    whole = index.shape[1] == 1 and torch.equal(index[:, 0], torch.arange(tensor.shape[dim]))
    return None if whole else index.to(tensor.device)
