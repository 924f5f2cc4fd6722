"""Run the calls on which a module was traced, again and again alike, and compare what they return."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from recycle.labels import described

Call = Callable[[], Any]


class Plain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dropout off; with ``unmixed`` also normalisations across units replaced by their gain and bias.

    ``reductions``: operations over units, as :func:`described`, which are then replaced by ones.
    """

    def __init__(self, *, unmixed: bool = False, reductions: Collection[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unmixed, self.reductions = unmixed, reductions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **(kwargs or {}))
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(out[1])
        if name == "bernoulli_":
            return out.fill_(1)
        if self.unmixed and name in ("native_layer_norm", "native_group_norm"):
            layer = name == "native_layer_norm"
            weight, bias = args[2:4] if layer else args[1:3]
            shape = weight.shape if layer and weight is not None else [1, -1] + [1] * (args[0].dim() - 2)
            plain = args[0] if weight is None else args[0] * weight.reshape(shape)
            return (plain.clone() if bias is None else plain + bias.reshape(shape), *out[1:])
        if self.unmixed and name == "_softmax":
            return args[0].clone()
        if self.unmixed and self.reductions and described((str(func), args, kwargs or {})) in self.reductions:
            return tree_map(torch.ones_like, out)
        return out


DROPOUT = frozenset({"native_dropout", "bernoulli_"})
"""Operations whose randomness a trial must leave out."""


def repeatable(module: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """The calls without the traces that they leave in buffers, such as the power iterations of spectral norm."""
    buffers = list(module.buffers())
    return [partial(_undone, buffers, call) for call in calls]


def _undone(buffers: Sequence[Tensor], call: Call) -> Any:
    held = [(b, b.detach().clone()) for b in buffers]
    try:
        return call()
    finally:
        with torch.no_grad():
            for buffer, value in held:
                if not torch.equal(buffer, value):  # autograd counts every write
                    buffer.copy_(value)


def answers(module: nn.Module, calls: Sequence[Call]) -> list[Tensor] | str:
    """Outputs of the calls on the parameters as they are, dropping nothing; buffers stay as they were."""
    with torch.no_grad(), Plain():
        return outputs(repeatable(module, calls))


def outputs(calls: Sequence[Call]) -> list[Tensor] | str:
    """Copies of every floating-point output of the calls, or why they failed."""
    found = live_outputs(calls)
    return found if isinstance(found, str) else [t.detach().clone() for t in found]


def live_outputs(calls: Sequence[Call]) -> list[Tensor] | str:
    """Every floating-point output of the calls, with the graph behind it, or why they failed."""
    found = []
    for call in calls:
        _seed()
        try:
            found += [t for t in returned(call()) if t.is_floating_point()]
        except Exception as error:  # a user's module may raise anything on values it has never met
            return f"the call fails on random parameters: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return found


def _seed() -> None:
    """The same random numbers for every call; ``torch.manual_seed`` alone takes longer than a small network."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


def difference(one: list[Tensor] | str, other: list[Tensor] | str) -> float:
    """Largest change of an output, relative to the largest value of that output."""
    if isinstance(one, str) or isinstance(other, str) or len(one) != len(other):
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            change = float((a.double() - b.double()).abs().max()) / max(float(a.double().abs().max()), 1e-30)
            worst = max(worst, change if change == change else float("inf"))
    return worst


def tolerance(outputs: list[Tensor] | str) -> float:
    """Rounding allowed in these outputs' precision: 1e-12 in float64, 5e-4 in float32."""
    if isinstance(outputs, str) or not outputs:
        return 0.0
    return max(max(4096 * torch.finfo(t.dtype).eps, 1e-12) for t in outputs)


def returned(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Every tensor that a call's return value holds: nested containers, dataclasses, distributions."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0:
        return
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, f.name) for f in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
        items = vars(value).values()
    for item in items:
        yield from returned(item, depth - 1)
