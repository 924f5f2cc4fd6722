"""Plasticity injection: give a network a new head beside its own, without changing what it says (Nikishin et al. 2023).

The head is the last hidden layer and the output layers behind it. Both are wrapped where they stand, so whatever the
forward pass does between them is done to the old, the new and the subtracted head alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.fresh import Init, fresh_layer
from recycle.graph import Axis, Graph, NotRecyclable, UnitGroup, plain
from recycle.injected import Injected, InjectedHidden, InjectedOutput, is_injected
from recycle.layers import layers_of
from recycle.outputs import difference, outputs, tolerance
from recycle.tracing import undisturbed


@torch.no_grad()
def inject(
    graph: Graph,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
    init: Init | None = None,
) -> None:
    """Freeze every head of a traced network and put a new one beside it that is trained; or change nothing at all.

    The output stays as it was, which is proved on the traced calls; trace the network again behind it.

    Args:
        graph: what :func:`recycle.trace` found of the network; heads of excluded groups stay as they are.
        optimizers: every optimizer that holds the parameters: they hold the new ones in the place of the frozen.
        targets: target networks, whatever their ``tau``: each gets the same new head beside its own old one.
        generator: source of randomness; None: torch's global one.
        init: how this model initialises; None: each layer's ``reset_parameters``.

    Raises:
        NotRecyclable: no head is made of plain Linear layers, one was injected before, or the output would change.
    """
    if is_injected(graph.module):
        raise NotRecyclable("plasticity has been injected already; a head is injected once")
    heads = _heads(graph)
    fresh = {path: _fresh(graph.module, path, init, generator) for path in heads}
    undo: list[Callable[[], None]] = []
    swapped: dict[nn.Parameter, nn.Parameter] = {}
    before = _said(graph)
    for module in (graph.module, *targets):
        for path, kind in heads.items():
            swapped |= _wrap(module, path, kind, copy.deepcopy(fresh[path]), undo)
    change = difference(before, _said(graph))
    if change > tolerance(before):
        for step in reversed(undo):
            step()
        raise NotRecyclable(f"injecting would change the output by {change:.1e}: no trial of the heads is exact")
    hold(optimizers, swapped)


def wrap_again(module: nn.Module, kinds: dict[str, type[Injected]], optimizers: Sequence[Optimizer]) -> None:
    """Give a newly built module the injected layers of a saved one, for a state dict to be loaded into.

    Args:
        module: holds a Linear layer at each path.
        kinds: path of each injected layer -> what it is.
        optimizers: those that hold the parameters; they must not have made a step.
    """
    swapped: dict[nn.Parameter, nn.Parameter] = {}
    for path, kind in kinds.items():
        swapped |= _wrap(module, path, kind, copy.deepcopy(module.get_submodule(path)), [])
    hold(optimizers, swapped)


def hold(optimizers: Sequence[Optimizer], swapped: dict[nn.Parameter, nn.Parameter]) -> None:
    """Let optimizers hold other parameters in the places of frozen ones, whose state they forget."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [swapped.get(parameter, parameter) for parameter in group["params"]]
        for parameter in swapped:
            optimizer.state.pop(parameter, None)


def _heads(graph: Graph) -> dict[str, type[Injected]]:
    """Every layer to wrap, by path, and into what."""
    depth = layers_of(graph).depth
    found: dict[str, type[Injected]] = {}
    why = "it has no hidden layer before its output"
    for group in graph:
        if any(depth.get(path) == 2 for path in _paths(group.incoming)):
            reason = _why_not(group, depth)
            if reason:
                why = f"{group.name!r}: {reason}"
                continue
            found |= dict.fromkeys(_paths(group.incoming), InjectedHidden)
            found |= dict.fromkeys(_paths(group.outgoing), InjectedOutput)
    if not found:
        raise NotRecyclable(f"no plasticity can be injected into this network: {why}")
    return found


def _why_not(group: UnitGroup, depth: dict[str, int]) -> str:
    if not group.exact:
        return group.why
    incoming, outgoing = _paths(group.incoming), _paths(group.outgoing)
    if len(incoming) > 1:
        return f"its units also belong to {', '.join(incoming[1:])}"
    for path in (*incoming, *outgoing):
        layer = group.module.get_submodule(path)
        if not isinstance(layer, nn.Linear) or not plain(layer):
            return f"{path!r} is a {type(layer).__name__}, no plain Linear"
        if layer._forward_hooks or layer._forward_pre_hooks:
            return f"{path!r} carries hooks that would see another layer"
    if any(depth.get(path) != 1 for path in outgoing):
        return "its units are read by hidden layers too"
    for axis in (*group.incoming, *group.outgoing):
        whole = torch.equal(axis.index[:, 0], torch.arange(group.tensor(axis.name).shape[axis.dim]))
        if axis.span != 1 or not whole:
            return f"{axis.name!r} does not read its units in order and alone"
    if any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p for layer in group.module.modules()):
        return "dropout would hit the new head and its copy in different places"
    return ""


def _paths(axes: Sequence[Axis]) -> list[str]:
    return list(dict.fromkeys(axis.name.rpartition(".")[0] for axis in axes))


def _fresh(module: nn.Module, path: str, init: Init | None, generator: torch.Generator | None) -> nn.Linear:
    layer = copy.deepcopy(module.get_submodule(path))
    assert isinstance(layer, nn.Linear)
    for leaf, value in fresh_layer(module, path, init, generator).items():
        getattr(layer, leaf).copy_(value)
        getattr(layer, leaf).grad = None
    return layer


def _said(graph: Graph) -> list[Tensor] | str:
    with undisturbed(graph.module), torch.no_grad():
        return outputs(graph.calls)


def _wrap(
    module: nn.Module, path: str, kind: type[Injected], new: nn.Module, undo: list[Callable[[], None]]
) -> dict[nn.Parameter, nn.Parameter]:
    """Put a wrapped layer in every place that holds the old one. Returns old parameter -> new one."""
    old = module.get_submodule(path)
    assert isinstance(old, nn.Linear) and isinstance(new, nn.Linear)
    trained = [parameter.requires_grad for parameter in old.parameters()]
    gradients = [parameter.grad for parameter in old.parameters()]
    wrapped = kind(old, new)
    wrapped.train(old.training)
    places = [
        (m, key) for m in module.modules() for key, held in m._modules.items() if held is old and m is not wrapped
    ]
    for holder, key in places:
        holder._modules[key] = wrapped

    def restore() -> None:
        for holder, key in places:
            holder._modules[key] = old
        for parameter, was, gradient in zip(old.parameters(), trained, gradients, strict=True):
            parameter.requires_grad_(was)
            parameter.grad = gradient

    undo.append(restore)
    return dict(zip(old.parameters(), new.parameters(), strict=True))
