"""Which tensor elements belong to which unit: run the same operations on integer labels.

Beside every activation stands an ``int64`` tensor of the same shape whose entries name the unit that each
element is. Below autograd a network is a small, closed set of aten operations, whatever Python wrote, so a
:class:`torch.utils._python_dispatch.TorchDispatchMode` sees them all. Labels are kept per *storage*: every
view of a tensor is then a view of its labels, and writes in place follow, with no rule for either.

:class:`UnitLabels` holds the labels and what was learnt; ``recycle/rules.py`` says what each operation does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

NONE = 0
"""Label of an element that is no unit: data, or something computed from it."""
UNIFORM = -1
"""Label of a constant that is the same for every unit: padding, an initial state of zeros."""
UNUSED = -2
"""Mark of a parameter column that no call has read."""

Rule = Callable[["UnitLabels", Any, tuple[Any, ...], dict[str, Any], Any], None]


@dataclass(frozen=True)
class View:
    """How a tensor reads a parameter or buffer: ``dims[i]`` is ``(dim, start, step)`` of its i-th axis.

    ``None`` stands for an axis that repeats (size 1, or expanded) or that spans several of the parameter's.
    """

    name: str
    dims: tuple[tuple[int, int, int] | None, ...]


@dataclass
class Columns:
    """One axis of a parameter that is contracted against activations: what its columns consume."""

    labels: list[Tensor] = field(default_factory=list)  # each (size of the axis,), one per disagreeing call
    calls: int = 0
    groups: int = 1  # of a convolution, whose weight has only the columns of one group
    biases: list[str] = field(default_factory=list)  # the consumer's own bias, once for each call that adds it
    batched: bool = False  # a stack of matrices: a bias is no vector of its rows
    padded: bool = False  # the operation pads with zeros, so a constant input is not constant at the border
    sources: set[tuple[int, ...]] = field(default_factory=set)  # storage, version and place of what was read
    values: list[frozenset[int]] = field(default_factory=list)  # which computed values were read, by each call


@dataclass
class Rows:
    """One axis of a parameter or buffer whose entries belong to units: weight rows, biases, gains."""

    labels: Tensor  # (size of the axis,)
    role: str  # "weight", "bias", "gain" or "buffer"


@dataclass(frozen=True)
class Moment:
    """What stands for a mean, a norm or another value of all units of a layer together: a label of its own.

    Multiplied with or added to just these units it normalises them. Used anywhere else it freezes them.
    """

    units: Tensor  # every unit, in order
    op: str  # which operation made it


class UnitLabels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every unit of ``module`` through the operations that run while it is active.

    After the calls: :attr:`rows` and :attr:`columns` say which parameter elements make and which consume a
    unit, :attr:`frozen` and :attr:`inexact` why units may not, or only approximately, be edited.

    ``blocks``: the :attr:`units` of an earlier run. Units that were one at its end are one from the beginning, and
    units that a product of activations mixes become one as well, where they would be frozen otherwise.
    """

    def __init__(
        self, module: nn.Module, rules: dict[str, Rule], moves: Collection[str], blocks: Tensor | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks = blocks
        self.mixed: set[int] = set()  # units in activations that were multiplied as matrices
        self.rows: dict[tuple[str, int], Rows] = {}
        self.columns: dict[tuple[str, int], Columns] = {}
        self.frozen: dict[int, str] = {}
        self.inexact: dict[int, str] = {}
        self.moments: dict[int, Moment] = {}  # label -> the units that it sums up
        self.reductions: set[Any] = set()  # operations over units that made moments, see `described`
        self.parted: list[Tensor] = []  # units that meet the same data, and no others do
        self._together: dict[bytes, Tensor] = {}  # units that an operation changes together, each set of them once
        self.seen: set[str] = set()  # names of all operations that ran
        self.reads: dict[str, int] = {}  # how many operations read each parameter
        self.shared: dict[str, str] = {}  # parameters that an operation uses as a whole, not unit by unit
        self._rules, self._moves = rules, moves
        self._values: dict[int, frozenset[int]] = {}  # storage -> computed values that it holds
        self._interned: dict[Any, int] = {}
        self._made: list[Tensor] = []  # labels of each computed value
        self._labels: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> (labels, a tensor that keeps it alive)
        self._owners: dict[int, list[tuple[str, Tensor]]] = {}  # storage -> parameters that live in it
        self._computed: dict[int, tuple[dict[str, None], Tensor]] = {}  # storage -> parameters it was computed from
        self._views: dict[Any, View | None] = {}
        self._constants: dict[int, Tensor] = {}
        self._linear: dict[int, Columns] = {}  # storage of a product that still waits for its bias
        self._mixtures: dict[int, tuple[Tensor, str, Tensor]] = {}  # storage -> units, reason, what keeps it alive
        self._minted = 1
        self._parents = np.arange(max(1024, 0 if blocks is None else len(blocks)))  # union-find; of unminted units too
        self._of_vectors: set[int] = set()  # units that are known by a gain or bias alone; others come first
        self._roots: Tensor | None = None
        self._joined = False
        self._buffers = {name for name, _ in module.named_buffers()}
        self.shapes: dict[str, torch.Size] = {}  # of parameters and buffers
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self.shapes[name] = tensor.shape
            self._owners.setdefault(_storage(tensor), []).append((name, tensor))
        for layer in module.modules():
            for tensor in tensors_in([value for key, value in vars(layer).items() if key not in _REGISTERED]):
                self._constants[_storage(tensor)] = tensor  # kept by the module outside of its buffers

    # -- the mode ------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            out = func(*args, **kwargs)
            if func._schema.name == "aten::lift_fresh":  # a literal: torch.tensor([2, 0, 1]), x[:, [2, 0, 1]]
                self._constants[_storage(out)] = out
            return out
        operands = list(tensors_in((args, kwargs)))
        version = {id(t): t._version for t in operands}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self._versions = version
        self.seen.add(name)
        for tensor in operands:
            self.use_mixture(tensor)
            view = self.view_of(tensor)
            if view is not None:
                self.reads[view.name] = self.reads.get(view.name, 0) + 1
        self._note_constants(func, operands, out)
        if any(self._known(t) for t in operands) or name in _CONSTANTS:
            results = list(tensors_in(out))
            same = {_storage(t) for t in operands}
            if not func._schema.is_mutable and results and all(_storage(t) in same for t in results):
                return out  # a view under another name: its labels are there already
            self._rules.get(name, self._rules["default"])(self, func, args, kwargs, out)
            self._note_values(name, func, (args, kwargs), operands, results)
            if name not in self._moves and name not in _PRODUCTS:
                self._note_together(results)
        self._note_computed(operands, out)
        return out

    def _note_values(self, name: str, func: Any, given: Any, operands: list[Tensor], results: list[Tensor]) -> None:
        """Equal computations of equal values are one value; moving data makes none."""
        labelled = [t for t in results if _storage(t) in self._labels]
        if not labelled:
            return
        if name in self._moves:
            held = frozenset().union(*(self._values.get(_storage(t), frozenset()) for t in operands))
        else:
            # a product of other data is the same unit at work; anything else that meets other data is another value
            data = "data" if name in _PRODUCTS else object()
            key = (str(func), described(given, partial(self._describe, data=data)))
            if key not in self._interned:
                self._interned[key] = len(self._made)
                self._made.append(self._labels[_storage(labelled[0])][0])
            held = frozenset({self._interned[key]})
        for tensor in labelled:
            self._values[_storage(tensor)] = held

    def _note_together(self, results: list[Tensor]) -> None:
        """An activation of some units alone, a slice of a layer say: the others are not of their kind."""
        for known in map(self.of, results):
            if known is not None:
                there = np.zeros(len(self._parents) + 1, dtype=bool)  # one place more: UNIFORM is the last
                there[known.cpu().numpy()] = True
                there[[NONE, UNIFORM]] = False
                units = np.flatnonzero(there)
                self._together.setdefault(units.tobytes(), torch.from_numpy(units))

    @property
    def kinds(self) -> list[Tensor]:
        """Sets of units that are not like all others: they meet the same data, or the same activations."""
        return [*map(self.root, self.parted), *(torch.unique(self.root(units)) for units in self._together.values())]

    def _describe(self, tensor: Tensor, data: object) -> Any:
        view = self.view_of(tensor)
        return view or self._values.get(_storage(tensor), "number" if tensor.numel() == 1 else data)

    def values_of(self, columns: Columns, units: Tensor) -> set[frozenset[int]]:
        """Which computed values of ``units`` a consumer reads, in each of its calls."""

        inside = torch.zeros(len(self._parents), dtype=torch.bool)
        inside[units] = True

        def of_units(value: int) -> bool:
            return bool(inside[self.root(self._made[value]).clamp_min(0).cpu()].any())

        return {frozenset(filter(of_units, values)) for values in columns.values}

    def _note_constants(self, func: Any, operands: list[Tensor], out: Any) -> None:
        """Remember tensors whose values cannot depend on the call's data, such as those of ``arange``."""
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not random and all(map(self.constant, operands)):
            for tensor in tensors_in(out):
                self._constants[_storage(tensor)] = tensor

    def _note_computed(self, operands: list[Tensor], out: Any) -> None:
        names: dict[str, None] = {}
        for tensor in operands:
            view = self.view_of(tensor)
            names |= self._computed_from(tensor)
            names |= {} if view is None or view.name in self._buffers else {view.name: None}
        for tensor in tensors_in(out) if names else ():
            key = _storage(tensor)
            if key not in self._owners and not (key in self._labels and bool((self._labels[key][0] > 0).any())):
                self._computed[key] = names, tensor

    def _computed_from(self, tensor: Tensor) -> dict[str, None]:
        return self._computed[_storage(tensor)][0] if _storage(tensor) in self._computed else {}

    def weight(self, tensor: Tensor) -> str:
        """What to call a matrix that is no parameter."""
        names = [repr(name) for name in self._computed_from(tensor)]
        return f"a weight computed from {' and '.join(names)}" if names else "a matrix that is no parameter"

    def constant(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are the same for every input: a parameter, a buffer, or made of constants."""
        key = _storage(tensor)
        return key in self._constants or key in self._owners

    def _known(self, tensor: Tensor) -> bool:
        key = _storage(tensor)
        return key in self._labels or key in self._owners

    # -- labels of a tensor --------------------------------------------------------------------------------

    def of(self, tensor: Any) -> Tensor | None:
        """The labels of ``tensor`` (same shape, each a union's root), or None where it has none."""
        if not isinstance(tensor, Tensor):
            return None
        entry = self._labels.get(_storage(tensor))
        if entry is None:
            return None
        return self.root(entry[0].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()))

    def of_vector(self, tensor: Tensor) -> Tensor | None:
        """Labels of a gain, bias or statistic that is copied before it meets units, one an entry; None otherwise."""
        view = self.view_of(tensor)
        if view is None or tensor.dim() != 1 or len(tensor) < 2 or not tensor.is_floating_point():
            return None
        units = self.produce(view, 0, len(tensor), "buffer" if view.name in self._buffers else "gain")
        self._of_vectors.update([] if units is None else units.tolist())
        return units

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Write ``labels`` (broadcast to its shape) beside ``tensor``."""
        key = _storage(tensor)
        if key in self._owners:
            name = self._owners[key][0][0]
            self.freeze(labels, f"written into {name!r}")
            return
        if key not in self._labels:
            count = tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)
            self._labels[key] = (torch.zeros(count, dtype=torch.int64, device=tensor.device), tensor)
        whole = self._labels[key][0]
        whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(labels)

    def view_of(self, tensor: Any) -> View | None:
        """How ``tensor`` reads one of the module's parameters or buffers, or None where it does not."""
        if not isinstance(tensor, Tensor) or _storage(tensor) not in self._owners:
            return None
        key = (_storage(tensor), tensor.storage_offset(), tensor.size(), tensor.stride())
        if key not in self._views:
            self._views[key] = self._view_of(tensor)
        return self._views[key]

    def _view_of(self, tensor: Tensor) -> View | None:
        for name, owner in self._owners[_storage(tensor)]:
            offset = int(tensor.storage_offset() - owner.storage_offset())
            extent = sum((n - 1) * s for n, s in zip(owner.shape, owner.stride(), strict=True)) + 1
            if owner.numel() and 0 <= offset < extent:
                return View(name, _axes(tensor, owner, offset))
        return None

    def alias(self, copy: Tensor, original: Tensor) -> bool:
        """Let ``copy`` stand for the whole parameter ``original``: a cast under autocast, a clone."""
        for name, owner in self._owners.get(_storage(original), ()):
            if owner.shape == original.shape == copy.shape and owner.stride() == original.stride():
                self._owners.setdefault(_storage(copy), []).append((name, copy))
                self._views.clear()
                return True
        return False

    # -- units ---------------------------------------------------------------------------------------------

    def root(self, labels: Tensor) -> Tensor:
        """``labels`` with every unit replaced by the first of the units it is one with."""
        if not self._joined:
            return labels
        if self._roots is None:
            while (further := self._parents[self._parents] != self._parents).any():
                self._parents[further] = self._parents[self._parents[further]]
            self._roots = torch.from_numpy(self._parents.copy())
        roots = self._roots.to(labels.device)
        return torch.where(labels > 0, roots[labels.clamp_min(0)], labels)

    def _find(self, unit: int) -> int:
        parents = self._parents
        while parents[unit] != unit:
            parents[unit] = parents[parents[unit]]
            unit = parents[unit]
        return int(unit)

    def mint(self, count: int) -> Tensor:
        """``count`` new units, in order: ``(count,)``."""
        first, self._minted = self._minted, self._minted + count
        if self._minted > len(self._parents):
            room = np.arange(2 * self._minted)
            room[: len(self._parents)] = self._parents
            self._parents, self._roots = room, None
        known: Any = [] if self.blocks is None else self.blocks[first : first + count]
        if len(known):
            self._parents[first : first + len(known)] = known
            self._joined, self._roots = True, None
        return torch.arange(first, first + count)

    @property
    def units(self) -> Tensor:
        """The root of every unit minted so far, ``(units + 1,)``; entry 0 is no unit."""
        return self.root(torch.arange(self._minted))

    def join(self, one: Tensor, other: Tensor) -> None:
        """Make units that meet element by element one: a residual sum, a gate."""
        meet = (one > 0) & (other > 0) & (one != other)
        if not meet.any():
            return
        for side in (one, other) if self.moments else ():
            unmeet = torch.isin(side, torch.tensor(self.moments_in(side[meet]), device=side.device))
            self.freeze(side[meet & unmeet], "")
            meet &= ~unmeet
        count = self._minted
        for pair in torch.unique(one[meet] * count + other[meet]).tolist():
            first, second = sorted(
                map(self._find, divmod(pair, count)), key=lambda unit: (unit in self._of_vectors, unit)
            )
            self._parents[second] = first
        self._joined, self._roots = True, None

    def freeze(self, labels: Tensor | None, reason: str, *, override: bool = False) -> None:
        """Never edit the units in ``labels``, and say why."""
        for unit in self._units_in(labels):
            if unit in self.moments:
                self.freeze(self.moments[unit].units, f"{self.moments[unit].op} reduces over the units")
            elif override or unit not in self.frozen:
                self.frozen[unit] = reason

    def blend(self, labels: Tensor | None, reason: str) -> None:
        """Edits of the units in ``labels`` are approximate, and why."""
        for unit in self._units_in(labels):
            self.inexact.setdefault(unit, reason)

    def moment(self, units: Tensor, op: str) -> int:
        """The label of a value computed from all ``units`` together."""
        units = torch.unique(units[units > 0].cpu())
        for label, known in self.moments.items():
            if torch.equal(torch.unique(self.root(known.units)), units):
                return label
        label = int(self.mint(1))
        self.moments[label] = Moment(units, op)
        return label

    def moments_in(self, labels: Tensor) -> list[int]:
        """Labels that are no unit, but a moment of several."""
        return [label for label in self._units_in(labels) if label in self.moments] if self.moments else []

    def freeze_moments(self, labels: Tensor) -> None:
        """What sums up several units meets something else than them: they are frozen."""
        if self.moments:
            self.freeze(torch.tensor(self.moments_in(labels)), "")

    def freeze_if_used(self, result: Tensor, labels: Tensor, reason: str) -> None:
        """Freeze the units in ``labels`` as soon as anything reads ``result``, which mixes them."""
        self._mixtures[_storage(result)] = labels, reason, result

    def use_mixture(self, tensor: Tensor) -> None:
        """Note that ``tensor`` is read: if units are mixed in it, they are frozen."""
        labels, reason, _ = self._mixtures.pop(_storage(tensor), (None, "", None))
        self.freeze(labels, reason)

    def part(self, tables: Tensor) -> None:
        """Units that stand in different rows of ``tables`` meet different data: they are not of a kind."""
        rows = torch.unique(tables.cpu(), dim=0)
        if len(rows) > 1:
            self.parted.extend(rows)

    def _units_in(self, labels: Tensor | None) -> list[int]:
        if labels is None:
            return []
        units = labels[labels > 0]
        found: list[int] = np.unique(units.cpu().numpy()).tolist() if len(units) else []
        return found

    def mix(self, labels: Iterable[Tensor | None]) -> None:
        """Note units in the two factors of a product of activations."""
        for part in labels:
            self.mixed.update(self._units_in(part))

    @property
    def hindered(self) -> bool:
        """Whether something else keeps units from being edited that a product has mixed."""
        roots = self.units
        mixed = {int(roots[unit]) for unit in self.mixed}
        return any(int(roots[unit]) in mixed for unit in (*self.frozen, *self.inexact))

    # -- what operations say -------------------------------------------------------------------------------

    def use_whole(self, tensors: Iterable[Any], op: Any) -> None:
        """Note that ``op`` reads parameters in a way that no unit owns."""
        for tensor in tensors:
            view = self.view_of(tensor)
            if view is not None:
                self.shared.setdefault(view.name, str(op).rsplit(".", 1)[0])

    def produce(self, view: View, axis: int, size: int, role: str = "weight") -> Tensor | None:
        """The units whose incoming weights are the rows of a parameter: ``(size,)``, minted once."""
        place = view.dims[axis]
        if place is None:
            return None
        dim, start, step = place
        rows = self._rows_at(view.name, dim, role)
        part = slice(start, start + step * (size - 1) + 1, step)
        fresh = rows.labels[part] == NONE
        count = int(fresh.sum())
        if count:
            rows.labels[part].masked_scatter_(fresh, self.mint(count))
        return self.root(rows.labels[part])

    def from_statistics(self, operands: Sequence[Any], out: Tensor) -> bool:
        """Label what is computed from one buffer alone, such as the root of a running variance: one unit an entry.

        They become the units that it meets next. False where ``operands`` are anything else.
        """
        buffers = [t for t in operands if (view := self.view_of(t)) is not None and view.name in self._buffers]
        others = [t for t in operands if t is not buffers[0]] if len(buffers) == 1 else operands
        if len(buffers) != 1 or any(t.numel() > 1 or self._known(t) for t in others):
            return False
        buffer, view = buffers[0], self.view_of(buffers[0])
        axes = [i for i, size in enumerate(buffer.shape) if size > 1]
        if view is None or len(axes) != 1 or out.shape != buffer.shape or not buffer.is_floating_point():
            return False
        units = self.produce(view, axes[0], buffer.shape[axes[0]], role="buffer")
        if units is None or _storage(out) in self._owners:
            return False
        self.put(out, units.to(out.device).reshape([-1 if i == axes[0] else 1 for i in range(out.dim())]))
        return True

    def _rows_at(self, name: str, dim: int, role: str) -> Rows:
        if (name, dim) not in self.rows:
            self.rows[name, dim] = Rows(torch.zeros(self.shapes[name][dim], dtype=torch.int64), role)
        return self.rows[name, dim]

    def own(self, view: View, axis: int, labels: Tensor, role: str, op: Any) -> None:
        """A parameter (or buffer) meets units element by element along ``axis``: its entries are theirs."""
        place = view.dims[axis]
        if place is None:
            self.freeze(labels, f"{op} reads {view.name!r} through a view that no rule covers")
            return
        self.freeze_moments(labels)
        dim, start, step = place
        role = "buffer" if view.name in self._buffers else role
        rows = self._rows_at(view.name, dim, role)
        part = slice(start, start + step * (len(labels) - 1) + 1, step)
        before, labels = self.root(rows.labels[part]), labels.cpu()
        if before.any():  # not the first time that it is read
            self.join(before, labels)
            self.freeze(before[labels == NONE], f"{view.name!r} meets units in one place and other values in another")
        rows.labels[part] = torch.where(labels > 0, labels, before)

    def consume(
        self, view: View, axis: int, labels: Tensor, source: Tensor, *, padded: bool, op: Any, groups: int = 1
    ) -> Columns | None:
        """Activations labelled ``labels`` (one per column) meet a parameter's columns along ``axis``."""
        place = view.dims[axis]
        if place is None:
            self.freeze(labels, f"{op} reads {view.name!r} through a view that no rule covers")
            return None
        self.freeze_moments(labels)
        dim, start, step = place
        size = self.shapes[view.name][dim] * groups
        columns = self.columns.setdefault((view.name, dim), Columns(groups=groups))
        if columns.groups != groups:
            for other in (labels, *columns.labels):
                self.freeze(other, f"the calls read {view.name!r} in {columns.groups} groups and in {groups}")
            return None
        seen = torch.full((size,), UNUSED, dtype=torch.int64)
        seen[start : start + step * (len(labels) - 1) + 1 : step] = labels.cpu()
        if not any(torch.equal(self.root(seen), self.root(old)) for old in columns.labels):
            columns.labels.append(seen)
        columns.calls += 1
        columns.values.append(self._values.get(_storage(source), frozenset()))
        columns.padded |= padded or self._reads_constants(source)
        place = (source.storage_offset(), *source.shape, *source.stride())
        columns.sources.add((_storage(source), self._versions.get(id(source), 0), *map(int, place)))
        return columns

    def _reads_constants(self, source: Tensor) -> bool:
        """Whether zeros were put beside units, by hand or as an initial state: no unit is constant there."""
        entry = self._labels.get(_storage(source))
        return entry is not None and bool((entry[0] == UNIFORM).any())

    def await_bias(self, out: Tensor, columns: Columns) -> None:
        """``out`` is a bare product; a parameter added to it next is that consumer's bias."""
        self._linear[_storage(out)] = columns

    def settle_bias(self, operands: Sequence[Any], op: Any, *, plain: bool) -> None:
        """If ``op`` (``plain``: unscaled) adds a parameter to a bare product, note it as the consumer's bias."""
        products = [self._linear.pop(_storage(t)) for t in operands if _storage_or_none(t) in self._linear]
        views = [v for v in map(self.view_of, operands) if v is not None]
        if plain and op._schema.name in ("aten::add", "aten::add_") and len(products) == len(views) == 1:
            products[0].biases.append(views[0].name)

    def along(self, labels: Tensor, axis: int) -> Tensor | None:
        """The label at each index of ``axis``, ``(size,)``, if it is the same everywhere else; else None."""
        table = labels.movedim(axis, 0).flatten(1) if labels.dim() > 1 else labels[:, None]
        top = table.amax(1)
        steady = (table == top[:, None]) | (table == UNIFORM)
        return top if bool(steady.all()) else None


# Operations that make constants: the same for every unit.
_CONSTANTS = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
    "zero_", "fill_", "scalar_tensor", "zero", "fill", "bernoulli_",
}  # fmt: skip


# Where a module keeps what its named_parameters, named_buffers and modules tell.
_REGISTERED = {"_parameters", "_buffers", "_modules"}

# Operations whose result is a unit's pre-activation, whatever they read.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "embedding"}


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor inside nested arguments or results, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def arguments(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an operation is given, by name."""
    return {**dict(zip((a.name for a in op._schema.arguments), args, strict=False)), **kwargs}


def described(value: Any, tensor: Callable[[Tensor], Any] = lambda t: tuple(t.shape)) -> Any:
    """Nested arguments as something hashable; ``tensor`` says what of a tensor counts."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, dict):
        return tuple((key, described(item, tensor)) for key, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(described(item, tensor) for item in value)
    return repr(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storage_or_none(value: Any) -> int | None:
    return _storage(value) if isinstance(value, Tensor) else None


def _axes(tensor: Tensor, owner: Tensor, offset: int) -> tuple[tuple[int, int, int] | None, ...]:
    """Match each axis of a view with the axis of ``owner`` that it walks along."""
    order = sorted((d for d in range(owner.dim()) if owner.shape[d] > 1), key=owner.stride, reverse=True)
    start = {}
    for d in order:
        start[d], offset = divmod(offset, owner.stride(d))
    found: list[tuple[int, int, int] | None] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        place = None
        for d in order:
            step, rest = divmod(stride, owner.stride(d))
            if size > 1 and step and not rest and start[d] + step * (size - 1) < owner.shape[d]:
                place = (d, start[d], step)
                break
        if size == 1 and owner.shape.count(1) and len(tensor.shape) == len(owner.shape):
            same = [d for d in range(owner.dim()) if owner.shape[d] == 1 and owner.stride(d) == stride]
            place = (same[0], 0, 1) if len(same) == 1 else None
        found.append(place)
    return tuple(found)
