"""Change how many units a group has: tensors, layers' sizes, optimizer state, target networks and the graph follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle import optimizers as optimizer_state
from recycle.graph import Axis, NotRecyclable, UnitGroup, tensor_at

FEWEST = 2
"""A group of fewer units is none: nothing could be split."""


@dataclass(frozen=True)
class Layout:
    """The new order of units, and of the entries that belong to them, along every axis of a group."""

    width: int
    takes: dict[tuple[str, int], Tensor]
    """Tensor name and dim -> old position of each new entry, -1 for a new one."""
    indices: dict[tuple[str, int], Tensor]
    """Tensor name and dim -> entries of each unit, ``(width, span)``."""


def without(group: UnitGroup, units: Sequence[int]) -> Layout:
    """The group without some of its units; the others move up."""
    stays = torch.ones(group.width, dtype=torch.bool)
    stays[list(units)] = False
    takes, indices = {}, {}
    for axis in (*group.incoming, *group.outgoing):
        kept = torch.ones(group.tensor(axis.name).shape[axis.dim], dtype=torch.bool)
        kept[axis.index[~stays].flatten()] = False
        takes[axis.name, axis.dim] = kept.nonzero()[:, 0]
        indices[axis.name, axis.dim] = (kept.cumsum(0) - 1)[axis.index[stays]]
    return Layout(int(stays.sum()), takes, indices)


def with_more(group: UnitGroup, count: int) -> Layout:
    """The group with ``count`` units behind its last one, wherever that one has entries."""
    takes, indices = {}, {}
    for axis in (*group.incoming, *group.outgoing):
        size = group.tensor(axis.name).shape[axis.dim]
        runs = _runs(axis.index[-1].tolist())
        take: list[Tensor] = []
        born: list[list[int]] = [[] for _ in range(count)]
        start = added = 0
        for first, behind in runs:
            take += [torch.arange(start, behind), torch.full((count * (behind - first),), -1)]
            for unit, entries in enumerate(born):
                place = behind + added + unit * (behind - first)
                entries += range(place, place + behind - first)
            start, added = behind, added + count * (behind - first)
        takes[axis.name, axis.dim] = torch.cat([*take, torch.arange(start, size)])
        old = torch.searchsorted(torch.tensor([behind for _, behind in runs]), axis.index, right=True)
        gained = torch.tensor([0, *(count * (behind - first) for first, behind in runs)]).cumsum(0)
        indices[axis.name, axis.dim] = torch.cat([axis.index + gained[old], torch.tensor(born)])
    return Layout(group.width + count, takes, indices)


def _runs(entries: list[int]) -> list[tuple[int, int]]:
    """Stretches of neighbouring positions: ``[(first, behind the last), ...]``."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry:
            runs[-1] = (runs[-1][0], entry + 1)
        else:
            runs.append((entry, entry + 1))
    return runs


@contextmanager
def resized(
    group: UnitGroup, layout: Layout, optimizers: Sequence[Optimizer] = (), targets: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Give ``group`` another layout; new entries are zero, and their optimizer state is fresh.

    The calls are traced again, and every group must be found where the layout puts it. If that fails, or the
    block raises, everything is as before.

    Raises:
        NotRecyclable: the module does not follow (it hard-codes a width, say).
    """
    undo: list[Callable[[], None]] = []
    try:
        with torch.no_grad():
            swapped = _resize_modules((group.module, *targets), layout, undo)
            _follow(group, layout, undo)
            for optimizer in optimizers:
                _resize_state(optimizer, swapped, undo)
        yield
    except BaseException:
        with torch.no_grad():
            for step in reversed(undo):
                step()
        raise


# -- modules -----------------------------------------------------------------------------------------------


def _resize_modules(
    modules: Sequence[nn.Module], layout: Layout, undo: list[Callable[[], None]]
) -> dict[nn.Parameter, tuple[nn.Parameter, dict[int, Tensor]]]:
    """New parameters under the old names, in every place that holds them: ``{old: (new, takes by dim)}``."""
    swapped: dict[nn.Parameter, tuple[nn.Parameter, dict[int, Tensor]]] = {}
    done: set[int] = set()
    for module in modules:
        for name in dict.fromkeys(name for name, _ in layout.takes):
            takes = {dim: take for (of, dim), take in layout.takes.items() if of == name}
            layer = module.get_submodule(name.rpartition(".")[0])
            old = tensor_at(module, name)
            if id(old) in done:  # a layer that two networks share
                continue
            new = _taken(old.detach(), takes, 0.0)
            if isinstance(old, nn.Parameter):
                parameter = nn.Parameter(new, requires_grad=old.requires_grad)
                for holder, key in _places(module, old):
                    _set(holder, key, parameter, undo)
                swapped[old] = parameter, takes
                new = parameter
            else:
                undo.append(_restore_data(old, old.data))
                old.data = new
                new = old
            done.add(id(new))
            for dim in takes:
                for attribute, value in _sizes(layer, name.rpartition(".")[2], dim, old, takes[dim]):
                    _set(layer, attribute, value, undo)
    return swapped


@torch.no_grad()
def reshape(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], optimizers: Sequence[Optimizer] = ()) -> None:
    """Give a newly built module the shapes of one that was resized, for a state dict to be loaded into.

    Args:
        module: parameters and buffers of other shapes are filled with zeros; layers' sizes follow.
        shapes: name -> shape of every parameter and buffer that differs; others may be named too.
        optimizers: those that hold the parameters; they must not have made a step.

    Raises:
        NotRecyclable: the module has no tensor of that name, or one with another number of axes.
    """
    for name, shape in shapes.items():
        old = tensor_at(module, name)
        if old.dim() != len(shape):
            raise NotRecyclable(f"{name!r} has {old.dim()} axes, the saved one {len(shape)}: is it the same policy?")
        takes = {d: torch.full((n,), -1) for d, n in enumerate(shape) if n != old.shape[d]}
        if takes:
            layout = Layout(0, {(name, dim): take for dim, take in takes.items()}, {})
            swapped = _resize_modules([module], layout, [])
            for optimizer in optimizers:
                _resize_state(optimizer, swapped, [])


def _taken(tensor: Tensor, takes: dict[int, Tensor], fill: float) -> Tensor:
    for dim, take in takes.items():
        take = take.to(tensor.device)
        new = tensor.index_select(dim, take.clamp_min(0))
        tensor = new.index_fill_(dim, (take < 0).nonzero()[:, 0], fill)
    return tensor


def _places(module: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [(m, key) for m in module.modules() for key, held in m._parameters.items() if held is parameter]


def _set(holder: Any, key: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = getattr(holder, key)
    undo.append(lambda: setattr(holder, key, before))
    setattr(holder, key, value)


def _restore_data(tensor: Tensor, data: Tensor) -> Callable[[], None]:
    def step() -> None:
        tensor.data = data

    return step


def _sizes(layer: nn.Module, leaf: str, dim: int, old: Tensor, take: Tensor) -> Iterator[tuple[str, int]]:
    """The attributes in which a layer keeps a tensor's size along ``dim``, with their new values."""
    before, after = old.size(dim), len(take)
    if isinstance(layer, nn.modules.conv._ConvNd):
        names = ["out_channels", "in_channels"][:: -1 if layer.transposed else 1][dim : dim + 1]
        if layer.groups > 1:
            names = ["out_channels", "in_channels", "groups"]  # depthwise
    elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        names = {"weight_ih": ["input_size"], "weight_hh": ["hidden_size"]}.get(leaf[:9], []) if dim == 1 else []
    elif isinstance(layer, nn.GroupNorm):
        names = ["num_channels", "num_groups"]
    elif isinstance(layer, nn.Embedding):
        names = ["embedding_dim"] if dim == 1 else []
    elif old.dim() > 1:
        names = [["out_features", "in_features"][dim]] if dim < 2 else []
    else:
        names = ["num_features", "num_parameters", "out_features"]
    for name in names:
        if getattr(layer, name, None) == before:
            yield name, after


def why_layers_are_fixed(group: UnitGroup) -> str:
    """What is known of a layer kind that cannot change its width, or ""."""
    for axis in (*group.incoming, *group.outgoing):
        owner, _, leaf = axis.name.rpartition(".")
        layer = group.module.get_submodule(owner)
        if isinstance(layer, torch.jit.ScriptModule):
            return f"{owner!r} is scripted, and its sizes are constants of the script"
        shared = isinstance(layer, nn.RNNBase) and (layer.num_layers > 1 or layer.bidirectional or layer.proj_size)
        if shared and not (leaf.startswith("weight_ih_l0") and axis in group.outgoing):
            kind = type(layer).__name__
            return f"{kind} {owner!r} has one hidden_size for all its layers, directions and projections"
        if axis.groups > 1:
            return f"{axis.name!r} is read in groups, whose channels come in equal parts"
    return ""


# -- the graph ---------------------------------------------------------------------------------------------


def _follow(group: UnitGroup, layout: Layout, undo: list[Callable[[], None]]) -> None:
    """Trace again: every group must be where the layout puts it."""
    try:
        found = _by_tensors(group.retrace())
    except NotRecyclable as error:
        raise NotRecyclable(f"with {layout.width} units {error}") from error
    for key, old in _by_tensors(group.siblings()).items():
        new = found.get(key, [])
        for sibling, twin in zip(old, [*new, *[None] * len(old)], strict=False):
            width = layout.width if sibling is group else sibling.width
            if twin is None or twin.width != width or not _as_laid_out(sibling, twin, layout, sibling is group):
                raise NotRecyclable(
                    f"with {layout.width} units in {group.name!r} the units of {sibling.name!r} land elsewhere "
                    "(the module hard-codes a width or shuffles units)"
                )
            before = sibling.width, sibling.incoming, sibling.outgoing
            undo.append(_restore_group(sibling, *before))
            sibling.width, sibling.incoming, sibling.outgoing = twin.width, twin.incoming, twin.outgoing


def _by_tensors(groups: Sequence[UnitGroup]) -> dict[tuple[tuple[str, int], ...], list[UnitGroup]]:
    found: dict[tuple[tuple[str, int], ...], list[UnitGroup]] = {}
    for group in groups:
        key = tuple((axis.name, axis.dim) for axis in (*group.incoming, *group.outgoing))
        found.setdefault(key, []).append(group)
    for several in found.values():
        several.sort(key=lambda group: int(group.incoming[0].index.min()))
    return found


def _as_laid_out(sibling: UnitGroup, twin: UnitGroup, layout: Layout, is_resized: bool) -> bool:
    pairs = zip((*sibling.incoming, *sibling.outgoing), (*twin.incoming, *twin.outgoing), strict=True)
    return all(torch.equal(_expected(axis, layout, is_resized), new.index) for axis, new in pairs)


def _expected(axis: Axis, layout: Layout, is_resized: bool) -> Tensor:
    take = layout.takes.get((axis.name, axis.dim))
    if take is None:
        return axis.index
    if is_resized:
        return layout.indices[axis.name, axis.dim]
    moved = torch.zeros(int(max(take.max(), axis.index.max())) + 1, dtype=torch.long)
    moved[take[take >= 0]] = (take >= 0).nonzero()[:, 0]
    return moved[axis.index]


def _restore_group(
    group: UnitGroup, width: int, incoming: tuple[Axis, ...], outgoing: tuple[Axis, ...]
) -> Callable[[], None]:
    def step() -> None:
        group.width, group.incoming, group.outgoing = width, incoming, outgoing

    return step


# -- optimizers --------------------------------------------------------------------------------------------


def _resize_state(
    optimizer: Optimizer,
    swapped: dict[nn.Parameter, tuple[nn.Parameter, dict[int, Tensor]]],
    undo: list[Callable[[], None]],
) -> None:
    """Hold the new parameters with the state of the old ones; what is new starts as this optimizer starts."""
    for held in optimizer.param_groups:
        before = list(held["params"])
        undo.append(_restore_params(held, before))
        for old in before:
            if old not in swapped:
                continue
            new, takes = swapped[old]
            fresh = {id(state): value for state, _, value in optimizer_state.states([optimizer], old)}
            state = optimizer.state.get(old)
            held["params"] = [new if p is old else p for p in held["params"]]
            if state is not None:
                undo.append(_restore_state(optimizer, old, new, state))
                del optimizer.state[old]
                optimizer.state[new] = {
                    key: _taken(value, takes, fresh[id(value)]) if id(value) in fresh else value
                    for key, value in state.items()
                }


def _restore_params(held: dict[str, Any], before: list[nn.Parameter]) -> Callable[[], None]:
    def step() -> None:
        held["params"] = before

    return step


def _restore_state(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, state: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.state.pop(new, None)
        optimizer.state[old] = state

    return step
