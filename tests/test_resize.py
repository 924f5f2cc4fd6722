"""Changing the number of units, over the whole zoo: nothing is lost, and everything else follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Fold, Grow, Merge, NotRecyclable, Prune, Recycler, Reset, Split, UnitGroup
from recycle.births import gradmax, mirror, near_zero, paired
from tests.nets import ZOO
from tests.test_laws import OPTIMIZERS, Case, distance, loss_of, seeded, trace

EXACT = 1e-12

FIXED = {
    "shuffled_units": "index 7 is out of bounds",
    "channel_shuffle": "unflatten",
    "flipped": "land elsewhere",
    "gathered_by_a_constant": "index 7 is out of bounds",
    "written_in_slices": "expanded size",
    "gain_copied_before_it_is_used": "land elsewhere",
    "lstm_with_projection": "one hidden_size for all its layers",
    "chunked": "shapes cannot be multiplied",
    "sliced": "shapes cannot be multiplied",
    "two_kinds_of_units": "land elsewhere",
    "relu_in_place_on_some_units": "land elsewhere",
    "overlapping_slices": "shapes cannot be multiplied",
    "written_into_a_buffer": "expanded size",
    "layernorm_over_units": "LayerNorm mixes the units",
    "softmax_over_units": "softmax mixes the units",
    "rms_norm": "aten.mean mixes the units",
    "rms_norm_by_hand_in_a_residual_stream": "aten.mean mixes the units",
    "layernorm_of_channels_by_hand": "mixes the units",
    "unit_length": "aten.linalg_vector_norm mixes the units",
    "two_networks_in_one_product": "'W2' is read in groups, whose channels come in equal parts",
    "grouped_convolution": "'2.weight' is read in groups, whose channels come in equal parts",
    "shuffled_between_groups": "'last.weight' is read in groups",
    "residual_block_in_groups": "'middle.weight' is read in groups",
    "two_depthwise_kernels_a_channel": "expected input",
    "group_norm": "GroupNorm mixes the units",
    "multihead_attention": "embedding dimension",
    "cross_attention_whose_weights_are_not_read": "query weights shape",
    "attention_weights_returned": "unflatten",
    "transformer_layer": "unflatten",
    "transformer_layer_with_dropout": "unflatten",
    "heads_by_hand": "unflatten",
    "heads_of_one_projection": "unflatten",
    "causal_heads_with_sdpa": "not enough values to unpack",
    "rotary_heads": "unflatten",
    "queries_that_share_keys": "land elsewhere",
    "heads_with_slopes": "unflatten",
    "heads_that_differ_inside": "land elsewhere",
    "one_gain_in_two_parts": "must match the size",
    "rnn_cell": "inconsistent hidden_size",
    "two_lstm_layers": "one hidden_size for all its layers",
    "own_function_in_torch": "land elsewhere",
}
"""Networks of the zoo in which some group cannot change its width, and a part of the reason."""


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state by name, as copies."""
    found = {n: t.detach().clone() for n, t in (*net.named_parameters(), *net.named_buffers())}
    names = {p: n for n, p in net.named_parameters()}
    for parameter, state in optimizer.state.items():
        found |= {f"{names[parameter]}.{k}": v.clone() for k, v in state.items() if isinstance(v, Tensor)}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def adam(net: nn.Module) -> torch.optim.Optimizer:
    """Adam whose state is full of different numbers."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    generator = seeded(8)
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.double).to(p)
    optimizer.step()
    return optimizer


def silenced(group: UnitGroup, units: Sequence[int]) -> None:
    with torch.no_grad():
        for axis in group.outgoing:
            tensor = group.tensor(axis.name)
            axis.write(tensor, torch.tensor(units), torch.zeros_like(axis.read(tensor, torch.tensor(units))))


def described(group: UnitGroup) -> list[Any]:
    axes = (*group.incoming, *group.outgoing)
    return [group.width, *((a.name, a.dim, a.index.tolist(), a.role, a.bias, a.padded) for a in axes)]


def stays_true(case: Case) -> None:
    """The graph says of the module what a new trace of it says."""
    anew = recycle.trace(case.net, *case.calls)
    assert [described(g) for g in case.graph] == [described(g) for g in anew]


every_net = pytest.mark.parametrize("name", [n for n in ZOO if ZOO[n].groups])


@every_net
def test_resizing_is_exact_and_comes_undone(name: str) -> None:
    case = trace(name)
    reasons = [group.why_fixed for group in case.graph if not group.resizable]
    assert any(FIXED[name] in reason for reason in reasons) if name in FIXED else not reasons, reasons
    for group in case.graph:
        if not group.resizable:
            continue
        optimizer = adam(case.net)
        first, width, before = everything(case.net, optimizer), group.width, case.outputs()
        recycle.apply(Grow(2), group, optimizers=[optimizer], generator=seeded())
        assert group.width == width + 2
        stays_true(case)
        assert distance(before, case.outputs()) <= EXACT
        recycle.apply(Prune([width, width + 1]), group, optimizers=[optimizer])
        assert same(first, everything(case.net, optimizer)), group.name
        recycle.apply(Split([0, width - 1, 0]), group, optimizers=[optimizer])
        assert distance(before, case.outputs()) <= EXACT
        stays_true(case)
        recycle.apply(Merge(width, 0), group, optimizers=[optimizer])
        recycle.apply(Merge(width + 1, 0), group, optimizers=[optimizer])
        recycle.apply(Merge(width, width - 1), group, optimizers=[optimizer])
        assert group.width == width
        assert distance(before, case.outputs()) <= EXACT


# Why gradmax may refuse a group: nothing to be had, or nothing that can be proved.
GRADMAX_REFUSALS = (
    "normalises them", "would have no gradient", "directions of outgoing weights have a gradient", "are not constant",
    "no hook sees what the consumers would read", "cannot be differentiated twice",
)  # fmt: skip
NEAR_ZERO_REFUSALS = ("normalises them", "are not constant", "no hook sees what the consumers would read", "at rest")
GRADMAX_FEWEST, NEAR_ZERO_FEWEST = 100, 60
"""Groups, and networks, of the zoo that they widen, at least."""


def refusal(action: Callable[[], None]) -> str:
    """Why it was refused, "" if it was not."""
    try:
        action()
    except NotRecyclable as error:
        return str(error)
    return ""


def test_new_units_that_speak_at_once_are_exact_all_over_the_zoo() -> None:
    """Pairs that cancel and equal shares always; lifted units with the largest gradient wherever they can be had."""
    grown = []
    for name in (n for n in ZOO if ZOO[n].groups):
        case = trace(name)
        for group in case.graph:
            if not group.resizable:
                continue
            for edit in (Grow(2, paired), Split([0, 0, 1], share=None)):
                before = case.outputs()
                recycle.apply(edit, group, generator=seeded())
                assert distance(before, case.outputs()) <= EXACT, (name, group.name, edit)
            before, first = case.outputs(), described(group)
            loss = partial(loss_of, case.calls)
            why = refusal(lambda g=group, loss=loss: recycle.apply(Grow(2, gradmax), g, generator=seeded(), loss=loss))
            if why:
                assert any(reason in why for reason in GRADMAX_REFUSALS), (name, group.name, why)
                assert described(group) == first and distance(before, case.outputs()) == 0
                continue
            assert distance(before, case.outputs()) <= EXACT, (name, group.name)
            grown.append(name)
            loss_of(case.calls).backward()
            newborns = torch.tensor([group.width - 2, group.width - 1])
            moved = [axis.read(group.tensor(axis.name).grad, newborns) for axis in group.incoming
                     if axis.role == "weight" and group.tensor(axis.name).grad is not None]  # fmt: skip
            assert bool(torch.cat([m.flatten(1) for m in moved], 1).any(1).all()), (name, group.name)
            case.net.zero_grad()
    assert len(grown) >= GRADMAX_FEWEST, len(grown)


def test_near_zero_moves_the_output_by_the_square_of_its_size_all_over_the_zoo() -> None:
    ratios = {}
    for name in (n for n in ZOO if ZOO[n].groups):
        changes = []
        for size in (1e-3, 1e-4):
            case = trace(name)
            group = next((g for g in case.graph if g.resizable), None)
            if group is None:
                break
            before = case.outputs()
            edit = Grow(2, partial(near_zero, size=size))
            why = refusal(lambda g=group, edit=edit: recycle.apply(edit, g, generator=seeded()))
            if why:
                assert any(r in why for r in NEAR_ZERO_REFUSALS), (name, why)
                break
            changes.append(distance(before, case.outputs()))
        if len(changes) == 2:
            ratios[name] = changes
    assert len(ratios) >= NEAR_ZERO_FEWEST, len(ratios)
    assert not {name: c for name, c in ratios.items() if not c[1] <= 0.02 * c[0] <= 1e-3}


@every_net
def test_pruning_takes_what_the_units_owned_and_nothing_else(name: str) -> None:
    case = trace(name)
    for group in case.graph:
        if not group.resizable or group.width < 4:
            continue
        optimizer = adam(case.net)
        units = [0, group.width - 2]
        silenced(group, units)
        stays = torch.tensor([u for u in range(group.width) if u not in units])
        axes = {(a.name, a.dim): a for a in (*group.incoming, *group.outgoing)}
        of_units = {key: axis.read(group.tensor(axis.name), stays) for key, axis in axes.items()}
        before = case.outputs()
        recycle.apply(Prune(units), group, optimizers=[optimizer])
        assert distance(before, case.outputs()) <= EXACT
        stays_true(case)
        for axis in (*group.incoming, *group.outgoing):
            if [n for n, _ in axes].count(axis.name) == 1:  # a recurrent weight loses rows and columns
                now = axis.read(group.tensor(axis.name), torch.arange(group.width))
                assert torch.equal(now, of_units[axis.name, axis.dim])
        loss_of(case.calls).backward()
        optimizer.step()  # every parameter, with state of its shape
        for p in case.net.parameters():
            assert (
                all(s.shape == p.shape for s in optimizer.state[p].values() if s.dim()) if p in optimizer.state else 1
            )


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_the_optimizer_holds_the_new_parameters(kind: str) -> None:
    case = trace("mlp")
    optimizer = OPTIMIZERS[kind](list(case.net.parameters()))
    loss_of(case.calls).backward()
    optimizer.step()
    recycle.apply(Grow(3), case.graph["0"], optimizers=[optimizer], generator=seeded())
    recycle.apply(Prune([1]), case.graph["2"], optimizers=[optimizer])
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in case.net.parameters()}
    assert set(optimizer.state) <= set(held)
    fresh = torch.optim.Adam(case.net.parameters())
    for parameters in (held, [p for g in fresh.param_groups for p in g["params"]]):
        assert [p.shape for p in parameters] == [p.shape for p in case.net.parameters()]
    before = [p.detach().clone() for p in held]
    optimizer.zero_grad()
    loss_of(case.calls).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(held, before, strict=True))


def test_layers_say_their_new_sizes() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4),
                        nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2))  # fmt: skip
    x = torch.randn(3, 2, 7, 7)
    graph = recycle.trace(net, lambda: net(x))
    recycle.apply(Grow(3), graph["0"])
    recycle.apply(Prune([0, 2]), graph["6"])
    assert (net[0].out_channels, net[1].num_features, net[4].num_parameters) == (7, 7, 7)
    assert (net[3].in_channels, net[3].out_channels, net[3].groups) == (7, 7, 7)
    assert (net[6].in_features, net[6].out_features, net[8].in_features, net[8].out_features) == (63, 3, 3, 2)
    lstm = nn.LSTM(3, 4)
    head = nn.Linear(4, 2)
    both = nn.ModuleDict({"lstm": lstm, "head": head})
    x = torch.randn(5, 2, 3)
    graph = recycle.trace(both, lambda: head(lstm(x)[0]))
    recycle.apply(Grow(2), graph["lstm"])
    assert (lstm.hidden_size, head.in_features, lstm.weight_hh_l0.shape) == (6, 6, (24, 6))
    assert lstm(x)[0].shape == (5, 2, 6)  # the fused kernel too


def test_a_target_is_resized_by_its_own_weights() -> None:
    case = trace("mlp")
    group = case.graph["0"]
    for tau in (1.0, 0.01):
        target = copy.deepcopy(case.net)
        with torch.no_grad():
            for p in target.parameters():
                p.mul_(1.5)
        x = ZOO["mlp"].inputs(seeded(1))
        before = target(*x).detach()
        recycle.apply(Split([1, 2]), group, targets=[(target, tau)])
        assert [p.shape for p in target.parameters()] == [p.shape for p in case.net.parameters()]
        assert float((target(*x) - before).abs().max()) <= 1e-12
        assert target[0].out_features == group.width
        newborn = target[0].weight[-2:]
        assert bool((newborn == 0).all()) is (tau == 1)  # a hard target waits for its next copy
        silenced(group, [0])
        with torch.no_grad():
            target[2].weight[:, 0] = 0
        before = target(*x).detach()
        recycle.apply(Prune([0]), group, targets=[(target, tau)])
        assert float((target(*x) - before).abs().max()) <= 1e-12


def test_a_layer_that_two_networks_share_is_resized_once() -> None:
    body, head, other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    online = nn.Sequential(body, nn.ReLU(), head)
    target = nn.Sequential(body, nn.ReLU(), other)
    x = torch.randn(5, 3)
    graph = recycle.trace(online, lambda: online(x))
    recycle.apply(Grow(2), graph["0"], targets=[(target, 0.1)])
    assert body.weight.shape == (6, 3)
    assert head.weight.shape == other.weight.shape == (2, 6)


def test_a_failing_birth_leaves_everything_as_it_was() -> None:
    case = trace("mlp")
    group = case.graph["0"]
    optimizer = adam(case.net)
    held = list(case.net.parameters())
    first, said = everything(case.net, optimizer), described(group)

    def stillborn(newborns: Any) -> Any:
        raise ArithmeticError("no such birth")

    for edit in (Grow(2, stillborn), Reset([0], stillborn)):
        with pytest.raises(ArithmeticError, match="no such birth"):
            recycle.apply(edit, group, optimizers=[optimizer])
        assert all(a is b for a, b in zip(held, case.net.parameters(), strict=True))
        assert same(first, everything(case.net, optimizer))
        assert described(group) == said
        assert case.net[0].out_features == group.width
    with pytest.raises(NotRecyclable, match="mirror needs a parent"):
        recycle.apply(Grow(1, mirror), group)
    recycle.apply(Grow(1, mirror, parents=[0]), group)
    assert torch.equal(case.net[0].weight[-1].sign(), -case.net[0].weight[0].sign())


def test_merge_takes_over_a_scaled_copy_of_a_relu() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.double)
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 3 * net[0].weight[1], 3 * net[0].bias[1]
    before = net(x).detach()
    group = recycle.trace(net, lambda: net(x))["0"]
    recycle.apply(Merge(2, 1), group)
    assert group.width == 3
    assert float((net(x) - before).abs().max()) <= 1e-12


class Resizing:
    """Asks for these edits, one list an event."""

    needs = ("minimum", "maximum")

    def __init__(self, *events: list[Any]) -> None:
        self.events = list(events)

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        return self.events.pop(0) if group.name == "0" else []


def test_a_method_may_resize() -> None:
    """Units keep the numbers that the method knew until its last edit is made; books and windows follow."""
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(16, 3, dtype=torch.double)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    method = Resizing(
        [Prune([0, 3]), Split([4, 1]), Reset([5])], [], [Grow(1), Merge(5, 4)], [Prune([1]), Reset([1]), Grow(1)]
    )
    recycler = Recycler(recycle.trace(net, lambda: net(x)), method, optimizers=[optimizer], sample_every=1)

    def event() -> Any:
        with recycler.listening():
            net(x).square().mean().backward()
        optimizer.step()
        return recycler.step()

    rows = net[0].weight.detach().clone()
    report = event()
    assert [type(e).__name__ for _, e in report.edits] == ["Prune", "Split", "Reset"]
    assert (net[0].out_features, net[2].in_features) == (6, 6)
    assert torch.equal(net[0].weight[[0, 1, 2, 4, 5]], rows[[1, 2, 4, 4, 1]])
    assert not torch.equal(net[0].weight[3], rows[5])
    report = event()
    assert report.groups["0"].width == 6
    assert report.groups["0"].samples == 16
    assert recycler.histograms()["0/age"].tolist() == [2, 2, 2, 1, 1, 1]
    assert report.groups["0"].unparted == 2  # the two newborn copies
    event()
    assert net[0].out_features == 6
    report = event()
    assert report.groups["0"].note == "Reset names unit 1, which an earlier edit of the event removed"
    assert [type(e).__name__ for _, e in report.edits] == ["Prune"]
    state = recycler.state_dict()
    recycler.load_state_dict(state)
    assert Fold([0], [0.0]).slots == (0,)
