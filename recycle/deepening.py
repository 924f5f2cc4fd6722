"""Insert hidden layers into a network while it trains, without changing what it says: Net2Net's deeper, and its kin.

An insertion changes no parameter and no buffer that is there: the new layer, whatever its kind, is the identity on the
signal that it reads. That is proved on the traced calls, with the network's own parameters and with random ones of
both signs and several sizes. What cannot be the identity is refused: with plain weights ``s(s(x)) = s(x)`` is needed,
which no tanh, GELU, SiLU or leaky ReLU fulfils (``tanh(eps h) / eps`` is off by ``eps^2 |h|^3 / 3``). No noise is
needed to make the new units differ: each reads another signal, so they part at the first step.

The forum thread that asks for this ("Growing network size incrementally", MXNet, 2018) makes two claims about wider
layers that do not hold:

- New weights *near* zero leave the output as it is. With incoming and outgoing weights of ``eps * N(0, 1)`` it moves
  by ``O(eps^2)`` where ``s(0) = 0`` and by ``O(eps)`` elsewhere: on a 5-8-3 network that gains 4 units and outputs of
  order 1, by 13 eps^2 (ReLU), 17 eps^2 (tanh) and 1.0 eps (sigmoid), medians of 20 seeds for eps from 1e-2 to 1e-4.
  :class:`recycle.Grow`, with outgoing weights of zero and random incoming ones, is exact, and its units part.
- The first layer cannot change. The number of its *inputs* cannot; its units are units like any other layer's:
  ``recycle.apply(Grow(4), graph["0"])`` widens it and leaves the output as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.fresh import Init, fresh_layer
from recycle.graph import Graph, NotRecyclable, plain
from recycle.inserted import Branch, parts_of
from recycle.interventions import Deepen
from recycle.kinds import check_arguments
from recycle.names import did_you_mean
from recycle.optimizers import add_beside
from recycle.proof import prove_unchanged
from recycle.tracing import undisturbed

_BETWEEN = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.dropout._DropoutNd,
            nn.Identity)  # fmt: skip
"""What may stand between a layer and its activation."""


@dataclass(frozen=True)
class Insertion:
    """One new hidden layer, in plain values: enough to insert it again, for a saved state to be loaded into."""

    edit: Deepen
    layer: str
    """Path of the layer behind which it stands, at the moment of the insertion."""
    behind: int
    """Entries of that layer's ``nn.Sequential`` from the layer to its activation; the new ones come behind it."""
    reader: str
    """Where ``behind`` is 0: path of the only layer that reads the units. The new ones come in front of it."""


@torch.no_grad()
def deepen(
    edit: Deepen,
    graph: Graph,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
    init: Init | None = None,
) -> list[Insertion]:
    """Insert hidden layers that leave the output as it is, or change nothing at all. ::

        graph = recycle.trace(net, lambda: net(x))
        recycle.deepen(Deepen(["0"]), graph, optimizers=[adam])
        graph = graph.again()

    Where a layer and its activation are entries of one ``nn.Sequential``, the new layer's parts become entries behind
    them, and later ones move up; elsewhere the only layer that reads the units is replaced by an ``nn.Sequential`` of
    the new parts and itself. Paths change with it: trace the network again.

    Args:
        edit: behind which layers, and what is inserted.
        graph: what :func:`recycle.trace` found of the network.
        optimizers: those that hold a neighbour's parameters hold the new ones too, in their places among the module's
            parameters and with fresh state, as if they had been built with them.
        targets: target networks, whatever their ``tau``: each gets the same new layers, the identity there as well.
        generator: source of randomness, for a residual branch's ``U``; None: torch's global one.
        init: how this model initialises that; None: the layer's ``reset_parameters``.

    Returns:
        What was inserted, in order, for :func:`insert_again`.

    Raises:
        NotRecyclable: it cannot be exact, or the module tree has no place for it; nothing has changed.
    """
    check_arguments(
        deepen, "deepen", edit=edit, graph=graph, optimizers=optimizers, targets=targets, generator=generator, init=init
    )
    if any(type(optimizer).__name__ == "LBFGS" for optimizer in optimizers):
        raise NotRecyclable("LBFGS keeps one flat history of all parameters and takes no new ones. Use Adam or SGD")
    if len(set(edit.layers)) < len(edit.layers):
        raise NotRecyclable(f"{', '.join(edit.layers)} names a layer twice. Insert once, trace again, insert again")
    module = graph.module
    gaps = [_gap(graph, path) for path in edit.layers]
    made: list[tuple[Insertion, list[list[nn.Module]]]] = []
    undo: list[Callable[[], None]] = []

    def insert_all() -> None:
        for gap, parts in zip(gaps, built, strict=True):
            here = gap.now(edit, module)
            everywhere = [parts, *(copy.deepcopy(parts) for _ in targets)]
            made.append((here, everywhere))
            for holder, own in zip((module, *targets), everywhere, strict=True):
                _insert(here, gap, holder, own, undo)

    try:
        with undisturbed(module):
            built = [_parts(edit, gap, graph) for gap in gaps]
            reason = prove_unchanged(insert_all, list(graph), module, graph.calls)
        if reason:
            raise NotRecyclable(_refused(edit, edit.layers, reason))
        order = list(module.parameters())
        for gap, (_, everywhere) in zip(gaps, made, strict=True):
            _draw(everywhere, module, init, generator)
            for part in (part for parts in everywhere for part in parts):
                part.train(gap.layer.training)
            for optimizer in optimizers:
                add_beside(optimizer, _parameters(everywhere[0]), gap.neighbours, order, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return [insertion for insertion, _ in made]


def insert_again(module: nn.Module, insertion: Insertion, optimizers: Sequence[Optimizer] = ()) -> None:
    """Give a newly built module a layer that was inserted into a saved one, for a state dict to be loaded into.

    Args:
        module: as the saved one was before the insertion, but for its values.
        insertion: what :func:`deepen` returned.
        optimizers: those that hold the parameters; they must not have made a step.
    """
    layer = module.get_submodule(insertion.layer)
    reader = module.get_submodule(insertion.reader) if insertion.reader else None
    gap = _Gap(layer, insertion.behind, _front(module, insertion.layer, insertion.behind), reader)
    parts = parts_of(insertion.edit, gap.like, gap.width, gap.front)
    _insert(insertion, gap, module, parts, [])
    for part in parts:
        part.train(layer.training)
    for optimizer in optimizers:
        add_beside(optimizer, _parameters(parts), gap.neighbours, list(module.parameters()), [])


# -- where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Gap:
    """A place in the module tree, by the modules around it: insertions elsewhere change paths, not modules."""

    layer: nn.Module
    behind: int
    front: nn.Module | None
    """The activation before the gap, where it is known."""
    reader: nn.Module | None

    @property
    def like(self) -> Any:
        """The Linear layer or convolution whose kind the new one is of."""
        return self.layer if self.reader is None else self.reader

    @property
    def width(self) -> int:
        """Units that the signal in the gap has."""
        sides = ("out_features", "out_channels") if self.reader is None else ("in_features", "in_channels")
        return int(getattr(self.like, sides[self.like.weight.dim() > 2]))

    @property
    def neighbours(self) -> list[nn.Parameter]:
        """Parameters before the gap, and those behind it where they are known."""
        return [*self.layer.parameters(), *([] if self.reader is None else self.reader.parameters())]

    def now(self, edit: Deepen, module: nn.Module) -> Insertion:
        """The place by its present paths."""
        reader = "" if self.reader is None else _path(module, self.reader)
        return Insertion(edit, _path(module, self.layer), self.behind, reader)


def gaps_of(graph: Graph) -> list[str]:
    """Paths of the layers of the graph's groups behind which the module tree has a place, in forward order."""
    found: dict[nn.Module, str] = {}  # by a module beside the place: several layers may make one signal
    for group in graph:
        for path in dict.fromkeys(_owner(axis.name) for axis in group.incoming if axis.role == "weight"):
            try:
                gap = _gap(graph, path)
            except NotRecyclable:
                continue
            found.setdefault(gap.layer if gap.reader is None else gap.reader, path)
    return list(found.values())


def _gap(graph: Graph, path: str) -> _Gap:
    try:
        layer = graph.module.get_submodule(path)
    except AttributeError as error:
        known = [name for name, held in graph.module.named_modules() if plain(held)]
        raise NotRecyclable(f"no layer {path!r} to insert one behind; {did_you_mean(path, known)}") from error
    stack = graph.module.get_submodule(_owner(path))
    if isinstance(stack, nn.Sequential) and plain(layer):
        for behind, entry in enumerate(list(stack)[list(stack).index(layer) + 1 :], 1):
            if _activation_in(entry) is not None:
                return _Gap(layer, behind, _front(graph.module, path, behind), None)
            if not isinstance(entry, _BETWEEN):
                break
    return _Gap(layer, 0, None, _only_reader(graph, path))


def _front(module: nn.Module, path: str, behind: int) -> nn.Module | None:
    """The activation so many entries behind a layer of an ``nn.Sequential``; None where ``behind`` is 0."""
    if not behind:
        return None
    stack: Any = module.get_submodule(_owner(path))
    entries = list(stack)
    return _activation_in(entries[entries.index(module.get_submodule(path)) + behind])


def _activation_in(entry: nn.Module) -> nn.Module | None:
    """The activation that an entry is, or ends with behind normalisations; else None."""
    parts = [part for part in entry.modules() if not isinstance(part, nn.Sequential)]
    ends = parts and type(parts[-1]).__module__ == nn.ReLU.__module__
    return parts[-1] if ends and all(isinstance(part, _BETWEEN) for part in parts[:-1]) else None


def _replaces_entries(holder: nn.Module) -> bool:
    """Whether a module calls what it holds: torch's own layers read weights of theirs, in evaluation at least."""
    ours = isinstance(holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return ours or not (isinstance(holder, torch.jit.ScriptModule) or type(holder).__module__.startswith("torch.nn."))


def _only_reader(graph: Graph, path: str) -> nn.Module:
    """The layer that alone reads a layer's units, all of them and in order."""
    made = [g for g in graph if any(a.role == "weight" and _owner(a.name) == path for a in g.incoming)]
    if not made:
        why = graph.frozen.get(path, "it makes no units of a group")
        raise NotRecyclable(f"no activation stands behind {path!r} in its nn.Sequential, and {why}")
    readers = list(dict.fromkeys(_owner(axis.name) for group in made for axis in group.outgoing))
    axis = made[0].outgoing[0]
    reader = graph.module.get_submodule(readers[0])
    whole = torch.equal(axis.index, torch.arange(axis.size(made[0].tensor(axis.name)))[:, None])
    fixed = [m for m in graph.module.modules() if reader in m._modules.values() and not _replaces_entries(m)]
    if len(readers) > 1:
        why = f"{' and '.join(readers)} read its units"
    elif not plain(reader) or not axis.name.endswith("weight") or not axis.hooked:
        why = f"{axis.name!r} reads its units, which is no Linear layer or convolution that is called as such"
    elif len(made) > 1 or not whole:
        why = f"{axis.name!r} reads other units too, or these several times or in another order"
    elif fixed:
        why = f"{readers[0]!r} belongs to a {type(fixed[0]).__name__}, which may look into it"
    else:
        return reader
    raise NotRecyclable(
        f"no activation stands behind {path!r} in its nn.Sequential, and {why}: there is no place in the module tree"
    )


# -- what --------------------------------------------------------------------------------------------------


def _parts(edit: Deepen, gap: _Gap, graph: Graph) -> list[nn.Module]:
    """The new layer, in evaluation mode, with a normalisation undone on what it reads in the traced calls."""
    path = _path(graph.module, gap.layer)
    if edit.batch_norm and edit.kind != "residual" and gap.layer.training:
        reason = "BatchNorm in training mode computes statistics of each batch, which no gain and shift can undo"
        raise NotRecyclable(_refused(edit, [path], reason))
    try:
        parts = parts_of(edit, gap.like, gap.width, gap.front)
    except NotRecyclable as error:
        raise NotRecyclable(_refused(edit, [path], str(error))) from error
    for part in parts:
        part.eval()
    if edit.batch_norm and edit.kind != "residual":
        first, norm = parts[:2]
        values = first(_signal(gap, graph)).movedim(1, 0).flatten(1)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_mean is not None and norm.running_var is not None
        variance, mean = torch.var_mean(values, 1, correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean)
    return parts


def _signal(gap: _Gap, graph: Graph) -> Tensor:
    """What goes through the gap in the traced calls, ``(samples, units, *positions)``."""
    seen: list[Tensor] = []
    if gap.reader is not None:
        handle = gap.reader.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    else:
        assert gap.front is not None
        handle = gap.front.register_forward_hook(lambda layer, args, output: seen.append(output.detach()))
    try:
        for call in graph.calls:
            call()
    finally:
        handle.remove()
    return torch.cat(seen)


def _draw(
    everywhere: Sequence[Sequence[nn.Module]], module: nn.Module, init: Init | None, generator: torch.Generator | None
) -> None:
    """Fill a residual branch's ``U`` as the network initialises, the same in each target."""
    for part, *twins in zip(*everywhere, strict=True):
        if isinstance(part, Branch):
            drawn = fresh_layer(module, _path(module, part.into), init, generator)
            for branch in (part, *twins):
                for leaf, value in drawn.items():
                    getattr(branch.into, leaf).copy_(value)


def _refused(edit: Deepen, layers: Sequence[str], reason: str) -> str:
    others = [kind for kind in ("pair", "blend", "residual") if kind != edit.kind]
    instead = f". kind={' or '.join(map(repr, others))} may do" if edit.kind == "identity" else ""
    return f"no {edit.kind} layer can be inserted behind {', '.join(map(repr, layers))}: {reason}{instead}"


# -- into the module tree ----------------------------------------------------------------------------------


def _insert(
    here: Insertion, gap: _Gap, module: nn.Module, parts: list[nn.Module], undo: list[Callable[[], None]]
) -> None:
    """Put the parts into a module, at a place that ``gap`` describes in the traced one."""
    try:
        layer, reader = module.get_submodule(here.layer), module.get_submodule(here.reader)
        front = _front(module, here.layer, here.behind)
    except (AttributeError, IndexError) as error:
        raise NotRecyclable(f"a target network is built otherwise: {error}") from error
    if str(front) != str(gap.front) or str(layer) != str(gap.layer):
        raise NotRecyclable(f"a target network is built otherwise at {here.layer!r}: it has {layer} and {front}")
    for parameter in _parameters(parts):
        parameter.requires_grad_(any(p.requires_grad for p in layer.parameters()))
    if here.behind:
        stack: Any = module.get_submodule(_owner(here.layer))
        _into(stack, list(stack).index(layer) + here.behind + 1, parts, undo)
        return
    for holder, key in [(m, k) for m in module.modules() for k, held in m._modules.items() if held is reader]:
        if isinstance(holder, nn.Sequential):
            _into(holder, list(holder).index(reader), parts, undo)
        else:
            wrapped = nn.Sequential(*parts, reader)
            wrapped.training = reader.training
            undo.append(partial(holder._modules.update, {key: reader}))
            holder._modules[key] = wrapped


def _into(stack: nn.Sequential, place: int, parts: Sequence[nn.Module], undo: list[Callable[[], None]]) -> None:
    """New entries of an ``nn.Sequential``; numbered ones behind them move up, named ones keep their names."""
    before = dict(stack._modules)
    numbered = list(before) == [str(i) for i in range(len(before))]
    names = [name for name in (f"inserted{i}" for i in range(len(before) + len(parts))) if name not in before]
    entries = list(before.items())
    entries[place:place] = zip(names, parts, strict=False)
    _refill(stack, {str(i) if numbered else name: held for i, (name, held) in enumerate(entries)})
    undo.append(lambda: _refill(stack, before))


def _refill(stack: nn.Sequential, entries: Mapping[str, Any]) -> None:
    stack._modules.clear()
    stack._modules.update(entries)


def _parameters(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in part.parameters()]


def _path(module: nn.Module, wanted: nn.Module) -> str:
    found: str = next(name for name, held in module.named_modules() if held is wanted)
    return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
