"""The oracle over the zoo: what is offered is complete, and a group that is not is found out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import recycle
from recycle.graph import UnitGroup

from .completeness import faults, kept, redraw
from .nets import ZOO

every_net = pytest.mark.parametrize("name", list(ZOO))


@functools.cache
def traced(name: str) -> tuple[nn.Module, Any, Any, Any]:
    """A network of the zoo, its calls on two different inputs, and its graph."""
    spec = ZOO[name]
    net = spec.build()
    calls, others = (spec.calls(net, spec.inputs(torch.Generator().manual_seed(seed))) for seed in (1, 77))
    graph = recycle.trace(net, *calls)
    return net.eval(), calls, others, graph


@every_net
def test_what_is_offered_is_complete(name: str) -> None:
    net, calls, others, graph = traced(name)
    groups = [group for group in graph if group.width > 1]
    assert not faults(groups, net, calls, 0)
    with kept(net):
        for seed in (1, 2):
            redraw(net, torch.Generator().manual_seed(seed))
            assert not faults(groups, net, others, seed)


# What a group names and no output depends on: a bias that the next operation takes away again, the recurrent
# weights of a direction of which only the first step is read, the bias of keys, which adds the same to all scores.
NO_MATTER = {
    "batchnorm_without_memory": "0.bias",
    "group_norm": "3.bias",
    "heads_by_hand": "k.bias",
    "heads_of_a_fixed_size": "k.bias",
    "queries_that_share_keys": "k.bias",
    "two_lstm_layers": "lstm.weight_hh_l1_reverse",
}


def mutants(group: UnitGroup) -> Iterator[tuple[str, UnitGroup]]:
    """The group with one thing forgotten, or two units mistaken for one another in one tensor."""
    for side in ("incoming", "outgoing"):
        axes = getattr(group, side)
        for i, axis in enumerate(axes):
            rest = (*axes[:i], *axes[i + 1 :])
            if axis.role != "buffer":
                yield f"{axis.name} forgotten", replace(group, **{side: rest})
            index = axis.index.clone()
            index[[0, 1]] = index[[1, 0]]
            mistaken = replace(axis, index=index)
            yield f"{axis.name} mistaken", replace(group, **{side: (*axes[:i], mistaken, *axes[i + 1 :])})
            if axis.span > 1:
                partly = replace(axis, index=axis.index[:, 1:])
                yield f"{axis.name} in part", replace(group, **{side: (*axes[:i], partly, *axes[i + 1 :])})


@every_net
def test_a_group_that_lacks_something_is_found_out(name: str) -> None:
    net, calls, _, graph = traced(name)
    survivors = []
    with kept(net):
        redraw(net, torch.Generator().manual_seed(1))
        for group in graph:
            if "GroupNorm" in group.why:
                continue  # its units cannot change places
            for what, mutant in mutants(group):
                if what.split()[0] != NO_MATTER.get(name) and not faults([mutant], net, calls, 0):
                    survivors.append(f"{group.name}: {what}")
    assert not survivors
