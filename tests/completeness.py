"""Is a group all that its units are? An oracle that knows nothing of labels, rules or trial splits.

Three statements about a group hold on any parameters and any data, or the group is wrong:

- *symmetric*: with the units of a group permuted, in everything it names, no output changes. An element that
  belongs to the units and is not named stays behind, and so does a consumer.
- *gated*: with the units' outgoing elements at zero, their incoming elements may be anything.
- *divisible*: a split into a silenced slot changes no output, and neither does a reset of one.

:class:`Editable` answers the opposite question, what could have been offered: it finds a unit's consumers by
changing its weights and looking which inputs of which products change, its own elements by autograd, and tries
the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import recycle
from recycle import Reset, Split
from recycle.graph import UnitGroup

Call = Callable[[], Any]

EXACT = 1e-10  # relative, in float64


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Every floating-point parameter and buffer by name, the live tensors."""
    named = (*net.named_parameters(), *net.named_buffers())
    return {name: t for name, t in named if t.is_floating_point()}


def redraw(net: nn.Module, generator: torch.Generator, *, alive: bool = False) -> None:
    """Other parameters, of both signs, so that all pieces of an activation are met; variances stay positive.

    ``alive``: biases and gains are positive, so that few units are zero on all samples.
    """
    with torch.no_grad():
        for name, t in tensors_of(net).items():
            draw = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var") or (alive and t.dim() == 1):
                draw = draw.abs() + 0.5
            elif t.dim() > 1:
                draw *= t[0].numel() ** -0.5
            t.copy_(draw)


@contextmanager
def kept(net: nn.Module) -> Iterator[Callable[[], None]]:
    """Parameters and buffers are put back at the end, and whenever the yielded function is called."""
    held = [(t, t.detach().clone()) for t in (*net.parameters(), *net.buffers())]

    def back() -> None:
        with torch.no_grad():
            for tensor, value in held:
                tensor.copy_(value)

    try:
        yield back
    finally:
        back()


def outputs(calls: Sequence[Call]) -> list[Tensor]:
    """Every floating-point tensor that the calls return; the same random numbers each time."""
    found: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for call in calls:
            found += [t.clone() for t in leaves(call())]
    return found


def leaves(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor of a nested return value."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest change of an output relative to the largest value of that output; NaN counts as infinite."""
    worst = 0.0
    for b, a in zip(before, after, strict=True):
        if b.numel():
            d = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
            worst = max(worst, d if d == d else float("inf"))
    return worst


# ---------------------------------------------------------------- what was offered


def permute(groups: Sequence[UnitGroup], generator: torch.Generator) -> None:
    """The units of each group in another order, everywhere the group names."""
    with torch.no_grad():
        for group in groups:
            units = torch.arange(group.width)
            order = torch.roll(torch.randperm(group.width, generator=generator), 1)
            order = order if not torch.equal(order, units) else order.flip(0)
            for axis in (*group.incoming, *group.outgoing):
                tensor = group.tensor(axis.name)
                axis.write(tensor, units, axis.read(tensor, units)[order])


def silence(group: UnitGroup, units: Tensor) -> None:
    """The units' outgoing elements at zero."""
    with torch.no_grad():
        for axis in group.outgoing:
            tensor = group.tensor(axis.name)
            axis.write(tensor, units, torch.zeros_like(axis.read(tensor, units)))


def disturb(group: UnitGroup, units: Tensor, generator: torch.Generator) -> None:
    """Other incoming elements for these units; what is outgoing as well (a recurrent weight) stays silent."""
    with torch.no_grad():
        for axis in group.incoming:
            tensor = group.tensor(axis.name)
            old = axis.read(tensor, units)
            new = torch.randn(old.shape, generator=generator, dtype=old.dtype)
            axis.write(tensor, units, new.abs() + 0.5 if axis.name.endswith("running_var") else new)
    silence(group, units)


def faults(groups: Sequence[UnitGroup], net: nn.Module, calls: Sequence[Call], seed: int) -> dict[str, str]:
    """``{group: what is wrong}`` on the network's present parameters and data: all at once, then one by one."""
    found: dict[str, str] = {}
    for law, offered in _LAWS:
        members = [group for group in groups if offered(group)]
        with kept(net) as back:

            def broken(part: Sequence[UnitGroup], law: Any = law, back: Callable[[], None] = back) -> float:
                worst = law(part, calls, torch.Generator().manual_seed(seed))
                back()
                return worst

            if members and broken(members) > EXACT:
                single = {group.name: broken([group]) for group in members}
                wrong = {name: d for name, d in single.items() if d > EXACT}
                found |= {name: f"not {law.__name__[1:]}: outputs change by {d:.1e}" for name, d in wrong.items()}
                if not wrong:
                    found[" + ".join(single)] = f"not {law.__name__[1:]} when all are edited at once"
    return found


def _symmetric(groups: Sequence[UnitGroup], calls: Sequence[Call], generator: torch.Generator) -> float:
    before = outputs(calls)
    permute(groups, generator)
    return change(before, outputs(calls))


def _gated(groups: Sequence[UnitGroup], calls: Sequence[Call], generator: torch.Generator) -> float:
    chosen = [_some(group, generator)[0] for group in groups]
    for group, units in zip(groups, chosen, strict=True):
        silence(group, units)
    before = outputs(calls)
    for group, units in zip(groups, chosen, strict=True):
        disturb(group, units, generator)
    return change(before, outputs(calls))


def _divisible(groups: Sequence[UnitGroup], calls: Sequence[Call], generator: torch.Generator) -> float:
    chosen = [_some(group, generator) for group in groups]
    for group, (slots, _) in zip(groups, chosen, strict=True):
        silence(group, slots)
    before = outputs(calls)
    for group, (slots, _) in zip(groups, chosen, strict=True):
        recycle.apply(Reset(slots.tolist()), group, generator=generator)
    worst = change(before, outputs(calls))
    for group, (slots, others) in zip(groups, chosen, strict=True):
        parents = others[torch.randint(len(others), (len(slots),), generator=generator)]
        share = float(torch.rand((), generator=generator)) * 0.9
        recycle.apply(Split(parents.tolist(), slots.tolist(), share=share), group)
    return max(worst, change(before, outputs(calls)))


def _some(group: UnitGroup, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some of the units, at least one, and the others, at least one."""
    count = int(torch.randint(1, group.width, (), generator=generator))
    order = torch.randperm(group.width, generator=generator)
    return order[:count], order[count:]


def _exact(group: UnitGroup) -> bool:
    return group.exact


def _exchangeable(group: UnitGroup) -> bool:
    """Most normalisations do not care about the order of what they mix; those in groups do."""
    return group.exact or "GroupNorm" not in group.why


_LAWS: tuple[tuple[Any, Callable[[UnitGroup], bool]], ...] = (
    (_symmetric, _exchangeable),
    (_gated, _exact),
    (_divisible, _exact),
)


# ---------------------------------------------------------------- what could have been offered

_CONTRACTED = {  # the operands of a product, and the axis of each along which they meet
    "mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2), "dot": (0, 1),
}  # fmt: skip


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every product of data with a parameter: the data, and which parameter elements each of its columns meets."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {p.untyped_storage().data_ptr(): (name, p) for name, p in net.named_parameters()}
        self.met: list[tuple[str, Tensor, Tensor]] = []  # (parameter, data, elements), columns first in both

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _CONTRACTED:
            left, right = (args[i] for i in _CONTRACTED[name])
            self._note(left, left.dim() - 1, right, max(right.dim() - 2, 0))
            self._note(right, max(right.dim() - 2, 0), left, left.dim() - 1)
        elif name == "convolution":
            self._note_convolution(args[0], args[1], transposed=args[6], groups=args[8])
        return func(*args, **(kwargs or {}))

    def _note_convolution(self, data: Tensor, weight: Tensor, *, transposed: bool, groups: int) -> None:
        inside = data.shape[1] // groups
        if groups == 1 or (transposed and inside > 1):
            self._note(data, 1, weight, 0 if transposed else 1)
        elif inside > 1:  # a kernel of one channel belongs to that channel, and consumes nothing
            for part, kernels in zip(data.split(inside, 1), weight.chunk(groups), strict=True):
                self._note(part, 1, kernels, 1)

    def _note(self, data: Tensor, data_axis: int, weight: Tensor, weight_axis: int) -> None:
        found = self.names.get(weight.untyped_storage().data_ptr())
        if found is not None:
            places = torch.arange(weight.untyped_storage().nbytes() // weight.element_size())
            places = places.as_strided(weight.size(), weight.stride(), weight.storage_offset())
            places = places - found[1].storage_offset()
            self.met.append((found[0], _columns(data.detach().clone(), data_axis), _columns(places, weight_axis)))


def _columns(tensor: Tensor, axis: int) -> Tensor:
    """The axis first, everything else flattened behind it."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


Elements = dict[str, Tensor]  # parameter -> flat positions


class Editable:
    """Which rows of a layer could be split into another of its rows without changing any output."""

    def __init__(self, net: nn.Module, calls: Sequence[Call]) -> None:
        self.net, self.calls = net, calls
        self.parameters = dict(net.named_parameters())
        self.vectors = [(n, b) for n, b in net.named_buffers() if b.is_floating_point() and b.dim() == 1]

    def __call__(self, name: str, axis: int, unit: int, others: Sequence[int]) -> bool:
        """Whether the row ``unit`` of a parameter is a unit that can be split into one of ``others``."""
        with kept(self.net) as back:
            found = self._anatomy(name, axis, unit, back)
            for other in others if found else ():
                twin = self._anatomy(name, axis, other, back)
                if found and twin and self._splits(found, twin, back):
                    return True
        return False

    def _anatomy(self, name: str, axis: int, unit: int, back: Callable[[], None]) -> tuple[Elements, Elements] | None:
        """The row's own elements and those that consume it; None where its value reaches an output."""
        used = self._consumers(name, axis, unit, back)
        back()
        if not used:
            return None
        normal = self._gradients()
        self._zero(used)
        silent = self._gradients()
        own: Elements = {}
        for n in normal:
            inside = ((normal[n] != 0) & (silent[n] == 0)).flatten().nonzero()[:, 0]
            if len(inside):
                own[n] = inside
        own |= self._own_statistics(used, back)
        back()
        return own, used

    def _consumers(self, name: str, axis: int, unit: int, back: Callable[[], None]) -> Elements | None:
        used: Elements = {}
        for _ in range(16):
            back()
            self._zero(used)
            before, met = self._record()
            with torch.no_grad():
                self.parameters[name].select(axis, unit).mul_(-0.7).add_(0.3)
            self._zero(used)
            after, met_after = self._record()
            if change(before, after) == 0:
                return used
            grown = False
            for (n, x, places), (_, y, _) in zip(met, met_after, strict=True):
                touched = (x != y).any(1)
                if touched.any():  # the first product that the change reaches: its columns consume the unit
                    wanted = places[touched].flatten().unique()
                    held = used.get(n, wanted[:0])
                    if not torch.isin(wanted, held).all():
                        used[n] = torch.cat([held, wanted]).unique()
                        grown = True
                        break
            if not grown:
                return None
        return None

    def _record(self) -> tuple[list[Tensor], list[tuple[str, Tensor, Tensor]]]:
        with _Products(self.net) as mode:
            found = outputs(self.calls)
        return found, mode.met

    def _zero(self, elements: Elements) -> None:
        with torch.no_grad():
            for name, places in elements.items():
                self.parameters[name].view(-1)[places] = 0.0

    def _gradients(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros(())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for call in self.calls:
                for t in leaves(call()):
                    if t.requires_grad:
                        total = total + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
        if not total.requires_grad:
            return {}
        names = list(self.parameters)
        try:
            given = torch.autograd.grad(total, [self.parameters[n] for n in names], allow_unused=True)
        except RuntimeError:  # written to in place after it was needed: this network cannot be trained at all
            return {}
        return {n: torch.zeros_like(self.parameters[n]) if g is None else g for n, g in zip(names, given, strict=True)}

    def _own_statistics(self, used: Elements, back: Callable[[], None]) -> Elements:
        """Entries of running statistics that matter, and not when the unit is silent."""
        own: Elements = {}
        for name, buffer in self.vectors:
            for place in range(len(buffer)):
                changes = []
                for silent in (used, {}):
                    back()
                    self._zero(silent)
                    before = outputs(self.calls)
                    with torch.no_grad():
                        buffer[place] += 0.5
                    changes.append(change(before, outputs(self.calls)))
                if changes[0] == 0 < changes[1]:
                    own[name] = torch.cat([own.get(name, torch.tensor([], dtype=torch.long)), torch.tensor([place])])
        return own

    def _splits(
        self, unit: tuple[Elements, Elements], slot: tuple[Elements, Elements], back: Callable[[], None]
    ) -> bool:
        back()
        for one, other in zip(unit, slot, strict=True):
            if {n: len(p) for n, p in one.items()} != {n: len(p) for n, p in other.items()}:
                return False
            if all(torch.equal(one[n], other[n]) for n in one):
                return False
        tensors = {**self.parameters, **dict(self.vectors)}
        self._zero(slot[1])
        before = outputs(self.calls)
        with torch.no_grad():
            for name, places in unit[0].items():
                flat = tensors[name].view(-1)
                flat[slot[0][name]] = flat[places]
            for name, places in unit[1].items():
                flat = tensors[name].view(-1)
                columns = flat[places]
                flat[slot[1][name]] = 0.3 * columns
                flat[places] = 0.7 * columns
        same = change(before, outputs(self.calls)) <= EXACT
        back()
        return same
