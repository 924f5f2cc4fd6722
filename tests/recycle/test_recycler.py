"""Observe, decide, apply, report: the books of the recycler, event by event."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from recycle import Fold, Grow, NotRecyclable, Prune, Recycler, Report, Reset, Split
from recycle.methods.mirror import Mirror
from recycle.methods.monitor import Monitor
from recycle.methods.redo import ReDo
from recycle.methods.split import SplitDead
from recycle.report import GroupReport


class Wire(nn.Module):
    """A network whose forward pass is a plain function of its named parts."""

    def __init__(self, wiring: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.wiring = wiring

    def forward(self, *inputs: Tensor) -> Any:
        return self.wiring(self, *inputs)


class Scripted:
    """Asks for the same edits at every event."""

    needs = ("minimum",)

    def __init__(self, *edits: Any) -> None:
        self.edits = list(edits)

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        return list(self.edits)


class ResetDead:
    """Resets dead units, which stay dead if ``stillborn``."""

    needs = ("minimum", "maximum")

    def __init__(self, *, stillborn: bool = False) -> None:
        self.stillborn = stillborn

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        units = stats.dead.nonzero()[:, 0].tolist()
        return [Reset(units, dead_again if self.stillborn else firing)] if units else []


def firing(newborns: Any) -> tuple[Tensor, ...]:
    """Units that fire for every input."""
    rows = zip(newborns.axes, newborns.fresh, strict=True)
    return tuple(torch.full_like(t, 1e3 if axis.role == "bias" else 0.1) for axis, t in rows)


def dead_again(newborns: Any) -> tuple[Tensor, ...]:
    """Units that never fire."""
    return tuple(-t for t in firing(newborns))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


X = rand(16, 2, seed=3)


def mlp(dead: Sequence[int] = (), width: int = 6) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2)).double()
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[0].bias.fill_(3.0)  # all others fire for every input
        net[0].bias[list(dead)] = -1e3
    return net


def watched(net: nn.Module, method: Any, **options: Any) -> Recycler:
    return Recycler(recycle.trace(net, lambda: net(X)), method, **{"sample_every": 1, **options})


def see(recycler: Recycler, net: nn.Module, x: Tensor = X, passes: int = 1) -> None:
    with recycler.listening():
        for _ in range(passes):
            net(x)


def bits(net: nn.Module) -> list[Tensor]:
    return [t.clone() for t in net.state_dict().values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- the event


def test_dead_before_and_after_and_what_was_recycled() -> None:
    net = mlp(dead=[1, 4, 5])
    recycler = watched(net, SplitDead(), cap=0.4)  # at most 2 of 6
    see(recycler, net)
    report = recycler.step()
    group = report.groups["0"]
    assert (group.width, group.samples, group.recycled, group.re_died) == (6, 16, 2, 0)
    assert (group.dead, group.dead_after) == (0.5, pytest.approx(1 / 6))
    assert group.note == "1 over the cap"
    ((name, edit),) = report.edits
    assert (name, edit.into) == ("0", (1, 4))  # the first that the method named
    assert (report.event, recycler.events, report.recycled) == (1, 1, 2)


def test_each_event_has_its_own_window() -> None:
    net = mlp(dead=[2])
    recycler = watched(net, Monitor())
    see(recycler, net, passes=3)
    assert recycler.step().groups["0"].samples == 48
    see(recycler, net)
    assert recycler.step().groups["0"].samples == 16
    group = recycler.step().groups["0"]
    assert (group.samples, group.note) == (0, "no training pass was seen since the last event")
    assert math.isnan(group.dead) and math.isnan(group.dormant)


def test_report_looks_without_ending_the_window_and_observe_ends_it_without_edits() -> None:
    net = mlp(dead=[2])
    before = bits(net)
    recycler = watched(net, SplitDead())
    see(recycler, net)
    assert recycler.report() == recycler.report()
    assert recycler.report().groups["0"].dead == pytest.approx(1 / 6)
    observed = recycler.observe()
    assert (observed.event, observed.recycled, observed.groups["0"].dead_after) == (1, 0, pytest.approx(1 / 6))
    assert recycler.report().groups["0"].samples == 0
    assert equal(bits(net), before)


def test_health_in_the_report_is_that_of_the_metrics() -> None:
    net = mlp(dead=[1])
    with torch.no_grad():
        net[0].weight.copy_(rand(6, 2, seed=8))
        net[0].weight[1] = 0.0
        net[0].weight[3], net[0].bias[3] = net[0].weight[2] * 2, net[0].bias[2] * 2
        net[0].weight[0], net[0].bias[0] = 0.0, 0.5
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recycler = watched(net, Monitor(), optimizers=[optimizer])
    with recycler.listening():
        net(X).square().mean().backward()
    optimizer.step()
    group = recycler.step().groups["0"]
    assert (group.dead, group.constant) == (pytest.approx(2 / 6), pytest.approx(1 / 6))
    assert (group.gradient_silent, group.saturated) == (pytest.approx(1 / 6), 0)
    assert group.duplicates == pytest.approx(2 / 6)
    seen = F.relu(net[0](X)).detach()
    assert group.effective_rank == pytest.approx(recycle.report.metrics.effective_rank(seen))


def test_a_warm_up_counts_training_passes() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead(), warmup=3)
    see(recycler, net, passes=2)
    assert (recycler.step().recycled, recycler.step().recycled) == (0, 0)
    see(recycler, net)
    net.eval()
    see(recycler, net, passes=9)
    net.train()
    assert recycler.step().recycled == 1


def test_a_warm_up_says_so() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead(), warmup=3)
    see(recycler, net, passes=2)
    assert recycler.step().groups["0"].note == "warming up: 2 of 3 updates"


@pytest.mark.parametrize(("cooldown", "expected"), [(0, [1, 1, 1, 1]), (1, [1, 0, 1, 0]), (2, [1, 0, 0, 1])])
def test_cooldown_leaves_a_unit_alone_for_so_many_events(cooldown: int, expected: list[int]) -> None:
    net = mlp()
    recycler = watched(net, Scripted(Reset([2])), cooldown=cooldown)
    notes = []
    for count in expected:
        see(recycler, net)
        report = recycler.step()
        assert report.recycled == count
        notes.append(report.groups["0"].note)
    assert notes == ["" if count else "1 cooling down" for count in expected]


def test_units_that_die_again_are_counted_once_and_only_if_they_were_recycled() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, ResetDead())
    counts = []
    for kill in ([], [], [1, 3], [], [1]):  # before each event
        with torch.no_grad():
            net[0].bias[kill] = -1e3
            net[0].weight[kill] = 0.1
        see(recycler, net)
        report = recycler.step()
        counts.append((report.recycled, report.re_died))
    assert counts == [(1, 0), (0, 0), (2, 1), (0, 0), (1, 1)]


def test_a_unit_that_only_the_optimizer_forgot_is_not_recycled() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, Scripted(Reset([1], weights=False)))
    for _ in range(2):
        see(recycler, net)
        report = recycler.step()
        group = report.groups["0"]
        assert [edit for _, edit in report.edits] == [Reset([1], weights=False)]
        assert (group.recycled, group.re_died) == (0, 0) and group.dead == group.dead_after == pytest.approx(1 / 6)
    assert recycler.histograms()["0/age"].tolist() == [2] * 6


def test_a_stillborn_unit_is_counted_at_every_event_at_which_it_was_recycled() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, ResetDead(stillborn=True))
    see(recycler, net)
    assert (recycler.step().re_died, recycler.events) == (0, 1)
    see(recycler, net)
    assert recycler.step().re_died == 1
    recycler.method = Monitor()
    see(recycler, net)
    assert recycler.step().re_died == 1  # recycled at the second event, found dead at the third
    see(recycler, net)
    assert recycler.step().re_died == 0  # and not again


def test_units_that_come_and_go_are_not_recycled_and_do_not_die_again() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, Scripted(Fold([1], [0.0]), Prune([1]), Grow(2), Split([0], noise=0.1)))
    see(recycler, net)
    group = recycler.step().groups["0"]
    assert (group.width, group.width_after, group.recycled, group.dead_after) == (6, 8, 0, 0)
    recycler.method = Scripted(Reset([5]))
    with torch.no_grad():
        net[0].bias[[0, 5, 6, 7]] = -1e3  # one that was there and all that came
    see(recycler, net)
    group = recycler.step().groups["0"]
    assert (group.dead, group.recycled, group.re_died) == (0.5, 1, 0) and math.isnan(group.re_death_age)
    with torch.no_grad():
        net[0].bias[5] = -1e3
    see(recycler, net)
    assert recycler.step().re_died == 1  # overwritten since


def test_ages_begin_anew_when_a_unit_is_recycled() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead())
    see(recycler, net, passes=3)
    recycler.step()
    see(recycler, net, passes=2)
    assert recycler.histograms()["0/age"].tolist() == [5, 2, 5, 5, 5, 5]
    assert recycler.histograms()["0/firing_rate"].tolist() == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("cap", [0.01, 0.2, 0.5, 1.0])
def test_the_cap_is_a_share_of_the_layer_and_at_least_one_unit(cap: float) -> None:
    net = mlp(width=10)
    recycler = watched(net, Scripted(Reset(range(10))), cap=cap)
    see(recycler, net)
    assert recycler.step().recycled == max(1, math.floor(cap * 10))


def test_the_cap_counts_slots_over_all_edits_and_keeps_a_fold_with_its_split() -> None:
    net = mlp(dead=[1, 2])
    recycler = watched(net, Scripted(Fold([1, 2], [0, 0]), Split([0, 3], into=[1, 2])), cap=0.2)
    see(recycler, net)
    assert recycler.step().edits == (("0", Fold([1], [0])), ("0", Split([0], into=[1])))


# ---------------------------------------------------------------- edits that are refused


def test_edits_of_a_group_are_made_all_or_none() -> None:
    net = mlp()
    before = bits(net)
    recycler = watched(net, Scripted(Reset([1]), Split([0], into=[9])))
    see(recycler, net)
    report = recycler.step()
    assert (report.recycled, report.edits) == (0, ())
    assert report.groups["0"].note == "units [9] are out of range: '0' has units 0 to 5"
    assert equal(bits(net), before)


def test_a_birth_that_fails_leaves_nothing_half_done() -> None:
    net = mlp()
    before = bits(net)
    recycler = watched(net, Scripted(Reset([1]), Reset([2], recycle.births.mirror)))  # a mirror without a parent
    see(recycler, net)
    try:
        report = recycler.step()
    except ValueError as error:
        assert "mirror needs a parent" in str(error)  # noqa: PT017
    else:
        assert (report.recycled, "mirror needs a parent" in report.groups["0"].note) == (0, True)
    assert equal(bits(net), before)


def test_a_parent_that_another_edit_of_the_same_event_overwrites_is_refused_or_exact() -> None:
    net = mlp(dead=[4, 5])
    with torch.no_grad():
        net[2].weight[:, 3] = 0.0  # silent: overwriting it changes nothing by itself
    before = net(X)
    recycler = watched(net, Scripted(Split([0], into=[3]), Split([3], into=[4], share=0.0), Reset([5])))
    see(recycler, net)
    recycler.step()
    torch.testing.assert_close(net(X), before, rtol=1e-13, atol=1e-13)


def test_step_inside_listening_is_refused() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead())
    with recycler.listening():
        net(X)
        with pytest.raises(NotRecyclable, match=r"step\(\) inside listening\(\): a backward pass may be pending"):
            recycler.step()
        with recycler.listening():
            pass
        with pytest.raises(NotRecyclable, match="inside listening"):
            recycler.step()
    assert recycler.step().recycled == 1


def test_listening_is_over_even_after_an_error() -> None:
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead())
    block = recycler.listening()
    block.__enter__()
    net(X)
    assert block.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is not True
    assert recycler.step().recycled == 1


def test_units_that_no_hook_can_watch_are_never_recycled_and_the_note_says_why() -> None:
    bare = Wire(lambda m, x: F.relu(m.fc(x)) @ m.w, fc=nn.Linear(2, 4), w=nn.Parameter(rand(4, 2))).double()
    steps = rand(3, 5, 2)
    lstm = Wire(lambda m, x: m.out(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(2, 4, 2, batch_first=True), out=nn.Linear(4, 1))
    for net, x, name in ((bare, X, "fc"), (lstm.double(), steps, "rnn.weight_ih_l0")):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter[:2] = 0.0
        before = bits(net)
        graph = recycle.trace(net, lambda net=net, x=x: net(x)).select(include=[name])
        recycler = Recycler(graph, ReDo(tau=10.0), sample_every=1)
        see(recycler, net, x)
        report = recycler.step()
        assert report.recycled == 0 and report.groups[name].recycled == 0
        assert report.groups[name].note.startswith(
            "unobserved: a consumer is no Linear, Conv or first or last recurrent layer"
        )
        assert math.isnan(report.groups[name].dead)
        assert equal(bits(net), before)


class _Shifted(nn.Linear):
    """A hook on this layer sees 0 where the weight meets 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


def _half_functional(m: Any, x: Tensor) -> Tensor:
    return m.out(F.relu(m.fc(x))) + F.linear(F.relu(-m.fc(x)), m.out.weight)


@pytest.mark.parametrize("kind", ["layer that changes its input", "weight used outside of its layer"])
def test_units_whose_consumer_reads_more_than_its_hook_shows_are_left_alone_or_seen_whole(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind.startswith("layer"):
            net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), _Shifted(4, 1)).double()
            first = net[0]
        else:
            net = Wire(_half_functional, fc=nn.Linear(2, 4), out=nn.Linear(4, 1)).double()
            first = net.fc
    with torch.no_grad():
        first.weight[1], first.bias[1] = 0.0, -2.0  # zero to the hook, not zero to the weight
    recycler = watched(net, ReDo(tau=0.0))
    before = net(X)
    see(recycler, net)
    recycler.step()
    torch.testing.assert_close(net(X), before, rtol=1e-13, atol=1e-13)


def test_a_warm_up_ends_for_entry_points_other_than_forward() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(2, 4), nn.Linear(4, 1)

        def evaluate_actions(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.fc(x)))

    net = Policy().double()
    with torch.no_grad():
        net.fc.bias.fill_(9.0)
        net.fc.bias[1] = -1e3
    graph = recycle.trace(net, lambda: net.evaluate_actions(X))
    recycler = Recycler(graph, SplitDead(), warmup=3, sample_every=1)
    with recycler.listening():
        for _ in range(4):
            net.evaluate_actions(X)
    assert recycler.step().recycled == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_window_with_nan_leads_to_no_edit(bad: float) -> None:
    net = mlp(dead=[1])
    before = bits(net)
    recycler = watched(net, SplitDead())
    poisoned = X.clone()
    poisoned[3, 0], poisoned[4, 0] = bad, -bad
    see(recycler, net)
    see(recycler, net, poisoned)
    see(recycler, net)
    group = recycler.step().groups["0"]
    assert group.note.startswith("NaN or infinite activations were seen")
    assert (group.recycled, math.isnan(group.dead), equal(bits(net), before)) == (0, True, True)
    see(recycler, net)
    assert recycler.step().recycled == 1  # the next window is clean


@pytest.mark.parametrize("parent", ["utility", "gradient"])
def test_a_method_is_not_asked_on_statistics_that_were_not_observed(parent: Any) -> None:
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead(parent=parent))  # no optimizer: weight gradients cannot be seen
    see(recycler, net)
    report = recycler.step()
    if parent == "utility":
        assert report.recycled == 1
    else:
        assert report.groups["0"].note == "needs weight_gradient, which was not observed"
        assert report.recycled == 0


# ---------------------------------------------------------------- target networks


def test_under_a_polyak_target_only_units_that_are_dead_there_too_are_recycled() -> None:
    net, target = mlp(dead=[1, 4]), mlp(dead=[4])
    before = net(X), target(X)
    recycler = watched(net, SplitDead(noise=0.0), targets=[(target, 0.01)])
    see(recycler, net)
    report = recycler.step()
    assert report.groups["0"].note == "1 still alive in the target network"
    ((_, edit),) = report.edits
    assert edit.into == (4,)
    torch.testing.assert_close(net(X), before[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(target(X), before[1], rtol=1e-13, atol=1e-13)


def test_a_constant_online_that_is_zero_in_the_polyak_target_changes_neither() -> None:
    net, target = mlp(), mlp(dead=[2])
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0.0, 0.7  # folded online; nothing to fold in the target
    before = net(X), target(X)
    recycler = watched(net, Mirror(), targets=[(target, 0.01)])
    see(recycler, net)
    recycler.step()
    torch.testing.assert_close(net(X), before[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(target(X), before[1], rtol=1e-13, atol=1e-13)


def test_a_hard_target_does_not_hold_anything_back() -> None:
    net, target = mlp(dead=[1, 4]), mlp()
    kept = bits(target)
    recycler = watched(net, SplitDead(), targets=[(target, 1.0)])
    see(recycler, net)
    assert recycler.step().recycled == 2
    assert equal(bits(target), kept)


class Both(NamedTuple):
    here: Tensor
    there: Tensor


def test_inputs_in_named_tuples_are_kept_for_a_polyak_target() -> None:
    net, target = (
        Wire(lambda m, x: m.b(torch.relu(m.a(x.here - x.there))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
        for _ in range(2)
    )
    x = Both(torch.ones(8, 3), torch.zeros(8, 3))
    with torch.no_grad():
        for module in (net, target):
            module.a.weight[:2], module.a.bias[:2] = 0.0, -1.0
        target.a.bias[1] = 1.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    recycler = Recycler(
        recycle.trace(net, lambda: net(x)), ReDo(), optimizers=[optimizer], targets=[(target, 0.01)], sample_every=1
    )
    with recycler.listening():
        net(x).sum().backward()
        optimizer.step()
    recycler.load_state_dict(recycler.state_dict())
    report = recycler.step().groups["a"]
    assert report.recycled >= 1 and "1 still alive in the target network" in report.note


# ---------------------------------------------------------------- reports


def _reported() -> Report:
    net = mlp(dead=[1, 4])
    recycler = watched(net, SplitDead(noise=0.2))
    see(recycler, net)
    return recycler.step()


def test_reports_of_equal_events_are_equal_and_of_others_are_not() -> None:
    assert _reported() == _reported()
    net = mlp(dead=[1])
    recycler = watched(net, SplitDead(noise=0.2))
    see(recycler, net)
    assert recycler.step() != _reported()


def test_a_report_becomes_json_and_comes_back() -> None:
    report = _reported()
    text = report.to_json()
    assert "\n" not in text and "NaN" not in text
    back = json.loads(text)
    assert list(back) == ["event", "groups", "edits"]
    assert back["event"] == 1
    assert back["groups"]["0"]["dead"] == report.groups["0"].dead
    assert back["groups"]["0"]["gradient_silent"] is None  # not observed
    (edit,) = back["edits"]
    assert edit["group"] == "0" and edit["into"] == [1, 4] and edit["noise"] == 0.2
    names = {"parents", "into", "share", "noise", "balanced", "rescale", "moments"}
    assert Split(**{k: v for k, v in edit.items() if k in names}) == report.edits[0][1]


def test_a_window_of_nan_is_still_json() -> None:
    net = mlp()
    recycler = watched(net, Monitor())
    see(recycler, net, X * math.nan)
    assert json.loads(recycler.step().to_json())["groups"]["0"]["effective_rank"] is None


def test_the_printed_report() -> None:
    groups = {
        "actor": GroupReport(8, 100, dead=0.25, dormant=0.5, recycled=2, re_died=1),
        "critic.0": GroupReport(24, 100, dead=0.0, dormant=0.125, note="warming up: 1 of 3 updates"),
    }
    report = Report(7, groups)
    assert str(report).splitlines() == [
        "event 7: 2 units recycled, 6.2% were dead",
        "  actor         8 units  dead  25.0%  dormant  50.0%  recycled 2",
        "  critic.0     24 units  dead   0.0%  dormant  12.5%  recycled 0  warming up: 1 of 3 updates",
    ]
    assert (report.recycled, report.re_died) == (2, 1)
    assert report.fraction("dead") == 2 / 32
    assert math.isnan(report.fraction("effective_rank"))


def test_a_network_without_groups_reports_nothing() -> None:
    net = nn.Linear(2, 2).double()
    recycler = Recycler(recycle.trace(net, lambda: net(X)), SplitDead())
    report = recycler.step()
    assert (report.groups, report.recycled, report.edits) == ({}, 0, ())
    assert str(report).startswith("event 1: 0 units recycled")


# ---------------------------------------------------------------- training loops


def test_hooks_are_installed_once_however_often_it_listens() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recycler = watched(net, Monitor(), optimizers=[optimizer], targets=[(mlp(), 0.5)])
    for _ in range(3):
        recycler.attach()
    for _ in range(3):
        with recycler.listening(), recycler.listening():
            net(X)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    assert hooks == [1, 1, 0, 1]
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert recycler.report().groups["0"].samples == 3 * len(X)
    recycler.detach()
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_gradient_accumulation_counts_every_forward_and_the_accumulated_gradient() -> None:
    net = mlp(dead=[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recycler = watched(net, SplitDead(), optimizers=[optimizer])
    for part in X.split(4):
        with recycler.listening():
            (net(part).square().mean() / 4).backward()
    rows = net[0].weight.grad.abs().mean(1)
    optimizer.step()
    stats = recycler.tracker.stats(recycler.graph["0"])
    assert stats.samples == 16
    torch.testing.assert_close(stats.weight_gradient, rows, rtol=1e-13, atol=0)
    before = net(X)
    report = recycler.step()
    assert (report.recycled, report.groups["0"].gradient_silent) == (1, pytest.approx(1 / 6))
    assert (net[0].weight.grad.abs().sum(1) > 0).tolist() == [True, False, True, True, True, True]  # untouched
    assert float((net(X) - before).detach().abs().max()) < 0.1


def _scaled(scaler: torch.amp.GradScaler, *, overflow: bool = False) -> tuple[Recycler, nn.Module, Report]:
    net = mlp(dead=[1]).float()
    x = X.float()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    graph = recycle.trace(net, lambda: net(x))
    recycler = Recycler(graph, SplitDead(), optimizers=[optimizer], sample_every=1)
    for attempt in range(3):
        optimizer.zero_grad()
        with recycler.listening():
            loss = net(x).square().mean()
            scaler.scale(loss * (1e38 if overflow and attempt == 0 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    return recycler, net, recycler.report()


def test_a_gradient_scaler_does_not_change_what_is_seen_of_the_weights() -> None:
    scaled, _, one = _scaled(torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain, _, other = _scaled(torch.amp.GradScaler("cpu", enabled=False))
    mine = scaled.tracker.stats(scaled.graph["0"])
    theirs = plain.tracker.stats(plain.graph["0"])
    torch.testing.assert_close(mine.weight_gradient, theirs.weight_gradient, rtol=1e-6, atol=0)
    assert one == other  # dead, dormant and silent fractions are the same
    assert scaled.step().edits == plain.step().edits


def test_an_overflow_that_the_scaler_skips_does_not_spoil_the_window() -> None:
    recycler, net, report = _scaled(torch.amp.GradScaler("cpu", init_scale=1024.0), overflow=True)
    assert report.groups["0"].gradient_silent == pytest.approx(1 / 6)
    assert recycler.tracker.stats(recycler.graph["0"]).gradient.isfinite().all()
    assert recycler.step().recycled == 1
    assert all(p.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("method", [SplitDead(noise=0.3), Mirror(), ResetDead()])
def test_a_saved_recycler_goes_on_exactly(method: Any) -> None:
    def history(*, interrupt: bool) -> tuple[list[Report], list[Tensor]]:
        net = mlp(dead=[1, 4])
        recycler = watched(net, method, cooldown=1)
        reports = []
        for event in range(4):
            with torch.no_grad():
                net[0].bias[event] = -1e3
            see(recycler, net, rand(8, 2, seed=event))
            if interrupt:
                saved = recycler.state_dict()
                recycler = watched(net, method, cooldown=1)
                recycler.load_state_dict(saved)
            reports.append(recycler.step())
        return reports, bits(net)

    one, other = history(interrupt=False), history(interrupt=True)
    assert one[0] == other[0]
    assert equal(one[1], other[1])


def test_a_saved_recycler_goes_on_exactly_with_a_polyak_target() -> None:
    def history(*, interrupt: bool) -> Report:
        net, target = mlp(dead=[1]), mlp(dead=[1])
        recycler = watched(net, SplitDead(), targets=[(target, 0.01)])
        see(recycler, net)
        if interrupt:
            saved = recycler.state_dict()
            recycler = watched(net, SplitDead(), targets=[(target, 0.01)])
            recycler.load_state_dict(saved)
        return recycler.step()

    assert history(interrupt=True) == history(interrupt=False)


def test_a_saved_state_is_plain_tensors_and_numbers_and_its_own() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (int, float, str, Tensor))

    net = mlp(dead=[1])
    recycler = watched(net, SplitDead())
    see(recycler, net)
    saved = recycler.state_dict()
    assert plain(saved)
    recycler.step()
    assert saved["events"] == 0 and saved["recycled_at"]["0"].tolist() == [-1] * 6


def test_two_runs_with_one_seed_are_one_run_and_another_seed_is_another() -> None:
    def run(seed: int) -> str:
        net = mlp(dead=[1, 2])
        recycler = watched(net, SplitDead(parent="random"), generator=torch.Generator().manual_seed(seed))
        see(recycler, net)
        return recycler.step().to_json() + str(net.state_dict())

    assert run(5) == run(5)
    assert run(5) != run(6)


# ---------------------------------------------------------------- what it refuses to be built with


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup=-1"),
        ({"cooldown": -1}, "cooldown=-1"),
        ({"cap": 0.0}, "cap=0.0"),
        ({"cap": 1.5}, "cap=1.5"),
        ({"cap": math.nan}, "cap=nan"),
        ({"sample_every": 0}, "at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        watched(mlp(), Monitor(), **options)


def test_a_method_that_needs_an_unknown_statistic_is_refused_with_what_was_meant() -> None:
    method = Scripted()
    method.needs = ("mean_abz",)
    with pytest.raises(ValueError, match="Scripted needs 'mean_abz', no such statistic: did you mean 'mean_abs'"):
        watched(mlp(), method)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(TypeError, match=r"an object called with \(group, stats\), got <class .*Pass ReDo\(\)"):
        watched(mlp(), ReDo)
    with pytest.raises(TypeError, match="got 'redo'"):
        watched(mlp(), "redo")
    with pytest.raises(TypeError, match="must name the statistics it reads in `needs`"):
        watched(mlp(), lambda group, stats: [])


def test_a_look_that_keeps_its_window_brings_no_cooldown_nearer_to_its_end() -> None:
    net = mlp(dead=[1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recycler = Recycler(
        recycle.trace(net, lambda: net(X)),
        ResetDead(stillborn=True),
        optimizers=[optimizer],
        cooldown=1,
        sample_every=1,
    )
    recycled = []
    for look in (False, True, True, False, False):
        with recycler.listening():
            net(X).sum().backward()
        optimizer.step()
        recycled.append((recycler.observe(keep_window=True) if look else recycler.step()).recycled)
    assert recycled == [1, 0, 0, 0, 1]


def test_editing_without_an_optimizer_is_said() -> None:
    net = mlp(dead=[1])
    recycler = Recycler(recycle.trace(net, lambda: net(X)), ResetDead(), sample_every=1)
    with recycler.listening():
        net(X).sum().backward()
    with pytest.warns(UserWarning, match=r"knows no optimizer.*Pass optimizers"):
        assert recycler.step().recycled == 1


def test_units_behind_a_batch_norm_that_learns_are_seen_dead_and_folded_once_settled() -> None:
    """Their constant is the norm's shift, which every update moves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[0].bias[[1, 5]] = -100.0
    x = torch.randn(32, 3, dtype=torch.double)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    graph = recycle.trace(net, lambda: net(x))
    recycler = Recycler(graph, SplitDead(noise=0.0), optimizers=[optimizer], sample_every=1)
    recycled = []
    for _ in range(5):
        for _ in range(80):
            with recycler.listening():
                (net(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = outputs_in_both_modes(net, x)
        report = recycler.step()
        after = outputs_in_both_modes(net, x)
        assert all(float((a - b).abs().max()) < 1e-6 for a, b in zip(before, after, strict=True))
        recycled.append((report.groups["0"].dead, report.recycled))
    assert recycled[0] == recycled[1] == (0.25, 0)  # seen, and waiting for the running statistics
    assert (0.25, 2) in recycled
    assert recycled[-1] == (0.0, 0)


def outputs_in_both_modes(net: nn.Module, x: Tensor) -> list[Tensor]:
    """In training and in evaluation mode; buffers stay."""
    held = {name: b.clone() for name, b in net.named_buffers()}
    found = [net.train(mode)(x).detach() for mode in (False, True)]
    with torch.no_grad():
        for name, b in net.named_buffers():
            b.copy_(held[name])
    return found
