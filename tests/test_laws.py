"""The laws: what holds for every network, whatever an edit or a method does to it.

Nothing here looks at how units are found: the oracles are the networks' outputs,
element-by-element comparison, autograd, and index sets written by hand in `nets.py`.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Fold, Merge, Prune, Reset, Split
from recycle.births import like_init, mirror, revive
from recycle.resize import reshape
from recycle.track import Tracker

from .nets import ZOO, Net, Wire

EXACT = 1e-12  # relative, in float64
REFUSED = (ValueError, TypeError, IndexError, KeyError, NotImplementedError, RuntimeError)

METHODS = sorted(getattr(recycle, "METHODS", {}))

every_net = pytest.mark.parametrize("name", list(ZOO))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small to share: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors of a nested return value."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, the live tensors."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def outputs_of(net: nn.Module, calls: Any, *, training: bool = False) -> list[Tensor]:
    """What all entry points return; buffers are left as they were."""
    kept = {name: b.clone() for name, b in net.named_buffers()}
    mode = net.training
    net.train(training)
    with torch.no_grad():
        found = [y.clone() for call in calls for y in leaves(call())]
        for name, b in net.named_buffers():
            b.copy_(kept[name])
    net.train(mode)
    return found


def distance(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest change relative to the largest output."""
    changes = [(float((a - b).abs().max()), float(b.abs().max())) for b, a in zip(before, after, strict=True)]
    return max([0.0, *(change / max(scale, 1e-300) for change, scale in changes)])


@dataclass
class Case:
    """A network of the zoo, traced once; `restored` gives it back its first weights."""

    spec: Net
    net: nn.Module
    calls: Any
    unseen: Any  # the same entry points on inputs that tracing has not met
    graph: Any
    first: dict[str, Tensor]

    def restore(self) -> None:
        with torch.no_grad():
            for name, tensor in tensors_of(self.net).items():
                tensor.copy_(self.first[name])
        for parameter in self.net.parameters():
            parameter.grad = None
        self.net.train()

    def outputs(self, *, training: bool = False) -> list[Tensor]:
        return [y for calls in (self.calls, self.unseen) for y in outputs_of(self.net, calls, training=training)]

    @property
    def modes(self) -> tuple[bool, ...]:
        return (False, True) if self.spec.train else (False,)

    @property
    def groups(self) -> list[Any]:
        return [g for g in self.graph if g.width >= 2]

    @property
    def exact(self) -> list[Any]:
        return [g for g in self.groups if g.exact]


def build(name: str) -> tuple[nn.Module, Any]:
    net = ZOO[name].build()
    return net, ZOO[name].calls(net, ZOO[name].inputs(seeded(1)))


def trace(name: str) -> Case:
    net, calls = build(name)
    first = {n: t.detach().clone() for n, t in tensors_of(net).items()}
    unseen = ZOO[name].calls(net, ZOO[name].inputs(seeded(77)))
    return Case(ZOO[name], net, calls, unseen, recycle.trace(net, *calls), first)


traced = functools.lru_cache(maxsize=None)(trace)


def restored(name: str) -> Case:
    case = traced(name)
    case.restore()
    return case


def scramble(net: nn.Module, seed: int = 5) -> None:
    """Give every parameter and float buffer values that no fresh unit has: no zeros, no ones, no repeats."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, t in tensors_of(net).items():
            if t.is_floating_point():
                size = torch.rand(t.shape, generator=generator, dtype=t.dtype) * 0.7 + 0.2
                sign = torch.randint(2, t.shape, generator=generator) * 2 - 1
                t.copy_(size if "var" in name else size * sign)


def enliven(net: nn.Module) -> None:
    """Make every ReLU fire for positive inputs: positive weights, positive biases, all alike in size."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.abs_()
            if p.ndim == 1:
                p.add_(0.2)
            else:
                p.add_(0.1)
            if "norm" in name:
                p.fill_(1.0)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-3),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3, amsgrad=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.5, centered=True),
    "rmsprop_tf": lambda ps: _rmsprop_tf_like()(ps, lr=1e-3),
}


def _rmsprop_tf_like() -> Any:
    module = pytest.importorskip("stable_baselines3.common.sb2_compat.rmsprop_tf_like")
    return module.RMSpropTFLike


def loss_of(calls: Any) -> Tensor:
    return sum((y.square().mean() for call in calls for y in leaves(call())), torch.zeros(()))


def learn(case_calls: Any, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(case_calls).backward()
        optimizer.step()


def state_of(net: nn.Module, optimizers: Any = ()) -> dict[str, Any]:
    """A copy of everything that an edit could touch: weights, buffers, optimizer state, step counters."""
    names = {id(p): name for name, p in net.named_parameters()}
    kept: dict[str, Any] = {name: t.detach().clone() for name, t in tensors_of(net).items()}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state.items():
            for key, value in state.items():
                kept[f"{names[id(p)]} optimizer{i}.{key}"] = copy.deepcopy(value)
    return kept


def same(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs in any bit."""
    if before.keys() != after.keys():
        return sorted(before.keys() ^ after.keys())
    return [k for k in before if not _equal(before[k], after[k])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


Elements = set[tuple[str, int]]


def changed(before: dict[str, Any], after: dict[str, Any], *, optimizer: bool = False) -> Elements:
    """(tensor name, flat index) of every element that differs."""
    assert before.keys() == after.keys()
    found: Elements = set()
    for name, old in before.items():
        if isinstance(old, Tensor) and (" " in name) == optimizer and old.shape == after[name].shape:
            found |= {(name, int(i)) for i in (old != after[name]).flatten().nonzero()[:, 0]}
    return found


def named(case: Case, group: str, unit: int) -> Elements:
    """The unit's own elements as written by hand in the zoo."""
    found: Elements = set()
    tensors = tensors_of(case.net)
    for name, index in case.spec.owned[group](unit):
        mask = torch.zeros(tensors[name].shape, dtype=torch.bool)
        mask[index] = True
        found |= {(name, int(i)) for i in mask.flatten().nonzero()[:, 0]}
    return found


# ---------------------------------------------------------------- what the zoo's networks consist of


@every_net
def test_groups_are_those_found_by_hand(name: str) -> None:
    case = restored(name)
    spec = case.spec
    found = {g.name: g.width for g in case.graph}
    assert len(found) == len(list(case.graph)), "two groups share a name"
    for g in case.graph:
        assert case.graph[g.name] is g
        assert g.exact or len(g.why) >= 8
    if spec.either:
        return
    missing_on_purpose = {g for g in spec.optional if g not in found}
    assert found == {g: w for g, w in spec.groups.items() if g not in missing_on_purpose}
    for g in case.graph:
        if g.name in spec.inexact:
            assert not g.exact
            assert spec.inexact[g.name] in g.why.lower().replace("_", "").replace(" ", "")
        else:
            assert g.exact, g.why
    for names, reason in spec.frozen.items():
        reasons = [case.graph.frozen[n] for n in names.split("|") if n in case.graph.frozen]
        assert reasons, f"{names} is not among the frozen: {dict(case.graph.frozen)}"
        assert any(reason in r for r in reasons), f"{names} is frozen because {reasons}, not because of {reason!r}"
    for g in missing_on_purpose:
        assert g in case.graph.frozen, f"{g} is neither editable nor frozen"


@every_net
def test_groups_come_in_forward_order(name: str) -> None:
    case = restored(name)
    if case.spec.either or case.spec.optional:
        return
    assert [g.name for g in case.graph] == list(case.spec.groups)


@every_net
def test_single_precision_finds_the_same_groups(name: str) -> None:
    net = ZOO[name].build().float()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in ZOO[name].inputs(seeded(1)))
    graph = recycle.trace(net, *ZOO[name].calls(net, inputs))
    double = restored(name).graph
    assert {g.name: (g.width, g.exact) for g in graph} == {g.name: (g.width, g.exact) for g in double}


@every_net
def test_all_that_is_frozen_says_why(name: str) -> None:
    graph = restored(name).graph
    for frozen, reason in graph.frozen.items():
        assert isinstance(reason, str)
        assert len(reason) >= 8
        assert frozen not in {g.name for g in graph}
        with pytest.raises((KeyError, ValueError)) as refusal:
            graph[frozen]
        assert frozen in str(refusal.value)
        assert reason in str(refusal.value)
    text = str(graph)
    for group in graph:
        assert group.name in text
    for frozen in graph.frozen:
        assert frozen in text


# ---------------------------------------------------------------- law 1: the function stays


@every_net
@pytest.mark.parametrize("share", [0.5, 0.3, 0.0])
def test_split_into_a_silent_slot_keeps_the_function(name: str, share: float) -> None:
    case = restored(name)
    for group in case.exact:
        for parent, slot in ((0, group.width - 1), (group.width - 1, 0), (1, 0)):
            case.restore()
            recycle.apply(Reset([slot]), group, generator=seeded())
            before = [case.outputs(training=mode) for mode in case.modes]
            recycle.apply(Split([parent], [slot], share=share), group)
            after = [case.outputs(training=mode) for mode in case.modes]
            for b, a in zip(before, after, strict=True):
                assert distance(b, a) <= EXACT, f"{group.name}: {parent} into {slot}"


@every_net
def test_many_splits_at_once_keep_the_function(name: str) -> None:
    case = restored(name)
    for group in case.exact:
        case.restore()
        half = group.width // 2
        slots = list(range(half))
        parents = list(range(group.width - 1, group.width - 1 - half, -1))
        recycle.apply(Reset(slots), group, generator=seeded())
        before = [case.outputs(training=mode) for mode in case.modes]
        recycle.apply(Split(parents, slots, share=0.4), group)
        after = [case.outputs(training=mode) for mode in case.modes]
        for b, a in zip(before, after, strict=True):
            assert distance(b, a) <= EXACT, group.name


@every_net
def test_one_parent_of_two_children_keeps_the_function_or_is_refused(name: str) -> None:
    case = restored(name)
    for group in case.exact:
        if group.width < 3:
            continue
        case.restore()
        recycle.apply(Reset([0, 1]), group, generator=seeded())
        before, kept = case.outputs(), state_of(case.net)
        try:
            recycle.apply(Split([2, 2], [0, 1], share=0.3), group)
        except REFUSED:
            assert not same(kept, state_of(case.net))
        else:
            assert distance(before, case.outputs()) <= EXACT, group.name


@every_net
def test_balanced_split_keeps_the_function_or_is_refused(name: str) -> None:
    case = restored(name)
    for group in case.exact:
        case.restore()
        recycle.apply(Reset([1]), group, generator=seeded())
        before, kept = [case.outputs(training=mode) for mode in case.modes], state_of(case.net)
        try:
            recycle.apply(Split([0], [1], share=0.3, balanced=True), group)
        except REFUSED:
            assert not same(kept, state_of(case.net))
            assert group.name not in case.spec.homogeneous
        else:
            assert same(kept, state_of(case.net))
            for b, mode in zip(before, case.modes, strict=True):
                assert distance(b, case.outputs(training=mode)) <= EXACT, group.name


@every_net
def test_reset_of_a_silent_unit_keeps_the_function(name: str) -> None:
    case = restored(name)
    for group in case.exact:
        for birth, parents in ((None, None), (like_init, None), (mirror, [1]), (revive, None)):
            case.restore()
            recycle.apply(Reset([0]), group, generator=seeded(1))
            before = [case.outputs(training=mode) for mode in case.modes]
            recycle.apply(Reset([0], birth=birth, parents=parents), group, generator=seeded(2))
            for b, mode in zip(before, case.modes, strict=True):
                assert distance(b, case.outputs(training=mode)) <= EXACT, group.name


@every_net
def test_recycling_a_dead_relu_keeps_the_function(name: str) -> None:
    case = restored(name)
    for group_name, parameter in case.spec.kill.items():
        group = case.graph[group_name]
        dead = group.width - 1
        for edit in (
            Reset([dead]),
            Reset([dead], birth=mirror, parents=[0]),
            Split([0], [dead]),
            Split([1], [dead], share=0.2),
        ):
            case.restore()
            with torch.no_grad():
                case.net.get_parameter(parameter)[dead] = -1e3
            before = [case.outputs(training=mode) for mode in case.modes]
            recycle.apply(edit, group, generator=seeded())
            for b, mode in zip(before, case.modes, strict=True):
                assert distance(b, case.outputs(training=mode)) <= EXACT, (group_name, edit)


@every_net
def test_folding_a_constant_unit_keeps_the_function(name: str) -> None:
    case = restored(name)
    for group_name, value in case.spec.constant.items():
        group = case.graph[group_name]
        unit = group.width - 2
        for edit in (None, Reset([unit]), Split([0], [unit])):
            case.restore()
            layer = case.net.get_submodule(group_name)
            with torch.no_grad():
                layer.weight[unit] = 0.0
                layer.bias[unit] = 0.7
            before = case.outputs()
            recycle.apply(Fold([unit], [value]), group)
            if edit is not None:
                recycle.apply(edit, group, generator=seeded())
            assert distance(before, case.outputs()) <= EXACT, (group_name, edit)


def test_folding_a_dead_unit_behind_batchnorm_keeps_the_function() -> None:
    case = restored("relu_then_batchnorm")
    group = case.graph["0"]
    linear, norm = case.net[0], case.net[2]
    with torch.no_grad():
        linear.bias[3] = -1e3
        norm.running_mean.copy_(torch.rand(8))
        norm.running_var.copy_(torch.rand(8) + 0.5)
        norm.weight.copy_(torch.rand(8) + 0.5)
        norm.bias.copy_(torch.rand(8))
        value = norm.bias[3] - norm.running_mean[3] * norm.weight[3] / (norm.running_var[3] + norm.eps).sqrt()
    before = case.outputs()
    recycle.apply(Fold([3], [float(value)]), group)
    assert distance(before, case.outputs()) <= EXACT
    recycle.apply(Reset([3]), group, generator=seeded())
    assert distance(before, case.outputs()) <= EXACT


def test_folding_a_saturated_tanh_keeps_the_function() -> None:
    case = restored("tanh")
    with torch.no_grad():
        case.net.get_parameter("0.bias")[2] = 1e3
        case.net.get_parameter("0.bias")[4] = -1e3
    before = case.outputs()
    recycle.apply(Fold([2, 4], [1.0, -1.0]), case.graph["0"])
    recycle.apply(Reset([2, 4]), case.graph["0"], generator=seeded())
    assert distance(before, case.outputs()) <= EXACT


def test_fold_of_a_recurrent_unit_is_refused_or_exact() -> None:
    """From the second step on the unit is constant, but the first step reads an initial state of zero."""
    case = restored("rnn_cell")
    group = next(iter(case.graph), None)
    if group is None:
        pytest.skip("recurrent units are frozen")
    cell: Any = case.net.get_submodule("cell")
    with torch.no_grad():
        cell.weight_ih[2], cell.weight_hh[2] = 0.0, 0.0
        cell.bias_ih[2], cell.bias_hh[2] = 0.3, 0.4
    before = case.outputs()
    if refusal_of(Fold([2], [math.tanh(0.7)]), group) is None:
        assert distance(before, case.outputs()) <= EXACT


def test_split_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]))
        net[0].bias.copy_(torch.tensor([0.5, -0.5, 9.0]))
        net[2].weight.copy_(torch.tensor([[2.0, 4.0, 0.0], [-2.0, 8.0, 0.0]]))
        net[2].bias.copy_(torch.tensor([1.0, -1.0]))
    x = torch.ones(4, 2, dtype=torch.float64)
    recycle.apply(Split([1], [2], share=0.25), recycle.trace(net, lambda: net(x))["0"])
    assert net[0].weight.tolist() == [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
    assert net[0].bias.tolist() == [0.5, -0.5, -0.5]
    assert net[2].weight.tolist() == [[2.0, 3.0, 1.0], [-2.0, 6.0, 2.0]]
    assert net[2].bias.tolist() == [1.0, -1.0]


def test_balanced_split_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[2.0], [0.0]]))
        net[0].bias.copy_(torch.tensor([4.0, 0.0]))
        net[2].weight.copy_(torch.tensor([[10.0, 0.0]]))
    x = torch.ones(4, 1, dtype=torch.float64)
    recycle.apply(Split([0], [1], share=0.36, balanced=True), recycle.trace(net, lambda: net(x))["0"])
    # The child's sides are sqrt(.36) of the parent's, the parent keeps sqrt(.64) of its own.
    torch.testing.assert_close(net[0].weight[:, 0], torch.tensor([1.6, 1.2]).double())
    torch.testing.assert_close(net[0].bias, torch.tensor([3.2, 2.4]).double())
    torch.testing.assert_close(net[2].weight[0], torch.tensor([8.0, 6.0]).double())


def test_balanced_split_stays_on_the_unsplit_trajectory_under_momentum() -> None:
    case = trace("mlp")
    recycle.apply(Reset([7]), case.graph["0"], generator=seeded())
    with torch.no_grad():  # the empty slot takes no part in either run
        case.net.get_parameter("0.weight")[7] = 0.0
        case.net.get_parameter("0.bias")[7] = -1.0
    twin = copy.deepcopy(case.net)
    twin_calls = case.spec.calls(twin, case.spec.inputs(seeded(1)))
    recycle.apply(Split([0], [7], share=0.3, balanced=True), case.graph["0"])
    for net, calls in ((case.net, case.calls), (twin, twin_calls)):
        learn(calls, torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), 40)
    assert distance(outputs_of(twin, twin_calls), outputs_of(case.net, case.calls)) <= 1e-10


def test_noise_is_antisymmetric() -> None:
    case = restored("mlp")
    recycle.apply(Reset([7]), case.graph["0"], generator=seeded())
    row = case.net.get_parameter("0.weight")[0].detach().clone()
    recycle.apply(Split([0], [7], noise=0.1), case.graph["0"], generator=seeded(4))
    parent, child = case.net.get_parameter("0.weight")[0], case.net.get_parameter("0.weight")[7]
    assert not torch.equal(parent, child)
    apart = torch.cosine_similarity(child - row, row - parent, 0)
    assert float(apart) > 0.95, "parent and child move apart, but for keeping their norms"
    assert float((child - row).norm() / row.norm()) < 0.5


def test_noise_comes_from_the_generator() -> None:
    found = []
    for _ in range(2):
        case = restored("mlp")
        torch.manual_seed(0)
        before = torch.get_rng_state()
        recycle.apply(Split([0], [7], noise=0.1), case.graph["0"], generator=seeded(4))
        assert torch.equal(before, torch.get_rng_state())
        found.append(state_of(case.net))
        torch.rand(3)
    assert not same(*found)


# ---------------------------------------------------------------- law 2: nothing dead, nothing done


HARMLESS = ("monitor", "random", "split", "mirror", "s2d", "redo", "revive", "snr", "replay")


@every_net
def test_no_method_touches_a_network_without_dead_units(name: str) -> None:
    spec = ZOO[name]
    for method in (m for m in HARMLESS if m in recycle.METHODS):
        case = restored(name)
        enliven(case.net)
        inputs = tuple(x.abs() for x in spec.inputs(seeded(1)))
        calls = spec.calls(case.net, inputs)
        optimizer = torch.optim.Adam([p for p in case.net.parameters() if p.requires_grad], lr=1e-5)
        try:
            recycler = recycle.Recycler(case.graph, recycle.find(method)(), optimizers=[optimizer])
        except REFUSED:
            assert not list(case.graph)  # nothing to recycle may be an error, anything else may not
            return
        torch.manual_seed(0)
        for _ in range(8):
            with recycler.listening():
                optimizer.zero_grad()
                loss_of(calls).backward()
            optimizer.step()
        before = state_of(case.net, [optimizer])
        report = recycler.step()
        assert not report.edits, (method, report.edits)
        assert not same(before, state_of(case.net, [optimizer])), method


@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].kill])
@pytest.mark.parametrize("method", ["split", "mirror", "redo", "revive", "snr"])
def test_methods_name_the_dead_units_and_no_other(name: str, method: str) -> None:
    case = restored(name)
    enliven(case.net)
    batches = [tuple(x.abs() for x in case.spec.inputs(seeded(i))) for i in range(8)]
    calls = case.spec.calls(case.net, batches[0])
    dead = {group: case.graph[group].width - 2 for group in case.spec.kill}
    with torch.no_grad():
        for group, parameter in case.spec.kill.items():
            case.net.get_parameter(parameter)[dead[group]] = -1e3
    optimizer = torch.optim.SGD(case.net.parameters(), lr=0.0)
    kwargs = {"noise": 0.0} if method == "split" else {}
    found = recycle.find(method)(**kwargs)
    recycler = recycle.Recycler(case.graph, found, optimizers=[optimizer], generator=seeded(), sample_every=1)
    for batch in batches:
        with recycler.listening():
            optimizer.zero_grad()
            loss_of(case.spec.calls(case.net, batch)).backward()
        optimizer.step()
    before = outputs_of(case.net, calls)
    report = recycler.step()
    if not report.edits and "unobserved" in report.to_json():
        pytest.skip("no hook can watch these units, and the report says so")
    assert {g for g, _ in report.edits} == set(dead)
    for group, edit in report.edits:
        slots = edit.into if isinstance(edit, Split) else edit.units
        assert [int(u) for u in slots] == [dead[group]]
    assert distance(before, outputs_of(case.net, calls)) <= EXACT
    assert not torch.equal(  # it really came back to life, or was at least born again
        case.net.get_parameter(next(iter(case.spec.kill.values())))[dead[report.edits[0][0]]],
        torch.tensor(-1e3, dtype=torch.float64),
    )


def test_monitor_only_watches_dead_units() -> None:
    case = restored("mlp")
    with torch.no_grad():
        case.net.get_parameter("0.bias")[2] = -1e3
    optimizer = torch.optim.SGD(case.net.parameters(), lr=1e-6)
    recycler = recycle.Recycler(case.graph, recycle.find("monitor")(), optimizers=[optimizer])
    with recycler.listening():
        loss_of(case.calls).backward()
    before = state_of(case.net, [optimizer])
    assert not recycler.step().edits
    assert not same(before, state_of(case.net, [optimizer]))


# ---------------------------------------------------------------- law 3: only what an edit names


@every_net
def test_edits_touch_only_the_elements_written_down_by_hand(name: str) -> None:
    case = restored(name)
    for group_name in case.spec.owned:
        if group_name not in {g.name for g in case.graph} and (case.spec.either or group_name in case.spec.optional):
            continue
        group = case.graph[group_name]
        last = group.width - 1
        scramble(case.net)
        optimizer = _filled(case.net)
        for unit in range(group.width):
            scramble(case.net)
            before = state_of(case.net, [optimizer])
            recycle.apply(Reset([unit]), group, optimizers=[optimizer], generator=seeded())
            after = state_of(case.net, [optimizer])
            own = named(case, group_name, unit)
            assert changed(before, after) == own, f"Reset([{unit}]) of {group_name}"
            moments = {(n.split(" ")[0], i) for n, i in changed(before, after, optimizer=True)}
            assert moments == {(n, i) for n, i in own if n in dict(case.net.named_parameters())}
            _refill(optimizer)
        scramble(case.net)
        before = state_of(case.net, [optimizer])
        recycle.apply(Split([last], [0], share=0.3), group, optimizers=[optimizer])
        after = state_of(case.net, [optimizer])
        allowed = named(case, group_name, 0) | named(case, group_name, last)
        assert named(case, group_name, 0) - changed(before, after) <= named(case, group_name, last)
        assert changed(before, after) <= allowed
        moments = {(n.split(" ")[0], i) for n, i in changed(before, after, optimizer=True)}
        assert moments <= named(case, group_name, 0), "the parent's moments are its own"


def _filled(net: nn.Module) -> torch.optim.Optimizer:
    """Adam after a step, with moments that no fresh element has."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in net.parameters():
        p.grad = None
    _refill(optimizer)
    return optimizer


def _refill(optimizer: torch.optim.Optimizer) -> None:
    generator = seeded(9)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].copy_(torch.rand(state[key].shape, generator=generator, dtype=torch.float64) + 0.1)


@every_net
def test_edits_of_some_units_leave_all_others_alone(name: str) -> None:
    case = restored(name)
    for group in case.groups:
        own: list[Elements] = []
        for unit in range(group.width):
            scramble(case.net)
            before = state_of(case.net)
            recycle.apply(Reset([unit]), group, generator=seeded())
            own.append(changed(before, state_of(case.net)))
        assert all(own)
        scramble(case.net)
        before = state_of(case.net)
        recycle.apply(Reset(list(range(group.width))), group, generator=seeded())
        assert changed(before, state_of(case.net)) == set().union(*own)
        scramble(case.net)
        before = state_of(case.net)
        recycle.apply(Split([1], [0], share=0.3, noise=0.1), group, generator=seeded())
        assert changed(before, state_of(case.net)) <= own[0] | own[1]
        scramble(case.net)
        before = state_of(case.net)
        recycle.apply(Reset([0], birth=mirror, parents=[1]), group, generator=seeded())
        assert changed(before, state_of(case.net)) <= own[0]


@pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].kill])
@pytest.mark.parametrize("method", ["snr", "s2d", "replay"])
def test_methods_touch_only_what_their_edits_name(name: str, method: str, tmp_path: Path) -> None:
    case = restored(name)
    enliven(case.net)
    with torch.no_grad():
        for group, parameter in case.spec.kill.items():
            case.net.get_parameter(parameter)[case.graph[group].width - 2] = -1e3
    options: dict[str, Any] = {}
    if method == "replay":
        recycled = {group.name: {"recycled": 1} for group in case.graph}
        path = tmp_path / "edits.jsonl"
        path.write_text(json.dumps({"step": 0, "network": "net", "event": 1, "groups": recycled}))
        options["path"] = str(path)
    if method == "snr":
        options["eta"] = 0.5  # one pass is all there is
    optimizer = _filled(case.net)
    recycler = recycle.Recycler(
        case.graph, recycle.find(method)(**options), optimizers=[optimizer], generator=seeded(), sample_every=1
    )
    with recycler.listening():
        loss_of(case.calls).backward()
    own: dict[str, list[Elements]] = {}  # what a reset of each unit alone changes
    kept = {n: t.detach().clone() for n, t in tensors_of(case.net).items()}
    for group in case.groups:
        for unit in range(group.width):
            scramble(case.net)
            before = state_of(case.net)
            recycle.apply(Reset([unit]), group, generator=seeded())
            own.setdefault(group.name, []).append(changed(before, state_of(case.net)))
    with torch.no_grad():
        for n, tensor in tensors_of(case.net).items():
            tensor.copy_(kept[n])
    before = state_of(case.net, [optimizer])
    report = recycler.step()
    if method != "s2d" and "unobserved" not in report.to_json():
        assert report.edits
    if method == "s2d" and not report.edits:
        pytest.skip("no split would lower the loss, or the layer shows no sample")
    after = state_of(case.net, [optimizer])
    named_units = {(g, u) for g, e in report.edits for u in (*e.slots, *(getattr(e, "parents", None) or ()))}
    allowed = set().union(*(own[g][u] for g, u in named_units)) if named_units else set()
    biases = {a.bias for g, e in report.edits if isinstance(e, Fold) for a in case.graph[g].outgoing}
    assert {(n, i) for n, i in changed(before, after) if n not in biases} <= allowed
    moments = {(n.split(" ")[0], i) for n, i in changed(before, after, optimizer=True)}
    slots = set().union(*(own[g][u] for g, e in report.edits for u in e.slots)) if report.edits else set()
    assert moments <= slots, "parents keep their moments"


@every_net
def test_units_born_of_data_leave_all_others_alone(name: str) -> None:
    case = restored(name)
    with Tracker(case.graph, sample_every=1, inputs=True) as tracker:
        for call in case.calls:
            call()
    case.restore()
    optimizer = _filled(case.net)
    for group in case.groups:
        scramble(case.net)
        _refill(optimizer)
        before = state_of(case.net, [optimizer])
        recycle.apply(Reset([0]), group, optimizers=[optimizer], generator=seeded())
        after = state_of(case.net, [optimizer])
        own, moments = changed(before, after), changed(before, after, optimizer=True)
        scramble(case.net)
        _refill(optimizer)
        inputs = tracker.stats(group).inputs
        before = state_of(case.net, [optimizer])
        edit = Reset([0], birth=revive, warm=0.1)
        recycle.apply(edit, group, optimizers=[optimizer], inputs=inputs, generator=seeded())
        after = state_of(case.net, [optimizer])
        assert changed(before, after) <= own
        assert changed(before, after, optimizer=True) == moments
        assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(case.net).values())


@every_net
def test_fold_touches_biases_of_consumers_and_the_unit(name: str) -> None:
    case = restored(name)
    for group in case.groups:
        case.restore()
        scramble(case.net)
        before = state_of(case.net)
        recycle.apply(Reset([0]), group, generator=seeded())
        own = changed(before, state_of(case.net))
        scramble(case.net)
        before = state_of(case.net)
        reason = refusal_of(Fold([0], [0.5]), group)
        if reason is not None:
            assert not same(before, state_of(case.net))
            assert group.name not in case.spec.constant, reason
            assert case.spec.unfoldable.get(group.name, "") in reason
        else:
            assert group.name not in case.spec.unfoldable
            moved = changed(before, state_of(case.net))
            biases = {n for n, _ in moved - own}
            assert biases
            assert all(tensors_of(case.net)[n].ndim == 1 for n in biases), biases


@every_net
def test_a_fresh_unit_is_disconnected_and_no_other(name: str) -> None:
    """With its outgoing weights at zero, exactly the elements that only feed this unit have no gradient.

    With outgoing weights next to zero every other element's gradient is as good as the same.
    """
    case = restored(name)
    case.net.eval()
    for group in case.exact:
        for unit in (0, group.width - 1):
            scramble(case.net)
            before = {n: t.detach().clone() for n, t in tensors_of(case.net).items()}
            recycle.apply(Reset([unit]), group, generator=seeded(unit))
            after = {n: t.detach().clone() for n, t in tensors_of(case.net).items()}
            has = _gradients(case)
            edited = {n: before[n] != after[n] for n in after}
            with torch.no_grad():
                for n, p in case.net.named_parameters():
                    p[edited[n] & (p == 0)] = 1e-5
            for n, gradient in _gradients(case).items():
                had = gradient.abs() > 1e-12  # less is rounding
                silenced = had & (has[n] == 0)
                assert not (silenced & ~edited[n]).any(), f"{group.name} {unit}: {n} kept old incoming weights"
                fresh = edited[n] & (after[n] != 0) & had
                assert not (fresh & ~silenced).any(), f"{group.name} {unit}: {n} was edited but still has a say"


def _gradients(case: Case) -> dict[str, Tensor]:
    """d(a random projection of all outputs)/d(every parameter)."""
    parameters = {n: p for n, p in case.net.named_parameters() if p.requires_grad}
    generator = seeded(3)
    total = torch.zeros(())
    for call in case.calls:
        for y in leaves(call()):
            total = total + (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum()
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def refusal_of(edit: Any, group: Any, optimizers: Any = ()) -> str | None:
    """Why an edit is refused, None if it was made."""
    try:
        recycle.apply(edit, group, optimizers=optimizers, generator=seeded())
    except REFUSED as refusal:
        assert len(str(refusal)) >= 20, f"{refusal!r} says too little"  # noqa: PT017
        return str(refusal)
    return None


BAD_EDITS: dict[str, Callable[[int], Any]] = {
    "parent is also a slot": lambda w: Split([0, 1], [1, 0]),
    "parent is its own slot": lambda w: Split([0], [0]),
    "slot out of range": lambda w: Split([0], [w]),
    "parent out of range": lambda w: Split([w + 3], [0]),
    "unit out of range": lambda w: Reset([0, w]),
    "negative unit": lambda w: Reset([-1]),
    "fewer parents than slots": lambda w: Split([0], [1, w - 1] if w > 2 else [1, 1]),
    "more parents than slots": lambda w: Split([0, 0], [1]),
    "one slot twice": lambda w: Split([0, 0], [1, 1]),
    "share above one": lambda w: Split([0], [1], share=1.5),
    "share below zero": lambda w: Split([0], [1], share=-0.5),
    "not-a-number share": lambda w: Split([0], [1], share=float("nan")),
    "widening by what is not there": lambda w: Split([w]),
    "pruning almost everything": lambda w: Prune(range(w - 1)),
    "merging with itself": lambda w: Merge(0, 0),
    "mirror without a parent": lambda w: Reset([0], birth=mirror),
    "fewer parents than births": lambda w: Reset([0, 1], birth=mirror, parents=[1] if w == 2 else [2]),
    "fewer means than units": lambda w: Fold([0, 1], [0.5]),
    "fold out of range": lambda w: Fold([w], [0.5]),
    "not-a-number mean": lambda w: Fold([0], [float("nan")]),
}


@every_net
def test_a_refused_edit_changes_nothing(name: str) -> None:
    case = restored(name)
    for group in case.groups[:2]:
        optimizer = _filled(case.net)
        before = state_of(case.net, [optimizer])
        for what, bad in BAD_EDITS.items():
            assert refusal_of(bad(group.width), group, [optimizer]) is not None, f"{what} was accepted"
            assert not same(before, state_of(case.net, [optimizer])), what


def test_an_edit_before_backward_never_gives_silently_wrong_gradients() -> None:
    case = restored("mlp")
    loss = loss_of(case.calls)
    true = torch.autograd.grad(loss, list(case.net.parameters()), retain_graph=True)
    try:
        recycle.apply(Reset([0, 1, 2]), case.graph["2"], generator=seeded())
        found = torch.autograd.grad(loss, list(case.net.parameters()))
    except RuntimeError:
        return
    assert all(torch.equal(a, b) for a, b in zip(true, found, strict=True))


# ---------------------------------------------------------------- law 4: the optimizer goes on


FRESH = {("rmsprop_tf", "square_avg"): 1.0}  # every other moment starts at zero


@every_net
def test_optimizer_state_follows_every_edit(name: str) -> None:
    for kind, make in OPTIMIZERS.items():
        case = restored(name)
        optimizer = make([p for p in case.net.parameters() if p.requires_grad])
        for group in case.groups[:2]:
            plain = restored(name)
            scramble(plain.net)
            before = state_of(plain.net)
            recycle.apply(Reset([1]), group, generator=seeded())
            own = changed(before, state_of(plain.net))
            case.restore()
            learn(case.calls, optimizer)
            for edit in (Reset([1]), Split([0], [1], share=0.4)):
                held = [id(p) for g in optimizer.param_groups for p in g["params"]]
                before = state_of(case.net, [optimizer])
                recycle.apply(edit, group, optimizers=[optimizer], generator=seeded())
                after = state_of(case.net, [optimizer])
                assert before.keys() == after.keys()
                for key in (k for k in before if " " in k):
                    parameter, slot = key.split(" optimizer0.")
                    _check_state(before[key], after[key], parameter, own, FRESH.get((kind, slot), 0.0))
                assert held == [id(p) for g in optimizer.param_groups for p in g["params"]]
                again = make([p for p in case.net.parameters() if p.requires_grad])
                assert held == [id(p) for g in again.param_groups for p in g["params"]]
                learn(case.calls, optimizer, 1)
                for p, state in optimizer.state.items():
                    for value in state.values():
                        assert not isinstance(value, Tensor) or value.shape in (p.shape, ())
                        assert not isinstance(value, Tensor) or value.isfinite().all()


def _check_state(before: Any, after: Any, parameter: str, own: Elements, fresh: float) -> None:
    if not isinstance(before, Tensor) or before.ndim == 0:
        assert _equal(before, after), f"{parameter}: a counter changed from {before} to {after}"
        return
    mine = torch.zeros(before.numel(), dtype=torch.bool)
    mine[[i for n, i in own if n == parameter]] = True
    mine = mine.view(before.shape)
    assert torch.equal(before[~mine], after[~mine]), f"{parameter}: another unit's moments changed"
    if before.ndim > 0 and mine.any():
        assert (after[mine] == fresh).all(), f"{parameter}: a newborn's moments are {after[mine]}, not {fresh}"


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_an_optimizer_that_has_not_stepped_yet_is_left_alone(kind: str) -> None:
    case = restored("nature_cnn")
    optimizer = OPTIMIZERS[kind](case.net.parameters())
    recycle.apply(Split([0], [1]), case.graph["head.0"], optimizers=[optimizer])
    recycle.apply(Reset([2]), case.graph["features.2"], optimizers=[optimizer], generator=seeded())
    assert not any(optimizer.state.values())
    learn(case.calls, optimizer, 2)
    twin, twin_calls = build("nature_cnn")
    case.restore()
    fresh = OPTIMIZERS[kind](twin.parameters())
    learn(twin_calls, fresh, 2)
    assert {k for s in optimizer.state.values() for k in s} == {k for s in fresh.state.values() for k in s}


def test_two_optimizers_over_one_network_are_both_edited() -> None:
    case = restored("actor_critic")
    critic = [p for n, p in case.net.named_parameters() if n.startswith(("vf", "critic"))]
    actor = [p for n, p in case.net.named_parameters() if not n.startswith(("vf", "critic"))]
    optimizers = [torch.optim.Adam(actor, lr=1e-3), torch.optim.RMSprop(critic, lr=1e-3)]
    loss_of(case.calls).backward()
    for optimizer in optimizers:
        optimizer.step()
    recycle.apply(Reset([3]), case.graph["trunk"], optimizers=optimizers, generator=seeded())
    net = case.net
    assert (optimizers[0].state[net.get_parameter("trunk.weight")]["exp_avg_sq"][3] == 0).all()
    assert (optimizers[0].state[net.get_parameter("pi.weight")]["exp_avg_sq"][:, 3] == 0).all()
    assert (optimizers[1].state[net.get_parameter("vf.weight")]["square_avg"][:, 3] == 0).all()
    assert optimizers[1].state[net.get_parameter("vf.weight")]["square_avg"][:, 2].any()


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw"])
def test_transformed_moments_by_hand(kind: str) -> None:
    case = restored("mlp")
    optimizer = OPTIMIZERS[kind](case.net.parameters())
    learn(case.calls, optimizer, 3)
    before = state_of(case.net, [optimizer])
    recycle.apply(Split([5], [2], share=0.3, moments="transform"), case.graph["0"], optimizers=[optimizer])
    after = state_of(case.net, [optimizer])
    powers = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
    seen = set()
    for key, old in before.items():
        if " " not in key:
            continue
        parameter, slot = key.split(" optimizer0.")
        want = old.clone()
        if slot in powers and parameter in ("0.weight", "0.bias"):
            want[2] = old[5] * 0.3 ** powers[slot]
            want[5] = old[5] * 0.7 ** powers[slot]
        elif slot in powers and parameter == "2.weight":
            want[:, 2] = old[:, 5]
        seen.add(slot)
        torch.testing.assert_close(after[key], want, rtol=1e-14, atol=0.0)
    assert seen & powers.keys()


class RowScaled(torch.optim.Optimizer):
    """SGD that keeps one number for each row of a parameter: state of another shape than the parameter's."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    size = self.state[p].setdefault("size", p.new_ones(p.shape[0]))
                    size.mul_(0.9).add_(p.grad.flatten(1).norm(dim=1) if p.ndim > 1 else p.grad.abs())
                    p.sub_(group["lr"] * p.grad / size.view(-1, *[1] * (p.ndim - 1)))


@pytest.mark.parametrize("kind", [RowScaled, torch.optim.LBFGS, torch.optim.Adafactor])
def test_an_optimizer_with_other_shapes_is_refused_by_name(kind: Any) -> None:
    case = restored("mlp")
    optimizer = kind(case.net.parameters(), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(case.calls)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure) if kind is torch.optim.LBFGS else (closure(), optimizer.step())
    before = state_of(case.net, [optimizer])
    for edit in (Reset([0]), Split([0], [1]), Fold([0], [0.5])):
        with pytest.raises((ValueError, TypeError), match=kind.__name__):
            recycle.apply(edit, case.graph["0"], optimizers=[optimizer], generator=seeded())
        assert not same(before, state_of(case.net, [optimizer]))


# ---------------------------------------------------------------- law 5: watching changes nothing


def _random_states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state(), kind, list(keys), rest, list(random.getstate()[1])]


@every_net
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_tracing_leaves_no_trace(name: str, mode: str) -> None:
    net, calls = build(name)
    net.train(mode == "train")
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5) if p.ndim > 1 else None
    flags = {n: m.training for n, m in net.named_modules()}
    held = {n: id(t) for n, t in tensors_of(net).items()}
    gradients = {n: p.grad for n, p in net.named_parameters()}
    wanted = {n: p.requires_grad for n, p in net.named_parameters()}
    hooks = _hooks(net)
    before, randomness = state_of(net), _random_states()
    recycle.trace(net, *calls)
    assert not same(before, state_of(net))
    assert _equal(randomness, _random_states())
    assert flags == {n: m.training for n, m in net.named_modules()}
    assert held == {n: id(t) for n, t in tensors_of(net).items()}
    assert wanted == {n: p.requires_grad for n, p in net.named_parameters()}
    assert hooks == _hooks(net)
    for n, p in net.named_parameters():
        assert p.grad is gradients[n]
        assert p.grad is None or bool((p.grad == 0.5).all())


def _hooks(net: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    counted = [len(getattr(m, kind)) for m in net.modules() for kind in kinds]
    return counted + [len(p._backward_hooks or {}) for p in net.parameters()]


@every_net
def test_listening_leaves_training_bit_identical(name: str) -> None:
    results = []
    for method in (None, "monitor", "revive"):  # the latter keeps what layers read as well
        net, calls = build(name)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        recycler = None
        torch.manual_seed(3)
        if method is not None:
            graph = recycle.trace(net, *calls)
            try:
                recycler = recycle.Recycler(graph, recycle.find(method)(), optimizers=[optimizer])
            except REFUSED:
                assert not list(graph)
                return
        for _ in range(9):
            optimizer.zero_grad()
            if recycler is None:
                loss_of(calls).backward()
            else:
                with recycler.listening():
                    loss_of(calls).backward()
            optimizer.step()
            if recycler is not None:
                recycler.step() if method == "monitor" else recycler.observe()
        gradients = {f"{n}.grad": p.grad for n, p in net.named_parameters()}
        results.append({**state_of(net, [optimizer]), **gradients, "random": _random_states()})
    assert not same(*results[:2])
    assert not same(*results[::2])


def test_nothing_is_seen_outside_of_listening() -> None:
    case = trace("mlp")
    hooks = _hooks(case.net)
    optimizer = torch.optim.SGD(case.net.parameters(), lr=0.0)
    recycler = recycle.Recycler(case.graph, recycle.find("monitor")(), optimizers=[optimizer], sample_every=1)
    with recycler.listening():
        loss_of(case.calls).backward()
    before = recycler.state_dict()
    loss_of(case.unseen).backward()
    assert _equal(before, recycler.state_dict())
    assert hooks == _hooks(copy.deepcopy(case.net)), "a copy of the network would go on reporting"


# ---------------------------------------------------------------- law 6: nothing is assumed


@every_net
def test_no_layer_is_forgotten(name: str) -> None:
    """A layer that takes part is a producer of a group, or frozen for a reason that is told."""
    net, calls = build(name)
    ran: list[str] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)
    for path, module in net.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda m, x, path=path: ran.append(path))
    outputs_of(net, calls)
    case = restored(name)
    text = str(case.graph)
    if name in ("masked_weights", "masked_consumer", "tied_autoencoder"):
        ran += [path for path in ("fc1", "enc") if path in dict(net.named_modules())]
    for path in dict.fromkeys(ran):
        assert re.search(rf"(?<![\w.]){re.escape(path)}(?!\w)", text), f"nothing is said of {path!r}:\n{text}"


@pytest.mark.parametrize(
    ("name", "layer", "operation"),
    [("sorted_units", "fc2", "aten.sort"), ("cumulative_units", "fc2", "aten.cumsum")],
)
def test_unknown_operations_are_named(name: str, layer: str, operation: str) -> None:
    assert operation in restored(name).graph.frozen[layer]


@every_net
def test_no_group_is_called_exact_that_is_not(name: str) -> None:
    """Every unit as parent and every unit as slot, on weights of another seed, in every exact group."""
    case = restored(name)
    for seed in (1, 2):
        for group in case.exact:
            for unit in range(group.width):
                other = (unit + seed) % group.width
                if other == unit:
                    continue
                scramble(case.net, seed)
                recycle.apply(Reset([other]), group, generator=seeded())
                before = case.outputs()
                recycle.apply(Split([unit], [other], share=0.3), group)
                assert distance(before, case.outputs()) <= EXACT, f"{group.name}: {unit} into {other}"


# ---------------------------------------------------------------- law 7: newborns have the right size


class SmallLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.constant_(self.bias, 0.25)


WIDE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(64, 512), lambda: nn.Linear(512, 2), (64,)),
    "SmallLinear": (lambda: SmallLinear(64, 512), lambda: nn.Linear(512, 2), (64,)),
    "Conv1d": (lambda: nn.Conv1d(16, 256, 5), lambda: nn.Conv1d(256, 2, 1), (16, 8)),
    "Conv2d": (lambda: nn.Conv2d(8, 256, 3), lambda: nn.Conv2d(256, 2, 1), (8, 5, 5)),
}


@pytest.mark.parametrize("kind", list(WIDE))
def test_fresh_units_are_as_large_as_in_a_new_module(kind: str) -> None:
    make, consume, shape = WIDE[kind]
    net = nn.Sequential(make(), nn.ReLU(), consume()).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20.0)  # a worn network: its live weights say nothing about the first ones
    x = torch.randn(2, *shape, dtype=torch.float64)
    group = recycle.trace(net, lambda: net(x))["0"]
    units = list(range(0, group.width - 2))
    recycle.apply(Reset(units), group, generator=seeded())
    new = make().double()
    layer: Any = net[0]
    for part in ("weight", "bias"):
        found, want = getattr(layer, part)[units].detach(), getattr(new, part).detach()
        assert float(found.std()) == pytest.approx(float(want.std()), rel=0.1)
        assert float(found.mean()) == pytest.approx(float(want.mean()), abs=0.02)
        assert found.abs().max() <= want.abs().max() * 1.3
    assert (net[2].weight[:, units] == 0).all()


def test_fresh_batchnorm_channels_are_new() -> None:
    case = restored("conv_batchnorm_maxpool")
    scramble(case.net)
    recycle.apply(Reset([2]), case.graph["0"], generator=seeded())
    norm: Any = case.net.get_submodule("1")
    found = [float(t[2]) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    assert found == [1.0, 0.0, 0.0, 1.0]


def test_fresh_recurrent_units_are_as_large_as_in_a_new_module() -> None:
    net = Wire(lambda m, x: m.out(m.gru(x)[0][:, -1]), gru=nn.GRU(8, 64, batch_first=True), out=nn.Linear(64, 2))
    net.double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    graph = recycle.trace(net, lambda: net(x))
    if "gru" in graph.frozen:
        pytest.skip(f"gru is frozen: {graph.frozen['gru']}")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20.0)
    recycle.apply(Reset(list(range(60))), graph["gru"], generator=seeded())
    rows = [r + 64 * g for g in range(3) for r in range(60)]
    assert float(net.gru.weight_ih_l0[rows].std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.1)


def test_fresh_units_of_bare_parameters_are_as_large_as_the_live_ones() -> None:
    generator = seeded(8)
    W1 = nn.Parameter(torch.randn(64, 256, generator=generator) * 0.03)
    W2 = nn.Parameter(torch.randn(256, 2, generator=generator))
    with torch.no_grad():
        W1[:, :128] = 0.0  # dead columns say nothing about the scale
    net = Wire(lambda m, x: torch.relu(x @ m.W1) @ m.W2, W1=W1, W2=W2).double()
    x = torch.randn(3, 64, dtype=torch.float64)
    recycle.apply(Reset(list(range(128))), recycle.trace(net, lambda: net(x))["W1"], generator=seeded())
    assert float(net.W1[:, :128].std()) == pytest.approx(0.03, rel=0.1)


def test_mirror_fires_where_its_parent_does_not() -> None:
    case = restored("mlp")
    recycle.apply(Reset([6], birth=mirror, parents=[1]), case.graph["0"], generator=seeded())
    weight, bias = case.net.get_parameter("0.weight"), case.net.get_parameter("0.bias")
    cosine = torch.cosine_similarity(torch.cat([weight[6], bias[6:7]]), -torch.cat([weight[1], bias[1:2]]), 0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-9)
    assert (case.net.get_parameter("2.weight")[:, 6] == 0).all()


def test_a_mirror_of_a_huge_parent_is_clipped_at_twice_the_first_norm() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)).double()
    with torch.no_grad():
        net[0].weight.mul_(50.0)
        net[0].bias.fill_(0.1)
        net[0].bias[3] = -1e6
    x = torch.randn(64, 64, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    graph = recycle.trace(net, lambda: net(x))
    recycler = recycle.Recycler(graph, recycle.find("mirror")(), optimizers=[optimizer], generator=seeded())
    with recycler.listening():
        net(x).square().mean().backward()
    report = recycler.step()
    assert [g for g, _ in report.edits] == ["0"]
    first = float(nn.Linear(64, 4096).weight.norm(dim=1).mean())
    assert float(net[0].weight[3].detach().norm()) <= 2.0 * first * 1.15


def test_the_networks_own_initialisation_is_used() -> None:
    case = restored("nature_cnn")
    enliven(case.net)
    calls = case.spec.calls(case.net, tuple(x.abs() for x in case.spec.inputs(seeded(1))))
    with torch.no_grad():
        for parameter in case.spec.kill.values():
            case.net.get_parameter(parameter)[2] = -1e3
    seen: dict[str, torch.Size] = {}

    def init(name: str, tensor: Tensor, generator: torch.Generator | None) -> None:
        seen[name] = tensor.shape
        with torch.no_grad():
            tensor.fill_(7.0 if tensor.ndim > 1 else 3.0)

    optimizer = torch.optim.Adam(case.net.parameters(), lr=0.0)
    recycler = recycle.Recycler(
        case.graph, recycle.find("redo")(), optimizers=[optimizer], init=init, generator=seeded()
    )
    with recycler.listening():
        loss_of(calls).backward()
    optimizer.step()
    recycler.step()
    tensors = tensors_of(case.net)
    for layer in ("features.0", "features.2", "head.0"):
        assert seen[f"{layer}.weight"] == tensors[f"{layer}.weight"].shape
        assert (tensors[f"{layer}.weight"][2] != 7.0).sum() <= tensors[f"{layer}.weight"][2].numel() // 4
        assert tensors[f"{layer}.bias"][2] == 3.0
        assert tensors[f"{layer}.bias"][1] != 3.0
    assert (tensors["features.0.weight"][2] == 7.0).all()
    assert (tensors["features.2.weight"][:, 2] == 0.0).sum() >= 5 * 9  # outgoing, but for the fresh unit's own


# ---------------------------------------------------------------- law 8: one seed, one history


def _history(method: str, steps: int = 4, *, stop: int | None = None) -> tuple[list[str], dict[str, Any]]:
    """Reports and final weights of a run in which units die; at `stop` all is saved, rebuilt and loaded."""
    spec = ZOO["actor_critic"]
    net, inputs = spec.build(), spec.inputs(seeded(1))

    def start(generator: torch.Generator) -> tuple[Any, Any, Any]:
        calls = spec.calls(net, inputs)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        graph = recycle.trace(net, *calls)
        found = recycle.Recycler(graph, recycle.find(method)(), optimizers=[optimizer], generator=generator)
        return calls, optimizer, found

    calls, optimizer, recycler = start(seeded(11))
    reports = []
    for step in range(steps):
        if step == stop:
            file = io.BytesIO()
            whole = {"net": net.state_dict(), "opt": optimizer.state_dict(), "rec": recycler.state_dict()}
            torch.save(whole, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            net = spec.build()
            reshape(net, {name: tensor.shape for name, tensor in loaded["net"].items()})  # some methods widen
            net.load_state_dict(loaded["net"])
            calls, optimizer, recycler = start(seeded(999))
            optimizer.load_state_dict(loaded["opt"])
            recycler.load_state_dict(loaded["rec"])
            assert _equal(recycler.state_dict(), whole["rec"])
        with torch.no_grad():
            net.get_parameter("trunk.bias")[step] = -1e3
            net.get_parameter("vf.bias")[step % 4] = -1e3
        for _ in range(3):
            with recycler.listening():
                optimizer.zero_grad()
                loss_of(calls).backward()
            optimizer.step()
        if step != 2:  # one long window, so that a saved state also holds half of one
            report = recycler.step()
            reports.append(str(report.to_json()))
    return reports, state_of(net, [optimizer])


STEADY = [name for name in METHODS if name != "plasticity_injection"]  # which changes what the network is made of


@pytest.mark.parametrize("method", STEADY)
def test_one_seed_one_history(method: str) -> None:
    first, second = _history(method), _history(method)
    assert first[0] == second[0]
    assert not same(first[1], second[1])


@pytest.mark.parametrize("method", [name for name in STEADY if name != "net2deeper"])  # a state makes no layers
@pytest.mark.parametrize("stop", [2, 3])
def test_a_saved_run_goes_on_as_if_never_stopped(method: str, stop: int) -> None:
    whole, stopped = _history(method), _history(method, stop=stop)
    assert whole[0] == stopped[0]
    assert not same(whole[1], stopped[1])


def test_reports_of_equal_steps_are_equal() -> None:
    reports = []
    for _ in range(2):
        case = restored("mlp")
        with torch.no_grad():
            case.net.get_parameter("0.bias")[2] = -1e3
        optimizer = torch.optim.SGD(case.net.parameters(), lr=1e-6)
        recycler = recycle.Recycler(case.graph, recycle.find("split")(), optimizers=[optimizer], generator=seeded(4))
        with recycler.listening():
            loss_of(case.calls).backward()
        reports.append(recycler.step())
    assert reports[0].edits
    assert reports[0] == reports[1]
    assert reports[0].edits == reports[1].edits
