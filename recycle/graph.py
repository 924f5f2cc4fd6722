"""The units of a network: which parameter elements make each one, which consume it, what may be edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from recycle.kinds import check_arguments
from recycle.names import did_you_mean


class NotRecyclable(ValueError):
    """An edit was refused: what was asked, why it cannot be done exactly, what to do instead."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a parameter or buffer whose entries belong to units, and which entries.

    ``index[u]`` are the entries of unit ``u`` along ``dim``: ``(width, span)``. The span is 1 for the rows of
    a Linear layer, height x width for the columns behind a flatten, 4 for the gates of an LSTM.
    """

    name: str
    """Path of the parameter or buffer in the traced module."""
    dim: int
    index: Tensor
    role: str
    """``"weight"``, ``"bias"``, ``"gain"`` or ``"buffer"`` of the units; ``"consumer"`` of their output."""
    bias: str | None = None
    """Of a consumer: the bias added to its result, where there is one."""
    padded: bool = False
    """Of a consumer: it also reads zeros (padding, an initial state), so a constant unit is not constant to it."""
    sources: frozenset[tuple[int, ...]] = frozenset()
    """Of a consumer: which activations it reads; equal sources see equal values."""
    hooked: bool = True
    """Of a consumer: every use of it in the traced calls went through its layer, where a hook sees it."""
    groups: int = 1
    """Of a consumer: it is a convolution in so many groups, or a batch of so many products with blocks of one weight,
    which is ``(out, in / groups, ...)``; ``index`` counts input channels, each read by its own group's rows only."""

    @property
    def span(self) -> int:
        """Entries of one unit along the axis."""
        return self.index.shape[1]

    @cached_property
    def _in_order(self) -> bool:
        """Whether unit u is entry u, as most are."""
        return self.span == 1 and torch.equal(self.index[:, 0], torch.arange(len(self.index), device=self.index.device))

    def size(self, tensor: Tensor) -> int:
        """How many entries there are along the axis, those of other units included."""
        return tensor.shape[self.dim] * self.groups

    def entries(self, units: Tensor, device: torch.device) -> Tensor:
        """Flat positions along ``dim`` of these units, ``(len(units) * span,)``."""
        if self._in_order:
            return units.to(device)
        return self.index.to(device)[units.to(device)].flatten()

    def read(self, tensor: Tensor, units: Tensor) -> Tensor:
        """A copy of the units' elements, ``(units, span, everything else)``."""
        entries = self.entries(units, tensor.device)
        if self.groups > 1:
            parts, place = self._in_groups(tensor, entries)
            return parts[place].reshape(len(units), self.span, tensor.numel() // self.size(tensor))
        part = tensor.index_select(self.dim, entries).movedim(self.dim, 0)
        return part.reshape(len(units), self.span, tensor.numel() // tensor.shape[self.dim])

    def write(self, tensor: Tensor, units: Tensor, values: Tensor) -> None:
        """Overwrite the units' elements in place with ``values``, shaped as :meth:`read` returns them."""
        entries = self.entries(units, tensor.device)
        if self.groups > 1:
            parts, place = self._in_groups(tensor, entries)
            parts[place] = values.reshape(-1, *parts.shape[2:]).to(tensor.dtype)
            return
        rest = [n for d, n in enumerate(tensor.shape) if d != self.dim]
        part = values.reshape(-1, *rest).movedim(0, self.dim)
        tensor.index_copy_(self.dim, entries, part.to(tensor.dtype))

    def fill(self, tensor: Tensor, units: Tensor, value: float) -> None:
        """Overwrite the units' elements in place with one value."""
        if self.groups > 1:
            self.write(tensor, units, torch.full_like(self.read(tensor, units), value))
        else:
            tensor.index_fill_(self.dim, self.entries(units, tensor.device), value)

    def _in_groups(self, tensor: Tensor, entries: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The tensor as ``(group, channel of the group, everything else)``, and where the entries are in it."""
        inside = tensor.shape[self.dim]
        parts = tensor.view(self.groups, -1, *tensor.shape[1:]).movedim(self.dim + 1, 1)
        return parts, (entries // inside, entries % inside)


@dataclass(frozen=True, eq=False)
class Observer:
    """A layer whose input, or output, shows the outputs of units."""

    name: str
    """Path of the layer in the traced module."""
    index: Tensor
    """Positions of each unit along the features or channels, ``(width, span)``."""
    size: int
    """Features or channels that the layer reads, or gives."""
    at_output: bool = False

    @property
    def whole(self) -> bool:
        """Whether the units are all there is, in order."""
        return self.index.shape[1] == 1 and torch.equal(self.index[:, 0], torch.arange(self.size))

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What shows them in a call of the layer. Recurrent layers take and return packed sequences, too."""
        first = output[0] if isinstance(output, tuple) and not hasattr(output, "batch_sizes") else output
        if not self.at_output:
            first = args[0] if args else kwargs.get("input")
        return first if isinstance(first, Tensor) else getattr(first, "data", first)


@dataclass(eq=False)
class UnitGroup:
    """Units that are interchangeable and live in the same tensors: a layer, or a part of one."""

    name: str
    """Path of the first producer; ``[a:b]`` is appended when the group is only a part of it."""
    width: int
    incoming: tuple[Axis, ...]
    """Everything a unit owns: weight rows, biases, gains, running statistics."""
    outgoing: tuple[Axis, ...]
    """The columns of every consumer."""
    module: nn.Module = field(repr=False)
    """The traced module, which holds the tensors."""
    exact: bool = True
    why: str = ""
    """Why edits are only approximate, where ``exact`` is False."""
    first: int = 0
    """Where the units come in the forward pass: lower is earlier."""
    one_value: bool = True
    """Whether all consumers read the same value of a unit; False where one reads it before an activation, say."""
    prove_homogeneous: Callable[[UnitGroup], bool] = field(default=lambda group: False, repr=False)
    prove_resizable: Callable[[UnitGroup], str] = field(default=lambda group: "it was not traced", repr=False)
    siblings: Callable[[], Sequence[UnitGroup]] = field(default=tuple, repr=False)
    """All groups that were traced together with this one: a resize moves their entries too."""
    retrace: Callable[[], Sequence[UnitGroup]] = field(default=tuple, repr=False)
    """Finds the groups of the module as it is now, without proof."""
    calls: Sequence[Callable[[], Any]] = field(default=(), repr=False)
    """The calls on which it was traced."""
    _homogeneous: bool | None = field(default=None, repr=False)
    _why_fixed: str | None = field(default=None, repr=False)

    def tensor(self, name: str) -> Tensor:
        """The live parameter or buffer of that path."""
        return tensor_at(self.module, name)

    @property
    def homogeneous(self) -> bool:
        """Whether scaling a unit's incoming weights by c > 0 scales its output by c (ReLU, leaky ReLU).

        Proved on the traced calls, not read off the activation's name.
        """
        if self._homogeneous is None:
            self._homogeneous = self.prove_homogeneous(self)
        return self._homogeneous

    @property
    def resizable(self) -> bool:
        """Whether units can be added and removed; proved by trials on the traced calls when first asked."""
        return not self.why_fixed

    @property
    def why_fixed(self) -> str:
        """Why units can be neither added nor removed, or "" where they can."""
        if self._why_fixed is None:
            self._why_fixed = self.prove_resizable(self)
        return self._why_fixed

    def cost(self, count: int = 1) -> int:
        """Parameters that ``count`` more units would bring to the network."""
        check_arguments(UnitGroup.cost, "cost", count=count)
        spans: dict[str, dict[int, int]] = {}
        for axis in (*self.incoming, *self.outgoing):
            if isinstance(self.tensor(axis.name), nn.Parameter):
                spans.setdefault(axis.name, {})[axis.dim] = axis.span
        total = 0
        for name, span in spans.items():
            shape = self.tensor(name).shape
            total += math.prod(n + count * span.get(d, 0) for d, n in enumerate(shape)) - math.prod(shape)
        return total

    @property
    def parameters(self) -> int:
        """Parameters of the whole network, as it is now."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def fix(self, reason: str) -> None:
        """Let the width be as it is, for a reason outside of the module; "" leaves it to the proof."""
        check_arguments(UnitGroup.fix, "fix", reason=reason)
        if reason:
            self._why_fixed = reason

    @property
    def why_not_foldable(self) -> str:
        """Why a constant unit cannot be moved into its consumers' biases, or "" where it can."""
        for axis in self.outgoing:
            if axis.bias is None:
                return f"consumer {axis.name!r} has no bias of its own"
            if axis.padded:
                return f"consumer {axis.name!r} reads zeros beside the units (padding, an initial state)"
        if not self.one_value:
            return "its consumers read different values of it"
        return ""

    def observers(self) -> list[Observer]:
        """Where hooks see the units' outputs: one place for each distinct value that is consumed.

        Empty where some consumer reads what no hook can see (a bare parameter, an inner layer of a recurrent stack):
        such a group is never recycled.
        """
        seen: set[tuple[int, ...]] = set()
        found = []
        for axis in self.outgoing:
            owner, _, leaf = axis.name.rpartition(".")
            consumer = self.module.get_submodule(owner)
            if axis.hooked and ((leaf == "weight" and plain(consumer)) or _first_recurrent(consumer, leaf)):
                if not axis.sources <= seen:
                    found.append(Observer(owner, axis.index, axis.size(self.tensor(axis.name))))
                seen |= axis.sources
                continue
            width = _recurrent_width(consumer, leaf)
            if not width:
                return []
            offset = width // 2 * leaf.endswith("_reverse")
            found.append(Observer(owner, axis.index + offset, width, at_output=True))
        return found

    def norms(self) -> list[Observer]:
        """Normalisations of these units, whose input is the only place to see what an activation before them gave."""
        found = []
        for axis in self.incoming:
            owner, _, leaf = axis.name.rpartition(".")
            layer = self.module.get_submodule(owner)
            mixes = any(type(layer).forward is kind.forward for kind in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
            chosen = leaf == "weight" if mixes and not self.exact else leaf in ("running_var", "ra_var")
            if chosen and self.tensor(axis.name).dim() == 1:
                found.append(Observer(owner, axis.index, len(self.tensor(axis.name))))
        return found

    def shift(self) -> Tensor | None:
        """What a unit that is constant before its batch normalisation gives behind it: ``(width,)``, None without."""
        owners = {norm.name for norm in self.norms()} if self.exact else set()
        for axis in self.incoming:
            if axis.role == "bias" and axis.name.rpartition(".")[0] in owners:
                values: Tensor = axis.read(self.tensor(axis.name).detach(), torch.arange(self.width))[:, 0, 0]
                return values.double().cpu()
        return torch.zeros(self.width, dtype=torch.double) if owners else None

    def producers(self) -> list[tuple[nn.Module, Axis]]:
        """The layers whose outputs are the units' pre-activations, several where branches are summed."""
        found = []
        for axis in self.incoming:
            owner, _, leaf = axis.name.rpartition(".")
            layer = self.module.get_submodule(owner)
            if plain(layer) and leaf == "weight" and axis.role == "weight" and axis.span == 1:
                found.append((layer, axis))
        return found

    def readers(self) -> list[tuple[nn.Module, Axis]] | str:
        """The Linears and convolutions that read the units, one for each outgoing axis, or why hooks cannot see all."""
        found = []
        for axis in self.outgoing:
            owner, _, leaf = axis.name.rpartition(".")
            layer = self.module.get_submodule(owner)
            if not (axis.hooked and leaf == "weight" and plain(layer)):
                return f"{axis.name!r} is read by what is no Linear or convolution of torch's own"
            found.append((layer, axis))
        return found

    def fed(self) -> list[tuple[nn.Module, Axis]]:
        """Layers that make the units, and their weights, where a hook sees what the layer reads.

        Linear layers and convolutions; of recurrent layers the first one's weights of the input (``weight_ih``), whose
        other weights read states.
        """
        found = []
        for axis in self.incoming:
            owner, _, leaf = axis.name.rpartition(".")
            layer = self.module.get_submodule(owner)
            cell = isinstance(layer, nn.RNNCellBase) and leaf == "weight_ih"
            recurrent = isinstance(layer, nn.RNNBase) and leaf in ("weight_ih_l0", "weight_ih_l0_reverse")
            outputs = getattr(layer, "out_features", getattr(layer, "out_channels", None))
            whole = leaf == "weight" and plain(layer) and self.tensor(axis.name).shape[axis.dim] == outputs
            if axis.role == "weight" and (cell or recurrent or whole):
                found.append((layer, axis))
        return found


class Graph:
    """The editable groups of a module, in forward order, and what is frozen and why.

    Iterate over it, or take a group by name: ``graph["layer1"]``. ``print(graph)`` is a table.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[UnitGroup],
        frozen: dict[str, str],
        calls: Sequence[Callable[[], Any]] = (),
        again: Callable[[], Graph] | None = None,
    ) -> None:
        self.module = module
        self.calls = tuple(calls)
        """The calls on which it was traced."""
        self.again = again
        """Traces the module anew, as it is now; None where nobody said how."""
        self.frozen = dict(frozen)
        """Units that no edit may touch: ``{name: reason}``."""
        self._groups = {group.name: group for group in groups}

    def __iter__(self) -> Iterator[UnitGroup]:
        return iter(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._groups

    def __getitem__(self, name: str) -> UnitGroup:
        check_arguments(Graph.__getitem__, "graph[name]", name=name)
        if name in self.frozen:
            raise KeyError(f"{name!r} is frozen: {self.frozen[name]}")
        if name not in self._groups:
            raise KeyError(f"no group {name!r}; {did_you_mean(name, self._groups)}")
        return self._groups[name]

    def knows(self, name: str) -> bool:
        """Whether a group is called ``name`` or stands below it."""
        check_arguments(Graph.knows, "knows", name=name)
        return any(_under(group, name) for group in self._groups)

    def select(self, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None) -> Graph:
        """The same graph with only the groups named in ``include`` and without those in ``exclude``.

        A name stands for itself and for everything below it (``"mlp_extractor"`` for
        ``"mlp_extractor.policy_net.0"``). A name that matches no group is an error.
        """
        include = [include] if isinstance(include, str) else include
        exclude = [exclude] if isinstance(exclude, str) else exclude
        check_arguments(Graph.select, "select", include=include, exclude=exclude)
        for name in (*(include or ()), *(exclude or ())):
            if not self.knows(name):
                raise ValueError(f"no group is called {name!r}; {did_you_mean(name, self._groups)}")
        kept = [
            group
            for group in self
            if (include is None or any(_under(group.name, n) for n in include))
            and not any(_under(group.name, n) for n in exclude or ())
        ]
        return Graph(self.module, kept, self.frozen, self.calls, self.again)

    def __str__(self) -> str:
        rows = [("group", "width", "producers", "consumers", "edits")]
        for group in self:
            made = ", ".join(_shape(a, group.tensor(a.name)) for a in group.incoming)
            used = ", ".join(_shape(a, group.tensor(a.name)) for a in group.outgoing)
            rows.append((group.name, str(group.width), made, used, "exact" if group.exact else group.why))
        sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(c.ljust(n) for c, n in zip(row, sizes, strict=False)), row[-1]]) for row in rows]
        if not len(self):
            lines = ["no group can be edited"]
        longest = max(map(len, self.frozen), default=0)
        lines += ["", "frozen", *(f"  {n.ljust(longest)}  {why}" for n, why in self.frozen.items())] * bool(self.frozen)
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Graph({len(self)} groups, {sum(g.width for g in self)} units, {len(self.frozen)} frozen)"


def per_unit(act: Tensor, layer: nn.Module, index: Tensor | None) -> Tensor:
    """Activations with the units last, one row for each sample and position: ``(values, width)``."""
    return of_units(per_channel(act, layer), index)


def per_channel(act: Tensor, layer: nn.Module) -> Tensor:
    """Activations with the features or channels last, one row for each sample and position: ``(values, channels)``."""
    if act.dim() == 2 and _unit_axis(layer, act) == 1:
        return act
    spatial = act.dim() - _unit_axis(layer, act) - 1
    return act.movedim(act.dim() - spatial - 1, -1).reshape(-1, act.shape[act.dim() - spatial - 1])


def of_units(rows: Tensor, index: Tensor | None) -> Tensor:
    """Columns ``index``, ``(width, span)``, of ``(values, channels)``: ``(values, width)``. None is all in order.

    Where a unit has several they are as many values.
    """
    if index is None:
        return rows
    width, span = index.shape
    columns = rows.index_select(1, index.flatten())
    return columns if span == 1 else columns.reshape(-1, width, span).movedim(2, 1).reshape(-1, width)


def _unit_axis(layer: nn.Module, act: Tensor) -> int:
    """Axis of the features or channels: a convolution's kernel says how many spatial axes follow."""
    if isinstance(layer, nn.Linear):
        return act.dim() - 1
    if isinstance(layer, nn.GroupNorm) or hasattr(layer, "running_var") or hasattr(layer, "ra_var"):
        return 1
    return act.dim() - len(getattr(layer, "kernel_size", ())) - 1


def plain(layer: nn.Module) -> bool:
    """A Linear or convolution whose ``forward`` is torch's own: what its hook sees is what its weight meets."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    own = any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)
    return own and "forward" not in vars(layer)


def _recurrent_width(layer: nn.Module, leaf: str) -> int:
    """Features of a recurrent layer's output, if it shows what the recurrent weight ``leaf`` reads; else 0."""
    if isinstance(layer, nn.RNNCellBase) and leaf == "weight_hh":
        return int(layer.hidden_size)
    if isinstance(layer, nn.RNNBase) and leaf.startswith(f"weight_hh_l{layer.num_layers - 1}"):
        return int(layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
    return 0


def _first_recurrent(layer: nn.Module, leaf: str) -> bool:
    """Whether a weight meets what torch's own recurrent layer or cell is called with."""
    kinds = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    own = any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)
    return own and leaf in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")


def _under(group: str, name: str) -> bool:
    return group == name or (group.startswith(name) and group[len(name)] in ".[")


def _shape(axis: Axis, tensor: Tensor) -> str:
    """``fc.weight[:, 64:128]``: the part of a parameter that a group's entries cover."""
    entries = axis.index.flatten().sort().values.tolist()
    size = axis.size(tensor)
    if len(entries) == size or axis.groups > 1:
        return axis.name
    tight = entries[-1] - entries[0] + 1 == len(entries)
    part = f"{entries[0]}:{entries[-1] + 1}" if tight else f"{len(entries)} of {size}"
    return f"{axis.name}[{':, ' * axis.dim}{part}]"


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The live parameter or buffer of that path.

    Raises:
        NotRecyclable: the module has no tensor of that name (any more).
    """
    if not isinstance(name, str):
        raise TypeError(f"a tensor has a name such as 'fc1.weight', got {name!r}")
    owner, _, leaf = name.rpartition(".")
    try:
        found = getattr(module.get_submodule(owner), leaf)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise NotRecyclable(f"{type(module).__name__} has no tensor {name!r}; trace the module again after changing it")
    return found
