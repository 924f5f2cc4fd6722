"""Certify units as dead for every input of a box, by interval arithmetic on an unmodified module.

Beside every tensor that depends on the input stand its bounds, kept per *storage* as unit labels are
(``recycle/labels.py``), so that views and writes in place need no rule; ``recycle/intervals.py`` says what each
operation does to them. What has no rule is unknown, and so is a tensor of unknown origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from recycle.graph import Graph, NotRecyclable, Observer
from recycle.intervals import ELEMENTWISE, MAKES, RULES, Interval, Pair, Rule, settled
from recycle.kinds import check_arguments
from recycle.labels import tensors_in

_POINTS = (0.0, 1.0, None, None)
"""Inputs of the box on which every certificate is checked: two corners, and two others at random."""


def certify(graph: Graph, call: Callable[[Any], Any], low: Any, high: Any) -> dict[str, Tensor]:
    """The units that are one constant, as their consumers read them, for *every* input of a box.

    A bool tensor ``(width,)`` for each group. True is a proof, up to the last bit of a constant other than zero:
    the network's own rounding is counted in. False says only that there is no proof, as for every unit of a group
    whose consumers no hook can see. The proof is for evaluation mode, at the present weights. ::

        recycle.certify(graph, net, torch.full((1, 4), -1.0), torch.full((1, 4), 1.0))

    Args:
        graph: what :func:`recycle.trace` found.
        call: runs the module on one input: a tensor, or nested dicts, lists and tuples of them. It must be a
            function of that input and the module alone; other tensors that it brings along count as unknown.
        low: the smallest value of every element of the input, in the form, shape and dtype that ``call`` takes.
        high: the largest value of every element.

    Raises:
        ValueError: ``low`` and ``high`` differ in form, are not finite, or ``low > high`` somewhere.
        NotRecyclable: the call fails.
    """
    return {name: lowest == highest for name, (lowest, highest) in unit_bounds(graph, call, low, high).items()}


@torch.no_grad()
def unit_bounds(graph: Graph, call: Callable[[Any], Any], low: Any, high: Any) -> dict[str, Pair]:
    """The least and the largest value of each unit over a box, as :func:`certify` takes them.

    ``{group name: (low, high)}``, each ``(width,)``, float64, on the CPU, over all positions and consumers;
    (-inf, inf) where nothing is known.
    """
    check_arguments(certify, "certify", graph=graph, call=call)
    _check_form(low, high)
    boxes = list(zip(tensors_in(low), tensors_in(high), strict=True))
    _check_box(boxes)
    module = graph.module
    with _evaluating(module):
        intervals = Intervals(module)
        inside = _point(low, high, None)
        for tensor, (least, most) in zip(tensors_in(inside), boxes, strict=True):
            intervals.put(tensor, least.double(), most.double())
        found = _Readings(graph, intervals.of)
        with found, intervals, _Exits(intervals):
            _run(call, inside)
        sound = intervals.complete()
        seen = _Readings(graph, lambda tensor: (tensor.double(), tensor.double()))
        for weight in _POINTS:
            with seen:
                _run(call, _point(low, high, weight))
    return {
        group.name: found.bounds(group.name) if sound and seen.within(found, group.name) else _unknown(group.width)
        for group in graph
    }


def _check_form(low: Any, high: Any) -> None:
    """Refuse a low end and a high end that are not built alike."""
    lists = isinstance(low, (list, tuple)) and type(low) is type(high) and len(low) == len(high)
    dicts = isinstance(low, dict) and isinstance(high, dict) and low.keys() == high.keys()
    if not lists and not dicts and not (isinstance(low, Tensor) and isinstance(high, Tensor)):
        raise ValueError(
            "low and high must have the same form: tensors, or the same dicts, lists and tuples of them, got "
            f"{type(low).__name__} and {type(high).__name__}"
        )
    for key in low if dicts else range(len(low)) if lists else ():
        _check_form(low[key], high[key])


def _check_box(boxes: list[tuple[Tensor, Tensor]]) -> None:
    for least, most in boxes:
        if least.shape != most.shape or least.dtype != most.dtype:
            raise ValueError(
                "low and high must have the same shape and dtype, got "
                f"{tuple(least.shape)} {least.dtype} and {tuple(most.shape)} {most.dtype}"
            )
        if not bool(least.isfinite().all() and most.isfinite().all() and (least <= most).all()):
            raise ValueError("low and high must be finite, with low <= high everywhere")


def _run(call: Callable[[Any], Any], given: Any) -> None:
    try:
        call(given)
    except Exception as error:
        raise NotRecyclable(f"the call to certify fails: {type(error).__name__}: {error}") from error


def _point(low: Any, high: Any, weight: float | None) -> Any:
    """An input of the box: its lower corner (0), its upper corner (1), or at random one of both for each element."""
    if isinstance(low, dict):
        return {key: _point(part, high[key], weight) for key, part in low.items()}
    if isinstance(low, (list, tuple)):
        return type(low)(_point(a, b, weight) for a, b in zip(low, high, strict=True))
    if weight is None:
        return torch.where(torch.rand(low.shape, device=low.device) < 0.5, low, high)
    return (high if weight else low).clone()


def _unknown(width: int) -> Pair:
    bound = torch.full((width,), torch.inf, dtype=torch.double)
    return -bound, bound


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; flags, buffers and random states come back."""
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = [(layer, dict(layer._buffers)) for layer in module.modules()]
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {p.device.index or 0 for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        try:
            module.eval()
            yield
        finally:
            for layer, mode in modes:
                layer.training = mode
            for layer, kept in buffers:
                layer._buffers.update(kept)
            for buffer, value in saved:
                buffer.copy_(value)


class _Readings:
    """What the consumers of every group read: the least and the largest value of each unit."""

    def __init__(self, graph: Graph, read: Callable[[Tensor], Pair]) -> None:
        self._read = read
        self._points = [(group, observer) for group in graph for observer in group.observers()]
        self._handles: list[Any] = []
        self._seen: dict[str, Pair] = {}
        self._widths = {group.name: group.width for group in graph}
        self._unseen = {(group.name, observer) for group, observer in self._points}

    def __enter__(self) -> None:
        self._handles = [
            group.module.get_submodule(observer.name).register_forward_pre_hook(
                partial(self._watch, group.name, observer), with_kwargs=True
            )
            for group, observer in self._points
            if not observer.at_output  # a recurrent layer: nothing is known of its units
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str, observer: Observer, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        act = observer.value(args, kwargs, None)
        units = act.dim() - len(getattr(layer, "kernel_size", ())) - 1  # the axis of features or channels
        with _disable_current_modes():
            low, high = (b.movedim(units, 0)[observer.index.to(b.device)].flatten(1).cpu() for b in self._read(act))
            least, most = low.amin(1), high.amax(1)
            before = self._seen.get(name, (least, most))
            self._seen[name] = torch.minimum(before[0], least), torch.maximum(before[1], most)
        self._unseen.discard((name, observer))

    def bounds(self, name: str) -> Pair:
        """Of one group; unknown unless every consumer has been seen."""
        if name not in self._seen or any(name == group for group, _ in self._unseen):
            return _unknown(self._widths[name])
        return self._seen[name]

    def within(self, others: _Readings, name: str) -> bool:
        """Whether what was read lies within bounds that others have read."""
        (low, high), (least, most) = self.bounds(name), others.bounds(name)
        return bool(((least <= low) & (high <= most)).all())


class Intervals(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows bounds through the operations that run while it is active."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read_by = ""
        """The operation through which Python read a value that depends on the input, if there was one."""
        self._module = module
        self._bounds: dict[int, tuple[Tensor, Tensor, torch.dtype, Tensor]] = {}  # storage -> low, high, dtype, alive
        self._constants: dict[int, Tensor] = {_storage(tensor): tensor for tensor in self._held()}

    def _held(self) -> Iterator[Tensor]:
        """Every tensor that the module holds."""
        yield from self._module.parameters()
        yield from self._module.buffers()
        for layer in self._module.modules():
            yield from tensors_in(list(vars(layer).values()))

    def complete(self) -> bool:
        """Whether all that happened was followed: no value was read by Python, none kept for the next call."""
        return not self.read_by and not any(_storage(tensor) in self._bounds for tensor in self._held())

    def of(self, tensor: Tensor) -> Pair:
        """The bounds of ``tensor``, float64 and of its shape."""
        known = self._interval(tensor)
        return known.low, known.high

    def put(self, tensor: Tensor, low: Tensor, high: Tensor) -> None:
        """Write bounds (broadcast to its shape) beside ``tensor``."""
        key = _storage(tensor)
        if key not in self._bounds:
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            constant = key in self._constants  # partly overwritten, perhaps
            whole = tensor.as_strided((size,), (1,), 0).double().clone() if constant else None
            bound = torch.full((size,), torch.inf, dtype=torch.double, device=tensor.device)
            pair = (-bound, bound) if whole is None else (whole, whole.clone())
            self._bounds[key] = (*pair, tensor.dtype, tensor)
        least, most, dtype, _ = self._bounds[key]
        if tensor.dtype != dtype:  # the same memory under another type
            least.fill_(-torch.inf), most.fill_(torch.inf)
            return
        place = tensor.size(), tensor.stride(), tensor.storage_offset()
        least.as_strided(*place).copy_(low)
        most.as_strided(*place).copy_(high)

    def _interval(self, tensor: Tensor) -> Interval:
        key = _storage(tensor)
        if key in self._bounds:
            least, most, dtype, _ = self._bounds[key]
            if tensor.dtype == dtype:
                place = tensor.size(), tensor.stride(), tensor.storage_offset()
                return Interval(least.as_strided(*place), most.as_strided(*place), tensor)
        elif key in self._constants:
            value = tensor.to(torch.double, copy=True)
            return Interval(value, value, tensor, constant=True)
        bound = torch.full(tensor.shape, torch.inf, dtype=torch.double, device=tensor.device)
        return Interval(-bound, bound, tensor)

    # -- the mode ------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = list(tensors_in((args, kwargs)))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view:
            out = func(*args, **kwargs)
            if name == "lift_fresh":  # a literal
                self._constants[_storage(out)] = out
            return out
        random = torch.Tag.nondeterministic_seeded in func.tags
        constant = not random and all(map(self.constant, operands))
        base = name if name in RULES else name.removesuffix("_")
        pointwise = torch.Tag.pointwise in func.tags or base in ELEMENTWISE
        given = None
        if not (constant or random) and (base in RULES or pointwise):
            given = _replaced(args, self._interval), {k: _replaced(v, self._interval) for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        results = list(tensors_in(out))
        if constant or name in MAKES:
            for tensor in results:
                self._constants.setdefault(_storage(tensor), tensor)
            return out
        self._note_reading(func, operands)
        if not func._schema.is_mutable and results and {_storage(t) for t in results} <= set(map(_storage, operands)):
            return out  # a view under another name
        pairs = [settled(None, tensor) for tensor in results]
        if results and given is not None:
            rule: Rule = RULES.get(base, _no_rule)
            pairs[0] = settled(rule(func, *given, results[0]), results[0])
            if pointwise:
                pairs[0] = _computed(given, results[0], *pairs[0])
        for tensor in _written(func, args, kwargs):
            self.put(tensor, *settled(None, tensor))
        for tensor, pair in zip(results, pairs, strict=True):
            self.put(tensor, *pair)
        return out

    def constant(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are the same for every input."""
        return _storage(tensor) in self._constants and _storage(tensor) not in self._bounds

    def _note_reading(self, func: Any, operands: list[Tensor]) -> None:
        """A value, or a shape that hangs on values, leaves the tensors: another input may take another path."""
        tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        if not any(tag in func.tags for tag in tags):
            return
        indices = [t for t in operands[1:] if t.dtype == torch.bool] if func._schema.name == "aten::index" else operands
        if not all(map(self.constant, indices)):
            self.read_by = func._schema.name


class _Exits(TorchFunctionMode):
    """Notes when Python takes values out of torch without an operation that could be seen: ``x.numpy()``."""

    def __init__(self, intervals: Intervals) -> None:
        super().__init__()
        self._intervals = intervals

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _EXITS and not all(map(self._intervals.constant, tensors_in(args))):
            self._intervals.read_by = name
        return func(*args, **(kwargs or {}))


_EXITS = {"numpy", "tolist", "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__"}


def _no_rule(op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    return None


def _computed(given: tuple[Any, dict[str, Any]], out: Tensor, low: Tensor, high: Tensor) -> Pair:
    """Where every operand is one value, the result is the one that was computed."""
    fixed = torch.ones(out.shape, dtype=torch.bool, device=out.device)
    for operand in _intervals_in(given):
        if not operand.constant:
            fixed = fixed & (operand.low == operand.high)
    value = out.double()
    fixed &= value.isfinite()
    return torch.where(fixed, value, low), torch.where(fixed, value, high)


def _replaced(value: Any, interval: Callable[[Tensor], Interval]) -> Any:
    """Nested arguments with an interval in place of every tensor."""
    if isinstance(value, Tensor):
        return interval(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, interval) for item in value)
    return value


def _intervals_in(value: Any) -> Iterator[Interval]:
    if isinstance(value, Interval):
        yield value
    elif isinstance(value, dict):
        yield from _intervals_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _intervals_in(item)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor that the operation writes into."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or number >= len(args) else args[number]
            yield from tensors_in(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
