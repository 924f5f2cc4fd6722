"""Find the units of an unmodified module: label them, group them, prove the groups."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recycle.graph import Axis, Graph, NotRecyclable, UnitGroup
from recycle.heads import apart, beyond, place, with_heads
from recycle.kinds import check_arguments
from recycle.labels import UNUSED, UnitLabels
from recycle.outputs import DROPOUT, Call, returned
from recycle.proof import prove, prove_homogeneous, prove_resizable
from recycle.rules import MOVES, RULES

OUTPUT = "reaches the module's output"
"""Why output layers are frozen."""


def trace(module: nn.Module, *calls: Call, heads: bool = True) -> Graph:
    """Find every group of units of ``module`` that can be edited, and say why the others cannot.

    Each call runs the module once, without gradients, through one entry point that training uses:
    ``trace(policy, lambda: policy.evaluate_actions(obs, actions))``. What a call returns is taken to be an
    output, which no edit may change the meaning of. A batch of a few samples is enough. Parameters, buffers,
    gradients, training flags and random states are as before when it returns.

    ``heads``: attention heads are units where that is exact: all rows of a head's queries, keys and values, and its
    columns of the output projection. With False, or where it is not, the channels of a head's values are units.

    Raises:
        TypeError: ``module`` is no module, or there is no call.
        NotRecyclable: a call fails, or the whole ``module`` is a scripted one.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"trace needs a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"trace needs the network inside of {type(module).__name__}: pass net.module, and call that")
    if isinstance(module, torch.jit.ScriptModule):
        raise NotRecyclable("a scripted module names no layers; trace the network that was scripted (parts may be)")
    if not calls or not all(callable(call) for call in calls):
        raise TypeError("trace needs at least one zero-argument call: trace(net, lambda: net(x))")
    check_arguments(trace, "trace", heads=heads)
    with undisturbed(module):
        labels, uses = _labelled(module, calls)
        groups, frozen = _groups(module, labels, uses)
        dropout, reductions = bool(labels.seen & DROPOUT), labels.reductions
        mixed, units = bool(labels.mixed), labels.units
        del labels  # with every activation of the calls
        blocks, still = _mixed_groups(module, calls, units) if heads and mixed else ([], {})
        whole = beyond(blocks, groups)
        others = apart(groups, whole)
        proved = partial(prove, module=module, calls=calls, dropout=dropout, reductions=reductions)
        tried = proved([*whole, *others])
        whole = [head for head in whole if head.name not in tried]
        failed = {group.name: tried[group.name] for group in others if group.name in tried}
        failed |= proved([g for g in apart(groups, whole) if g not in others])
    kept = [group for group in groups if group.name not in failed]
    for group in groups:
        if group.name in failed:
            _refuse(module, group.name, group.incoming, failed[group.name], frozen, {g.name for g in kept})
    kept, frozen = with_heads(whole, kept, frozen, still)
    later = _Later(module, calls, kept, whole)
    for group in kept:
        group.prove_homogeneous, group.prove_resizable = later.homogeneous, later.resizable
        group.siblings, group.retrace, group.calls = later.siblings, later.retrace, calls
    return Graph(module, kept, frozen, calls, lambda: trace(module, *calls, heads=heads))


class _Later:
    """What groups ask of the traced calls when somebody asks it of them."""

    def __init__(
        self, module: nn.Module, calls: Sequence[Call], groups: Sequence[UnitGroup], heads: Sequence[UnitGroup]
    ) -> None:
        self.module, self.calls, self.groups = module, calls, groups
        self.heads = {place(head) for head in heads}

    def siblings(self) -> Sequence[UnitGroup]:
        return self.groups

    def homogeneous(self, group: UnitGroup) -> bool:
        with undisturbed(self.module):
            return prove_homogeneous(group, self.module, self.calls)

    def resizable(self, group: UnitGroup) -> str:
        with undisturbed(self.module):
            return prove_resizable(group, self.module, self.calls)

    def retrace(self) -> Sequence[UnitGroup]:
        with undisturbed(self.module):
            labels, uses = _labelled(self.module, self.calls)
            groups, frozen = _groups(self.module, labels, uses)
            if not self.heads:
                return groups
            blocks, still = _mixed_groups(self.module, self.calls, labels.units)
            heads = [block for block in beyond(blocks, groups) if place(block) in self.heads]
            return with_heads(heads, groups, frozen, still)[0]


def _labelled(
    module: nn.Module, calls: Sequence[Call], blocks: Tensor | None = None
) -> tuple[UnitLabels, Counter[str]]:
    """Run every call under labels; also how often each layer was called as a layer."""
    labels = UnitLabels(module, RULES, MOVES, blocks)
    uses: Counter[str] = Counter()
    for call in calls:
        try:
            with torch.no_grad(), labels, _counting(module, uses):
                result = call()
        except Exception as error:
            raise NotRecyclable(f"the traced call fails: {type(error).__name__}: {error}") from error
        for tensor in returned(result):
            labels.use_mixture(tensor)
            labels.freeze(labels.of(tensor), OUTPUT, override=True)
    return labels, uses


def _mixed_groups(module: nn.Module, calls: Sequence[Call], units: Tensor) -> tuple[list[UnitGroup], dict[str, str]]:
    """Groups where units that products of activations mix, such as queries and keys, are one: attention heads.

    What froze a part of a head (a rotation, a norm inside of it) may be right for the whole: another run tells.
    """
    for _ in range(_RUNS):
        labels, uses = _labelled(module, calls, units)
        if not labels.hindered or torch.equal(labels.units, units):
            return _groups(module, labels, uses)
        units = labels.units
    return [], {}


_RUNS = 6


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run calls and leave no mark: random states, buffers and flags come back; fused kernels stay off."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    held = [(m, dict(m._buffers)) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    still = [m for m in module.modules() if m.training and isinstance(m, _STOCHASTIC)]
    fused = [enabled() for enabled, _ in _FUSED]
    try:
        for layer in still:
            layer.training = False
        for _, enable in _FUSED:
            enable(False)
        yield
    finally:
        for (_, enable), before in zip(_FUSED, fused, strict=True):
            enable(before)
        for layer in still:
            layer.training = True
        for owner, kept in held:
            owner._buffers.update(kept)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


# Fused kernels, which no rule sees through: whether they are in use, and how to say so.
_FUSED: tuple[tuple[Callable[[], bool], Callable[[bool], object]], ...] = (
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


@contextmanager
def _counting(module: nn.Module, uses: Counter[str]) -> Iterator[None]:
    """Count how often each layer is called as a layer, rather than its weight used directly."""

    def count(name: str, layer: nn.Module, inputs: Any) -> None:
        uses[name] += 1

    handles = [
        layer.register_forward_pre_hook(partial(count, name))
        for name, layer in module.named_modules()
        if (hasattr(layer, "weight") or isinstance(layer, (nn.RNNBase, nn.RNNCellBase)))
        and not isinstance(layer, torch.jit.ScriptModule)  # which take no hook
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_STOCHASTIC = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RNNBase,
)


# -- from labels to groups ---------------------------------------------------------------------------------


def _groups(module: nn.Module, labels: UnitLabels, uses: Mapping[str, int]) -> tuple[list[UnitGroup], dict[str, str]]:
    """Units with the same places in the same tensors form a group."""
    roots = labels.units
    reasons = _by_root(labels.frozen, roots)
    columns = _agreed_columns(labels, reasons)
    rows = {key: labels.root(row.labels) for key, row in labels.rows.items()}
    _freeze_conflicts(module, labels, rows, columns, reasons)
    for vector in rows.values():  # a head is a head, whatever else meets some of its units
        if any(reasons.get(u) == OUTPUT for u in vector.tolist()):
            reasons.update({u: OUTPUT for u in vector.tolist() if u in reasons})
    entries = [*((key, vector, True) for key, vector in rows.items()),
               *((key, vector, False) for key, vector in columns.items())]  # fmt: skip
    units = torch.unique(roots[1:])
    groups: list[UnitGroup] = []
    frozen: dict[str, str] = {}
    if not len(units) or not entries:
        _mention_the_rest(module, labels, groups, frozen)
        return groups, frozen
    texts = {text: number for number, text in enumerate(["", *dict.fromkeys(reasons.values())])}
    why = torch.tensor([texts[reasons.get(u, "")] for u in units.tolist()])
    mixed = _by_root(labels.inexact, roots)
    vectors = [*(vector for _, vector, _ in entries), *labels.kinds]
    kinds = _kinds(vectors, torch.zeros(len(roots), dtype=torch.int64).scatter(0, units, why))[units]
    order = torch.argsort(kinds, stable=True)
    members_of = units[order].split(torch.unique(kinds, return_counts=True)[1].tolist())
    inside: NDArray[np.bool_] = np.zeros(len(roots), dtype=bool)
    inside[[int(members[0]) for members in members_of]] = True  # a vector that holds one of a kind holds them all
    held_by: dict[int, list[tuple[tuple[str, int], Tensor, bool]]] = {}
    for entry in entries:
        held = entry[1].numpy()
        for unit in dict.fromkeys(held[inside[held]].tolist()):
            held_by.setdefault(unit, []).append(entry)
    inside[:] = False
    for members in sorted(members_of, key=lambda units: int(units[0])):
        inside[members.numpy()] = True
        axes = [(key, _index(vector, inside), made) for key, vector, made in held_by.get(int(members[0]), [])]
        inside[members.numpy()] = False
        incoming = tuple(Axis(key[0], key[1], index, labels.rows[key].role) for key, index, made in axes if made)
        outgoing = tuple(_consumer(module, key, index, labels, uses) for key, index, made in axes if not made)
        if not any(axis.role == "weight" for axis in incoming):
            continue
        name = _name(module, incoming, set(frozen) | {g.name for g in groups})
        reason = reasons.get(int(members[0]), "")
        reason = reason or ("" if outgoing else "nothing consumes it through a weight")
        reason = reason or ("" if len(members) > 1 else "one unit alone has nothing to be split with")
        if reason:
            _refuse(module, name, incoming, reason, frozen, {g.name for g in groups})
            continue
        blend = next((mixed[u] for u in members.tolist() if u in mixed), "")
        group = UnitGroup(name, len(members), incoming, outgoing, module, not blend, blend, int(members[0]))
        read = set().union(*(labels.values_of(labels.columns[a.name, a.dim], members) for a in outgoing))
        group.one_value = len(read) == 1
        groups.append(group)
    _mention_the_rest(module, labels, groups, frozen)
    return groups, frozen


def _refuse(
    module: nn.Module, name: str, incoming: Sequence[Axis], reason: str, frozen: dict[str, str], taken: set[str]
) -> None:
    """Freeze a group under its own name, and under those of other layers whose units are summed with its own."""
    frozen[name] = reason
    for axis in incoming:
        owner, _, leaf = axis.name.rpartition(".")
        if axis.role == "weight" and leaf == "weight" and name.partition("[")[0] != owner:
            frozen.setdefault(_name(module, [axis], taken), reason)


def _kinds(vectors: Sequence[Tensor], kinds: Tensor) -> Tensor:
    """Refine ``kinds``, one for each unit, until units of a kind stand equally often in every vector."""
    refined = kinds.numpy()
    count = int(refined.max()) + 1
    for vector in map(Tensor.numpy, vectors):
        present = vector[vector > 0]
        found = refined[present] * (vector.size + 1) + 1
        if (present[1:] <= present[:-1]).any():  # some more than once, perhaps
            present, times = np.unique(present, return_counts=True)
            found = refined[present] * (vector.size + 1) + times
        if (found == found[:1]).all():
            refined[present] = count
            count += 1
        else:
            refined[present] = count + np.unique(found, return_inverse=True)[1]
            count += len(present)
    return kinds


def _mention_the_rest(
    module: nn.Module, labels: UnitLabels, groups: Sequence[UnitGroup], frozen: dict[str, str]
) -> None:
    """A layer whose units were never labelled, since its weight is computed or read as a whole, is frozen too."""
    told = {axis.name for group in groups for axis in group.incoming}
    told |= {name for name, _ in labels.rows}
    for name, op in labels.shared.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(module.get_submodule(owner), leaf)
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and name not in told:
            layer = owner if owner and leaf == "weight" else name
            frozen.setdefault(layer, f"{name!r} is used by {op} as a whole, not unit by unit")


def _by_root(reasons: dict[int, str], roots: Tensor) -> dict[int, str]:
    """What was said of a unit holds for all that it was joined with; outputs come first."""
    merged: dict[int, str] = {}
    for unit, reason in reasons.items():
        root = int(roots[unit])
        if root not in merged or reason == OUTPUT:
            merged[root] = reason
    return merged


def _agreed_columns(labels: UnitLabels, reasons: dict[int, str]) -> dict[tuple[str, int], Tensor]:
    """One vector for each consumer axis; where calls disagree about a column its units are frozen."""
    agreed = {}
    for (name, dim), columns in labels.columns.items():
        merged = labels.root(columns.labels[0]).clone()
        for seen in map(labels.root, columns.labels[1:]):
            settled = torch.where(merged < 0, seen, merged)
            clash = (seen >= 0) & (merged >= 0) & (seen != merged)
            for unit in torch.unique(torch.cat([seen[clash], merged[clash]])).tolist():
                if unit > 0:
                    reasons.setdefault(unit, f"the calls disagree about what column {dim} of {name!r} reads")
            merged = settled
        agreed[name, dim] = merged.masked_fill(merged == UNUSED, 0).clamp_min(0)
    return agreed


def _freeze_conflicts(
    module: nn.Module,
    labels: UnitLabels,
    rows: dict[tuple[str, int], Tensor],
    columns: dict[tuple[str, int], Tensor],
    reasons: dict[int, str],
) -> None:
    """Parameters with a second use that an edit would disturb."""
    buffers = dict(module.named_buffers())
    parameters = dict(module.named_parameters())

    def freeze(vector: Tensor, reason: str) -> None:
        for unit in torch.unique(vector[vector > 0]).tolist():
            reasons.setdefault(unit, reason)

    for (name, dim), vector in (*rows.items(), *columns.items()):
        tied = [d for n, d in rows if n == name and d != dim] if (name, dim) in rows else []
        tied += [d for n, d in columns if n == name and d != dim] if (name, dim) in columns else []
        both = (name, dim) in rows and (name, dim) in columns and bool((columns[name, dim] > 0).any())
        if both or tied:
            freeze(
                vector,
                f"{name!r} is tied: it makes units in one place and is used the other way round in another",
            )
        if name in labels.shared:
            freeze(vector, f"{name!r} is also used by {labels.shared[name]}, as a whole")
        held = parameters.get(name)
        if held is not None and not held.requires_grad:
            freeze(vector, f"{name!r} has requires_grad=False")
        weight = (name, dim) in columns or ((name, dim) in labels.rows and labels.rows[name, dim].role == "weight")
        if name in buffers and weight:
            freeze(vector, f"{name!r} is a buffer, which no optimizer trains")


def _index(vector: Tensor, inside: NDArray[np.bool_]) -> Tensor:
    """Positions in ``vector`` of each unit that is ``inside`` a group, ``(units, span)``."""
    units = vector.numpy()
    place = np.flatnonzero(inside[units])
    order = np.argsort(units[place], kind="stable")
    return torch.from_numpy(place[order].reshape(int(inside.sum()), -1))


def _consumer(
    module: nn.Module, key: tuple[str, int], index: Tensor, labels: UnitLabels, uses: Mapping[str, int]
) -> Axis:
    name, dim = key
    columns = labels.columns[key]
    owner, _, leaf = name.rpartition(".")
    weight = getattr(module.get_submodule(owner), leaf)
    bias = None
    if not columns.batched and len(set(columns.biases)) == 1 and len(columns.biases) == columns.calls:
        owner, _, leaf = columns.biases[0].rpartition(".")
        held = getattr(module.get_submodule(owner), leaf)
        whole = weight.dim() > 1 and held.numel() == weight.shape[1 if dim == 0 else 0]
        alone = labels.reads[columns.biases[0]] == columns.calls  # no other use would see what a fold adds
        bias = columns.biases[0] if whole and alone and held.requires_grad else None
    hooked = uses.get(name.rpartition(".")[0], 0) == columns.calls
    return Axis(name, dim, index, "consumer", bias, columns.padded, frozenset(columns.sources), hooked, columns.groups)


def _name(module: nn.Module, incoming: Sequence[Axis], taken: set[str]) -> str:
    """Path of the first producer, with ``[a:b]`` when the group is only a part of it."""
    first = next(axis for axis in incoming if axis.role == "weight")
    owner, _, leaf = first.name.rpartition(".")
    layer: Any = module.get_submodule(owner)
    alone = isinstance(layer, nn.RNNCellBase)
    alone |= isinstance(layer, nn.RNNBase) and layer.num_layers == 1 and not layer.bidirectional
    name = owner if owner and (leaf == "weight" or alone) else first.name
    entries = first.index.flatten().sort().values.tolist()
    tensor = getattr(layer, leaf)
    if len(entries) < tensor.shape[first.dim]:
        tight = entries[-1] - entries[0] + 1 == len(entries)
        name += f"[{entries[0]}:{entries[-1] + 1}]" if tight else f"[{','.join(map(str, first.index[:, 0].tolist()))}]"
    return name if name not in taken else f"{name} ({first.name})"
