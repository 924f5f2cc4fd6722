"""Whole layers: how far each is from the output, and interventions that shrink them or let them begin anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.deepening import gaps_of
from recycle.fresh import Init, fresh_layer, knows_its_beginning
from recycle.graph import Axis, Graph, NotRecyclable, UnitGroup, tensor_at
from recycle.injected import is_injected
from recycle.interventions import Renew, Shrink
from recycle.names import did_you_mean
from recycle.tracing import OUTPUT


@dataclass(frozen=True)
class NetworkLayers:
    """The layers of one network, as :class:`recycle.interventions.Layers` describes them."""

    depth: dict[str, int]
    injected: bool = False
    gaps: tuple[str, ...] = ()
    deepened: int = 0


def layers_of(graph: Graph, deepened: int = 0) -> NetworkLayers:
    """The layers of a traced network that can be intervened on; ``deepened``: how often some were inserted already.

    An output layer is one that produces no unit of a group, unless it was frozen for a reason of its own. A layer
    whose groups were excluded from the graph is left out.
    """
    every = _every_group(graph)
    made = {id(group): _owners(group.incoming) for group in every}
    produces = {path for paths in made.values() for path in paths}
    inside = {name.partition("[")[0] for name, why in graph.frozen.items() if why != OUTPUT}
    excluded = {path for group in every if group.name not in graph for path in made[id(group)]}
    depth = {}
    for path, layer in graph.module.named_modules():
        if path not in excluded and any(p.requires_grad for p in layer._parameters.values() if p is not None):
            depth[path] = 0 if path in produces or path in inside else 1
    found = {path for path, far in depth.items() if far}
    far = 1
    while found:
        groups = [group for group in every if _owners(group.outgoing) & found]
        found = {path for group in groups for path in made[id(group)] if depth.get(path) == 0}
        far += 1
        depth |= dict.fromkeys(found, far)
    known = {p: far for p, far in depth.items() if knows_its_beginning(graph.module.get_submodule(p))}
    return NetworkLayers(known, is_injected(graph.module), tuple(gaps_of(graph)), deepened)


def _every_group(graph: Graph) -> list[UnitGroup]:
    """Those of the graph, and those that were traced with them and excluded since."""
    every = {id(group): group for own in graph for group in (own, *own.siblings())}
    return list(every.values())


def _owners(axes: Sequence[Axis]) -> set[str]:
    return {axis.name.rpartition(".")[0] for axis in axes}


@torch.no_grad()
def intervene(
    edit: Shrink | Renew,
    graph: Graph,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[tuple[nn.Module, float]] = (),
    generator: torch.Generator | None = None,
    init: Init | None = None,
) -> None:
    """Make one intervention: weights, optimizer state and Polyak targets together, or nothing at all.

    Args:
        edit: a :class:`recycle.interventions.Shrink` or :class:`recycle.interventions.Renew`.
        graph: what :func:`recycle.trace` found of the network.
        optimizers: every optimizer that holds the parameters; where state is to be fresh it is dropped, so that the
            next step begins with the optimizer's own initial values.
        targets: ``(target network, tau)``. A Polyak average gets the same of its own weights, with the same fresh
            ones; a hard target (``tau`` = 1) is left alone until its next copy.
        generator: source of randomness; None: torch's global one.
        init: how this model initialises; None: each layer's ``reset_parameters``.

    Raises:
        NotRecyclable: it cannot be made as asked; nothing has changed.
    """
    known = layers_of(graph).depth
    for path in edit.layers:
        if path not in known:
            raise NotRecyclable(f"no layer {path!r} to intervene on; {did_you_mean(path, known)}")
    forgets = isinstance(edit, Renew) or edit.moments == "fresh"
    if forgets and any(type(optimizer).__name__ == "LBFGS" for optimizer in optimizers):
        raise NotRecyclable("LBFGS keeps one flat history of all parameters and cannot forget some. Use Adam or SGD")
    if isinstance(edit, Shrink) or edit.weights:
        fresh = {
            f"{path}.{leaf}".lstrip("."): value
            for path in edit.layers
            for leaf, value in fresh_layer(graph.module, path, init, generator).items()
        }
        _write(edit, fresh, graph.module, [module for module, tau in targets if tau < 1])
    if forgets:
        layers = [graph.module.get_submodule(path) for path in edit.layers]
        for parameter in (p for layer in layers for p in layer._parameters.values() if p is not None):
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


def _write(edit: Shrink | Renew, fresh: dict[str, Tensor], module: nn.Module, targets: Sequence[nn.Module]) -> None:
    """Parameters that are trained, and (to begin anew) buffers; what is shared is written once."""
    done: set[int] = set()
    for name, value in fresh.items():
        trained = tensor_at(module, name).requires_grad
        for tensor in [tensor_at(holder, name) for holder in (module, *targets)]:
            is_parameter = isinstance(tensor, nn.Parameter)
            if id(tensor) in done or (is_parameter and not trained):
                continue
            done.add(id(tensor))
            if isinstance(edit, Renew):
                tensor.copy_(value)
            elif is_parameter:
                tensor.mul_(edit.keep).add_(value.to(tensor), alpha=edit.perturb)
