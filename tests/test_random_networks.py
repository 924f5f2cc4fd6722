"""Networks that nobody wrote: whatever :func:`recycle.trace` offers there is right, and it offers most of it."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import recycle

from .completeness import Editable, faults, kept, redraw
from .random_networks import Program, programs

EXAMPLES = 500
MANY = int(os.environ.get("RANDOM_NETWORKS", "20000"))
PARTS = 5
COVERED = 0.8  # of the rows that could be split at least as many are offered; measured: 0.92
PHASES = (Phase.generate, Phase.shrink)
JUDGED = 4  # every so many networks coverage is counted: it costs more than all laws together


def state(net: nn.Module, calls: Any) -> list[Any]:
    """All that tracing must leave alone, as bytes and numbers that compare."""
    numpy = np.random.get_state()
    return [
        *((n, t.detach().clone().numpy().tobytes(), t.requires_grad, t._is_view()) for n, t in net.named_parameters()),
        *((n, t.clone().numpy().tobytes()) for n, t in net.named_buffers()),
        *((n, None if p.grad is None else p.grad.numpy().tobytes()) for n, p in net.named_parameters()),
        *((n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()),
        *(x.numpy().tobytes() for x in calls.held),
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        (numpy[0], numpy[1].tobytes(), *numpy[2:]),
    ]


def check(program: Program, counts: Counter[str]) -> None:
    net, calls = program.build()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = state(net, calls)
    graph = recycle.trace(net, *calls.all)
    assert state(net, calls) == before, "trace left a mark"
    net.eval()
    groups = list(graph)
    for group in groups:
        assert group.exact or len(group.why) >= 8, f"{group.name} is inexact and does not say why"
    everything_is_told(net, graph)
    wrong = faults(groups, net, calls.all, 0)
    assert not wrong, f"{wrong} on its own parameters\n{graph}"
    for other in (1, 2):
        calls.draw(other)
        with kept(net):
            redraw(net, torch.Generator().manual_seed(other))
            wrong = faults(groups, net, calls.all, other)
            assert not wrong, f"{wrong} on parameters and data {other}\n{graph}"
    counts["networks"] += 1
    counts["groups"] += len(groups)
    if counts["networks"] % JUDGED == 0:
        judge(program, net, calls, graph, counts)


def everything_is_told(net: nn.Module, graph: Any) -> None:
    """Every layer whose rows are units is in a group, or frozen with a reason."""
    inside = {axis.name for group in graph for axis in group.incoming}
    for name, p in net.named_parameters():
        layer = name.rpartition(".")[0]
        told = name in inside or any(
            f == layer or f.startswith((name, layer + "[", layer + " (")) for f in graph.frozen
        )
        ruled = isinstance(net.get_submodule(layer), nn.Linear | nn.modules.conv._ConvNd | nn.Embedding)
        if ruled and p.dim() > 1 and "parametrizations" not in name:
            assert told, f"{name} is neither editable nor frozen\n{graph}"
    assert all(len(reason) >= 8 for reason in graph.frozen.values())


def judge(program: Program, net: nn.Module, calls: Any, graph: Any, counts: Counter[str]) -> None:
    """Count rows that could be split, and those of them that are offered."""
    offered: dict[tuple[str, int], set[int]] = {}
    for group in graph:
        for axis in group.incoming:
            offered.setdefault((axis.name, axis.dim), set()).update(axis.index.flatten().tolist())
    parameters = dict(net.named_parameters())
    with kept(net):
        redraw(net, torch.Generator().manual_seed(9), alive=True)
        editable = Editable(net, calls.all)
        for name, axis in program.makers:
            if name not in parameters:
                continue  # a parametrized layer has no weight of its own
            width = parameters[name].shape[axis]
            for unit in {0, width // 2}:
                others = [(unit + k) % width for k in range(1, min(width, 4))]
                if editable(name, axis, unit, others):
                    counts["editable"] += 1
                    known = unit in offered.get((name, axis), ())
                    counts["offered"] += known
                    if not known:
                        counts["missed: " + _reason(graph, name)] += 1


def _reason(graph: Any, name: str) -> str:
    layer = name.rpartition(".")[0] or name
    return next((why for frozen, why in graph.frozen.items() if frozen.startswith(layer)), "not mentioned")


def run(examples: int, number: int) -> Counter[str]:
    """So many random networks, always the same ones for a number."""
    counts: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES
    )
    @given(programs())
    def every(program: Program) -> None:
        check(program, counts)

    every()
    return counts


# One word of each operation that a program may hold.
OPERATIONS = (
    "nn.Linear", "@", "einsum", "bmm", "addmm", "F.linear", "nn.Conv1d", "nn.Conv2d", "nn.ConvTranspose1d",
    "nn.ConvTranspose2d", "groups=2", "reflect", "nn.LSTM(", "nn.GRU(", "nn.RNN(", "nn.LSTMCell", "nn.GRUCell",
    "nn.RNNCell", "bidirectional", "proj_size=1", "scaled_dot_product", "nn.MultiheadAttention", ".unflatten(",
    "weight_norm", "spectral_norm", "nn.Embedding", "nn.PReLU()", "nn.PReLU(4)", "nn.Dropout", "inplace=True",
    "nn.BatchNorm1d", "nn.BatchNorm2d", "nn.GroupNorm", "nn.InstanceNorm", "nn.LayerNorm", "nn.RMSNorm",
    "torch.softmax", ".detach()", ".flip(", ".roll(", "F.pad(", "torch.gather", "torch.index_select", "torch.cat",
    ".chunk(", "F.glu", "repeat_interleave", "pixel_shuffle", ".transpose(", ".permute(", ".flatten(", ".mean(",
    ".amax(", ".sum(", "max_pool", "avg_pool", "interpolate", ".weight.t()", "+=", "def second",
)  # fmt: skip


def test_every_operation_is_drawn() -> None:
    seen: set[str] = set()

    @seed(0)
    @settings(max_examples=1000, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
    @given(programs())
    def every(program: Program) -> None:
        seen.update(word for word in OPERATIONS if word in program.source)

    every()
    assert set(OPERATIONS) - seen == set()


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_is_offered_is_right(part: int) -> None:
    counts = run(EXAMPLES // PARTS, part)
    assert counts["groups"] > 100
    assert counts["offered"] >= COVERED * counts["editable"], counts


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_whatever_is_offered_is_right_in_many_networks(part: int) -> None:
    counts = run(MANY // 10, 1000 + part)
    print({name: count for name, count in counts.items() if ":" not in name})
    assert counts["offered"] >= COVERED * counts["editable"], counts
