"""Who is chosen, in which order, and into what: on statistics written by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recycle
from recycle import Fold, Prune, Reset, Split
from recycle.births import mirror, revive
from recycle.edits import describe
from recycle.firing import Firing
from recycle.methods import METHODS, find
from recycle.methods.cbp import ContinualBackprop
from recycle.methods.expand import Expand
from recycle.methods.firefly import Firefly
from recycle.methods.folding import Folding
from recycle.methods.gradient_cutoff import GradientCutoff
from recycle.methods.gradmax import GradMax
from recycle.methods.grow import Growth
from recycle.methods.l2_init import L2Init
from recycle.methods.layer_reset import LayerReset
from recycle.methods.mirror import Mirror
from recycle.methods.monitor import Monitor
from recycle.methods.near_zero import NearZero
from recycle.methods.net2deeper import Net2Deeper
from recycle.methods.net2wider import Net2Wider
from recycle.methods.plasticity_injection import PlasticityInjection
from recycle.methods.random import Random
from recycle.methods.redo import ReDo
from recycle.methods.regrama import ReGraMa
from recycle.methods.replay import Replay
from recycle.methods.revive import Revive
from recycle.methods.s2d import SteepestDescent
from recycle.methods.senn import SelfExpanding
from recycle.methods.shrink_perturb import ShrinkPerturb
from recycle.methods.snr import SelfNormalizedResets
from recycle.methods.split import SplitDead
from recycle.methods.tiny import Tiny
from recycle.samples import Sample
from recycle.stats import Stats

METHOD_FILE = '''
"""Fill units that stopped learning with halves of the busiest ones."""

from dataclasses import dataclass
from typing import ClassVar

from recycle import Edit, Split


@dataclass(frozen=True)
class Reseed:
    """Split the busiest units into those whose gradient has vanished."""

    tau: float = 0.01
    maturity: int = 1_000

    needs: ClassVar[tuple[str, ...]] = ("mean_abs", "gradient", "age")

    def __call__(self, group, stats) -> list[Edit]:
        share = stats.gradient / stats.gradient.mean().clamp_min(1e-12)
        idle = (share <= self.tau) & (stats.age >= self.maturity)
        idle = idle.nonzero().flatten()[: group.width // 2]
        busy = stats.mean_abs.topk(len(idle)).indices
        return [Split(busy, into=idle)] if len(idle) else []
'''


@dataclass(frozen=True)
class Layer:
    """All that a method may see of a group."""

    width: int
    name: str = "layer"
    homogeneous: bool = True
    why_not_foldable: str = ""


def made(samples: int = 10, seed: int = 0, **given: list[float]) -> Stats:
    """Statistics by hand; what is not given is zero."""
    width = len(next(iter(given.values())))
    names = ("firing_rate", "mean", "mean_abs", "variance", "minimum", "maximum", "gradient", "weight_gradient", "age",
             "incoming_norm", "outgoing_norm", "silence", "rarity")  # fmt: skip
    values = dict.fromkeys(names, [0.0] * width) | given
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: torch.tensor(v, dtype=torch.double) for k, v in values.items()}
    return Stats(samples=samples, generator=generator, **tensors)


# units 1 and 4 are dead; of the live ones, utility = mean |a| x outgoing: 2, 12, 6, 1
DEAD = made(
    mean=[1, 0, 3, 2, 0, 1],
    mean_abs=[1, 0, 3, 2, 0, 1],
    minimum=[0, 0, 0, 0, 0, 0],
    maximum=[2, 0, 6, 4, 0, 2],
    outgoing_norm=[2, 9, 4, 3, 9, 1],
    weight_gradient=[0.1, 0, 0.2, 0.9, 0, 0.5],
)
HEALTHY = made(mean=[1, 1, 1], mean_abs=[1, 1, 1], minimum=[0, 0, 0], maximum=[2, 2, 2], outgoing_norm=[1, 1, 1])


def test_the_built_in_methods() -> None:
    assert {
        "monitor": Monitor, "random": Random, "split": SplitDead, "mirror": Mirror, "redo": ReDo,
        "s2d": SteepestDescent,
        "revive": Revive,
        "cbp": ContinualBackprop,
        "snr": SelfNormalizedResets,
        "regrama": ReGraMa,
        "gradient_cutoff": GradientCutoff,
        "shrink_perturb": ShrinkPerturb, "l2_init": L2Init, "layer_reset": LayerReset,
        "replay": Replay,
        "plasticity_injection": PlasticityInjection,
        "grow": Growth,
        "senn": SelfExpanding,
        "folding": Folding,
        "expand": Expand, "near_zero": NearZero, "net2wider": Net2Wider,
        "gradmax": GradMax, "tiny": Tiny, "firefly": Firefly,
        "net2deeper": Net2Deeper,
    } == METHODS  # fmt: skip
    assert all(find(name)().needs is not None for name in METHODS)


GROWING = {"expand", "near_zero", "net2wider", "gradmax", "tiny", "firefly"}


@pytest.mark.parametrize("name", [name for name in METHODS if callable(find(name)()) and name not in GROWING])
def test_nothing_dead_means_no_edit(name: str) -> None:
    assert find(name)()(Layer(3), HEALTHY) == []


@pytest.mark.parametrize("name", sorted(GROWING))
def test_growth_stops_at_its_most(name: str) -> None:
    method = find(name)(count=4, most=5)
    added = [len(e.parents) if isinstance(e, Split) else e.count for e in method(Layer(3), HEALTHY)]
    assert (added, method(Layer(5), HEALTHY), method(Layer(9), HEALTHY)) == ([2], [], [])


def test_gradmax_comes_in_pairs_where_biases_cannot_make_up_for_it() -> None:
    layer = Layer(3, why_not_foldable="a consumer has no bias")
    counts = [sum(e.count for e in GradMax(count, most)(layer, HEALTHY)) for count, most in
              [(1, None), (2, None), (3, None), (4, 6), (1, 4), (2, 5)]]  # fmt: skip
    assert counts == [2, 2, 4, 2, 0, 2]


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_are_values(name: str) -> None:
    assert find(name)() == find(name)()
    with pytest.raises(FrozenInstanceError):
        find(name)().needs = ()


# ---------------------------------------------------------------- monitor, random


def test_monitor_leaves_dead_units_dead() -> None:
    assert Monitor()(Layer(6), DEAD) == []
    assert Monitor().needs == ()


def test_random_resets_as_many_as_are_dead_or_as_asked() -> None:
    (edit,) = Random()(Layer(6), DEAD)
    assert isinstance(edit, Reset) and len(set(edit.units)) == 2 and edit.birth is None
    (edit,) = Random(count=4)(Layer(6), DEAD)
    assert len(set(edit.units)) == 4 and set(edit.units) <= set(range(6))
    (edit,) = Random(count=99)(Layer(6), DEAD)
    assert sorted(edit.units) == [0, 1, 2, 3, 4, 5]
    assert Random(count=0)(Layer(6), DEAD) == []


def test_random_draws_from_the_window_s_generator_and_hits_live_units_too() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = [Random()(Layer(6), made(seed=s, minimum=[0] * 6, maximum=[1, 0, 1, 1, 0, 1])) for s in (1, 1, *range(30))]
    assert draws[0] == draws[1]
    assert {unit for (edit,) in draws for unit in edit.units} == set(range(6))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- redo


def test_redo_resets_dormant_units_the_deadest_first() -> None:
    stats = made(mean_abs=[1.0, 0.02, 0.0, 2.96, 0.02, 2.0])  # mean 1: scores are the values
    assert ReDo()(Layer(6), stats) == [Reset([2, 1, 4])]
    assert ReDo(tau=0.0)(Layer(6), stats) == [Reset([2])]
    assert ReDo(tau=1.0)(Layer(6), stats) == [Reset([2, 1, 4, 0])]


def test_redo_scores_are_relative_to_the_layers_mean_or_if_asked_for_to_its_sum() -> None:
    stats = made(mean_abs=[0.1, 1.9])  # over the mean: .1 and 1.9; over the sum: .05 and .95
    assert ReDo(tau=0.06)(Layer(2), stats) == []
    assert ReDo(tau=0.1)(Layer(2), stats) == [Reset([0])]
    assert ReDo(tau=0.06, score="sum")(Layer(2), stats) == [Reset([0])]
    assert ReDo(tau=0.04, score="sum")(Layer(2), stats) == []


def test_redo_of_a_layer_that_is_wholly_dead() -> None:
    assert ReDo(tau=0.0)(Layer(3), made(mean_abs=[0, 0, 0])) == [Reset([0, 1, 2])]


# ---------------------------------------------------------------- split and mirror


def test_split_pairs_dead_units_with_the_most_useful_live_ones() -> None:
    assert SplitDead()(Layer(6), DEAD) == [Split([2, 3], into=[1, 4], noise=0.1)]


@pytest.mark.parametrize(("by", "best"), [("utility", [2, 3]), ("gradient", [3, 5])])
def test_parents_by_utility_or_by_gradient(by: Any, best: list[int]) -> None:
    (edit,) = SplitDead(parent=by)(Layer(6), DEAD)
    assert edit.parents == tuple(best)
    (edit,) = Mirror(parent=by)(Layer(6), DEAD)
    assert edit == Reset([1, 4], mirror, parents=best)


def test_random_parents_are_live_and_distinct() -> None:
    stats = [made(seed=s, mean_abs=[1, 0, 1, 1, 0, 1], maximum=[1, 0, 1, 1, 0, 1]) for s in range(30)]
    drawn = [SplitDead(parent="random")(Layer(6), s)[0] for s in stats]
    assert all(len(set(edit.parents)) == 2 for edit in drawn)
    assert {p for edit in drawn for p in edit.parents} == {0, 2, 3, 5}


def test_split_passes_its_options_on() -> None:
    method = SplitDead(share=0.3, noise=0.0, rescale=True, balanced=True, moments="transform")
    expected = Split([2, 3], into=[1, 4], share=0.3, rescale=True, balanced=True, moments="transform")
    assert method(Layer(6), DEAD) == [expected]


def test_scaling_is_left_out_where_it_would_be_wrong() -> None:
    method = SplitDead(rescale=True, balanced=True, noise=0.0)
    assert method(Layer(6, homogeneous=False), DEAD) == [Split([2, 3], into=[1, 4])]


@pytest.mark.parametrize("name", ["split", "mirror"])
def test_each_parent_is_used_once_and_the_rest_waits(name: str) -> None:
    stats = made(mean_abs=[0, 0, 0, 1], minimum=[0] * 4, maximum=[0, 0, 0, 2], outgoing_norm=[1] * 4)
    (edit,) = find(name)()(Layer(4), stats)
    assert (list(edit.slots), list(edit.parents)) == ([0], [3])


@pytest.mark.parametrize("name", ["split", "mirror"])
def test_a_layer_that_is_wholly_dead_has_no_parents(name: str) -> None:
    assert find(name)()(Layer(3), made(mean_abs=[0, 0, 0])) == []


@pytest.mark.parametrize("name", ["split", "mirror"])
def test_a_constant_that_is_not_zero_is_folded_first(name: str) -> None:
    stats = made(mean=[0.5, 1, 0], mean_abs=[0.5, 1, 0], minimum=[0.5, 0, 0], maximum=[0.5, 2, 0],
                 outgoing_norm=[1, 1, 1])  # fmt: skip
    stats_two_live = made(mean=[0.5, 1, 0, 1], mean_abs=[0.5, 1, 0, 1], minimum=[0.5, 0, 0, 0], maximum=[0.5, 2, 0, 2],
                          outgoing_norm=[1, 1, 1, 2])  # fmt: skip
    edits = find(name)()(Layer(4), stats_two_live)
    assert edits[0] == Fold([0], [0.5])
    assert [list(e.slots) for e in edits] == [[0], [2, 0]]  # the unit that is zero comes first
    assert find(name)()(Layer(3), stats)[-1].slots == (2,)


@pytest.mark.parametrize("name", ["split", "mirror"])
def test_a_constant_that_cannot_be_folded_is_left_alone(name: str) -> None:
    stats = made(mean=[0.5, 1, 0, 1], mean_abs=[0.5, 1, 0, 1], minimum=[0.5, 0, 0, 0], maximum=[0.5, 2, 0, 2],
                 outgoing_norm=[1, 1, 1, 2])  # fmt: skip
    (edit,) = find(name)()(Layer(4, why_not_foldable="no bias"), stats)
    assert list(edit.slots) == [2]


@pytest.mark.parametrize("name", ["split", "mirror"])
def test_tau_takes_dormant_units_too_after_the_dead_ones(name: str) -> None:
    stats = made(mean=[0.01, 0, 1.99, 2], mean_abs=[0.01, 0, 1.99, 2], minimum=[0] * 4, maximum=[0.1, 0, 4, 4],
                 outgoing_norm=[1] * 4)  # fmt: skip
    assert list(find(name)()(Layer(4), stats)[-1].slots) == [1]
    edits = find(name)(tau=0.025)(Layer(4), stats)
    assert edits[0] == Fold([0], [0.01])  # what it said on average stays
    assert list(edits[1].slots) == [1, 0]
    assert list(edits[1].parents) == [3, 2]


def test_a_dormant_unit_is_never_the_parent_of_another() -> None:
    stats = made(mean_abs=[0.01, 0.0, 3.0], minimum=[0] * 3, maximum=[0.1, 0, 4], outgoing_norm=[99, 1, 1])
    (*_, edit) = SplitDead(tau=0.025)(Layer(3), stats)
    assert (edit.parents, edit.into) == ((2,), (1,))


def test_mirror_with_another_cap_hands_it_to_the_birth() -> None:
    (edit,) = Mirror(norm_cap=3.0)(Layer(6), DEAD)
    assert isinstance(edit.birth, partial) and edit.birth.keywords == {"norm_cap": 3.0}


@pytest.mark.parametrize("cap", [2.0, 3.0])
def test_equal_decisions_compare_equal(cap: float) -> None:
    assert Mirror(norm_cap=cap)(Layer(6), DEAD) == Mirror(norm_cap=cap)(Layer(6), DEAD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitDead(share=1.0), "0 <= share < 1, .*got share=1.0"),
        (lambda: SplitDead(noise=-0.1), "noise >= 0 .*noise=-0.1"),
        (lambda: SplitDead(noise=math.nan), "noise=nan"),
        (lambda: SplitDead(tau=-1), "tau >= 0, got .*tau=-1"),
        (lambda: SplitDead(parent="best"), "best"),  # type: ignore[arg-type]
        (lambda: SplitDead(moments="zero"), "zero"),  # type: ignore[arg-type]
        (lambda: Mirror(norm_cap=0.0), "norm_cap > 0, got .*norm_cap=0.0"),
        (lambda: Mirror(tau=math.nan), "tau=nan"),
        (lambda: SteepestDescent(step=0.0), "step > 0, .*got step=0.0"),
        (lambda: SteepestDescent(softness=math.nan), "softness=nan"),
        (lambda: Mirror(parent="best"), "best"),  # type: ignore[arg-type]
        (lambda: ReDo(tau=-0.1), "tau >= 0, got tau=-0.1"),
        (lambda: ReDo(tau=math.inf), "got tau=inf"),
        (lambda: ReDo(score="max"), "redo has no score 'max': there are mean, sum"),  # type: ignore[arg-type]
        (lambda: SelfNormalizedResets(eta=1.0), "eta in .*got eta=1.0"),
        (lambda: SelfNormalizedResets(eta=math.nan), "got eta=nan"),
        (lambda: Random(count=-1), "count >= 0 units, got count=-1"),
    ],
)
def test_settings_out_of_range_are_refused_when_the_method_is_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- by name


@pytest.mark.parametrize(("wrong", "right"), [("spilt", "split"), ("miror", "mirror"), ("rdo", "redo"),
                                              ("ReDo", "redo"), ("Split", "split")])  # fmt: skip
def test_did_you_mean(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"no method '{wrong}': did you mean '{right}'\\?"):
        find(wrong)


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ValueError, match=rf"no method 'xyz': there are {', '.join(METHODS)}, or my_module:MyMethod"):
        find("xyz")


@pytest.mark.parametrize("name", ["no_such_module:Reseed", "math:Reseed", "math:pi", ":Reseed", "math:"])
def test_a_module_without_that_class_is_one_clear_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"no method '{name}'"):
        find(name)


def test_a_method_of_thirty_lines_in_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reseed.py").write_text(METHOD_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    method = find("my_reseed:Reseed")
    stats = made(gradient=[0, 1, 1, 1], mean_abs=[0, 1, 3, 2], age=[9_999] * 4)
    assert method()(Layer(4), stats) == [Split([2], into=[0])]
    assert method(maturity=10_000)(Layer(4), stats) == []

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(16, 2, dtype=torch.double)
    with torch.no_grad():
        net[0].bias[2] = -1e3
    adam = torch.optim.Adam(net.parameters())
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(x)), method(maturity=1), optimizers=[adam])
    with recycler.listening():
        net(x).square().mean().backward()
    adam.step()
    before = net(x)
    report = recycler.step()
    ((name, edit),) = report.edits
    assert (name, edit.into, report.recycled) == ("0", (2,), 1)
    assert torch.equal(net[0].weight[2], net[0].weight[edit.parents[0]])
    torch.testing.assert_close(net(x), before, rtol=1e-14, atol=1e-14)


def test_a_plain_function_with_needs_is_a_method_too() -> None:
    def worst(group: Any, stats: Stats) -> list[Any]:
        return [Reset([int(stats.mean_abs.argmin())])]

    worst.needs = ("mean_abs",)  # type: ignore[attr-defined]
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.ones(3, 2, dtype=torch.double)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.copy_(torch.tensor([1.0, 2.0, -1.5, 4.0]))
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(x)), worst)
    with recycler.listening():
        net(x)
    assert recycler.step().edits == (("0", Reset([2])),)


def test_random_units_may_lose_their_optimizer_state_alone() -> None:
    assert all(not edit.weights for edit in Random(weights=False)(Layer(6), DEAD))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(16, 2, dtype=torch.double)
    adam = torch.optim.Adam(net.parameters())
    group = recycle.trace(net, lambda: net(x))["0"]
    for _ in range(2):
        net(x).square().mean().backward()
        adam.step()
    before = [p.detach().clone() for p in net.parameters()]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in adam.state.items()}
    recycle.apply(Reset([1, 3], weights=False), group, optimizers=[adam])
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    forgotten = {
        net[0].weight: (slice(1, 4, 2),),
        net[0].bias: (slice(1, 4, 2),),
        net[2].weight: (slice(None), slice(1, 4, 2)),
    }
    for parameter, held in state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter in forgotten:
                held[key][forgotten[parameter]] = 0.0
            assert torch.equal(adam.state[parameter][key], held[key])
        assert adam.state[parameter]["step"] == 2


# ---------------------------------------------------------------- gradients

# the layer's mean gradient is 1; unit 1 is dead, unit 4 alive, listened to and never asked
LEARNING = made(
    mean=[1, 0, 3, 2, 1, 1],
    mean_abs=[1, 0, 3, 2, 1, 1],
    minimum=[0, 0, 0, 0, 0, 0],
    maximum=[2, 0, 6, 4, 3, 2],
    outgoing_norm=[2, 9, 4, 3, 9, 1],
    weight_gradient=[0.005, 0.0, 3.0, 2.5, 0.0, 0.495],
)


def test_units_below_one_cutoff_become_halves_of_those_above_the_other() -> None:
    assert GradientCutoff()(Layer(6), LEARNING) == [
        Fold([0], [1.0]),  # the dead unit has nothing to fold
        Split([2, 3], into=[1, 0], share=0.5, noise=0.1),
    ]
    assert GradientCutoff()(Layer(6, why_not_foldable="no bias"), LEARNING) == [
        Split([2, 3], into=[1, 0], share=0.5, noise=0.1)
    ]
    assert GradientCutoff(split=2.75)(Layer(6), LEARNING) == [Split([2], into=[1], share=0.5, noise=0.1)]
    assert GradientCutoff(split=10)(Layer(6), LEARNING) == []  # nothing to fill the places with


def test_cutoffs_may_be_absolute() -> None:
    half = made(mean_abs=[1, 1, 1], maximum=[2, 2, 2], outgoing_norm=[1, 1, 1], weight_gradient=[1e-4, 0.5, 1e-2])
    assert GradientCutoff(split=0.4, remove=1e-3, relative=False)(Layer(3), half)[-1].slots == (0,)
    assert GradientCutoff(split=0.6, remove=1e-3, relative=False)(Layer(3), half) == []


def test_the_width_changes_within_bounds() -> None:
    method = GradientCutoff(resize=True, least=2, most=8, noise=0.0)
    assert method(Layer(6), LEARNING) == [Fold([0], [1.0]), Prune([1, 0]), Split([2, 3], share=0.5)]
    assert GradientCutoff(resize=True, least=6, most=7, noise=0.0)(Layer(6), LEARNING) == [Split([2], share=0.5)]
    assert GradientCutoff(resize=True, least=5, most=5)(Layer(6), LEARNING) == [Prune([1])]


def test_the_width_really_changes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2)).double()
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[0].bias[3] = -100.0
        net[2].weight[:, 5] *= 50
    x = torch.randn(64, 2, dtype=torch.double)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    recycler = recycle.Recycler(
        recycle.trace(net, lambda: net(x)), GradientCutoff(resize=True), optimizers=[optimizer], sample_every=1
    )
    with recycler.listening():
        net(x).square().mean().backward()
    optimizer.step()
    before = net(x).detach()
    report = recycler.step()
    assert [type(edit) for _, edit in report.edits] == [Prune, Split]
    assert net[0].out_features == net[2].in_features == 10  # one went, one came
    assert float((net(x) - before).abs().max() / before.abs().max()) < 0.05  # the noise is felt in second order


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"remove": 3.0}, "0 <= remove < split"),
        ({"least": 1}, "2 <= least <= most"),
        ({"least": 9, "most": 8}, "2 <= least <= most"),
        ({"share": 1.0}, "0 <= share < 1"),
        ({"noise": -1.0}, "noise >= 0"),
    ],
)
def test_cutoffs_that_make_no_sense_are_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GradientCutoff(**options)


def test_regrama_resets_what_learns_nothing_and_keeps_what_it_said() -> None:
    assert ReGraMa()(Layer(6), LEARNING) == [Fold([0], [1.0]), Reset([1, 0])]
    assert ReGraMa(tau=0.5)(Layer(6), LEARNING) == [Fold([0, 5], [1.0, 1.0]), Reset([1, 0, 5])]
    assert ReGraMa(tau=0.0)(Layer(6), LEARNING) == [Reset([1])]
    with pytest.raises(ValueError, match="tau >= 0, got tau=-1"):
        ReGraMa(tau=-1)


def test_regrama_never_resets_the_heads_of_actions_that_were_not_taken() -> None:
    """In the authors' code Q-values of actions outside the batch were redrawn, and outgoing weights kept."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        net[0].bias[2] = -100.0
    x = torch.randn(32, 3, dtype=torch.double)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-9)
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(x)), ReGraMa(), optimizers=[optimizer], sample_every=1)
    with recycler.listening():
        net(x)[:, 1].square().mean().backward()  # actions 0, 2 and 3 are never taken
    optimizer.step()
    before = net(x).detach()
    assert recycler.step().edits == (("0", Reset([2])),)
    assert torch.equal(net(x), before)


# ---------------------------------------------------------------- continual backprop


def aged(ages: list[float], updates: int = 1000) -> Stats:
    """Utilities 2, 0, 12, 6, 0, 1 by contribution."""
    return dataclasses.replace(DEAD, age=torch.tensor(ages, dtype=torch.double), updates=updates)


def test_cbp_replaces_the_least_useful_mature_units_at_its_rate() -> None:
    method = ContinualBackprop(rate=1e-3, maturity=100)
    old = aged([500, 50, 500, 500, 50, 500])  # the dead ones are young: 4 mature units, 4 due
    assert method(Layer(6), old) == [Fold([5, 0, 3, 2], [1.0, 1.0, 2.0, 3.0]), Reset([5, 0, 3, 2])]
    method = ContinualBackprop(rate=5e-4, maturity=100)
    assert method(Layer(6), old) == [Fold([5, 0], [1.0, 1.0]), Reset([5, 0])]
    assert method(Layer(6), aged([50] * 6)) == []
    assert ContinualBackprop()(Layer(6), aged([10_000] * 6)) == []  # older than maturity, not as old as


def test_cbp_adds_up_parts_of_units_and_remembers_them() -> None:
    method, copy = ContinualBackprop(rate=1e-4, maturity=0), ContinualBackprop(rate=1e-4, maturity=0)
    old = aged([500] * 6)  # .6 units an event
    assert [len(method(Layer(6), old)) > 0 for _ in range(5)] == [False, True, False, True, True]
    assert method(Layer(6, name="other"), old) == []
    method(Layer(6), old)
    copy.load_state_dict(method.state_dict())
    assert [method(Layer(6), old) for _ in range(4)] == [copy(Layer(6), old) for _ in range(4)]


def test_cbp_utilities() -> None:
    stats = made(
        mean_abs=[4, 1], variance=[0, 9], outgoing_norm=[2, 1], incoming_norm=[1, 6], age=[1, 1], maximum=[4, 3]
    )
    assert ContinualBackprop().usefulness(stats).tolist() == [8, 1]
    assert ContinualBackprop(utility="zero_contribution").usefulness(stats).tolist() == [0, 3]
    assert ContinualBackprop(utility="adaptable").usefulness(stats).tolist() == [0, 0.5]
    for wrong, reason in (
        ({"rate": 2.0}, "rate in"),
        ({"maturity": -1}, "maturity >= 0"),
        ({"utility": "x"}, "there are"),
    ):
        with pytest.raises(ValueError, match=reason):
            ContinualBackprop(**wrong)  # type: ignore[arg-type]


def test_cbp_keeps_the_mean_of_what_it_removes() -> None:
    """The reference code zeroes the mean before it reads it, so that its correction is always nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        net[0].bias += 1.0
    x = torch.randn(256, 3, dtype=torch.double)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    method = ContinualBackprop(rate=0.5, maturity=0)
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(x)), method, optimizers=[optimizer], sample_every=1)
    with recycler.listening():
        net(x).sum().backward()
    optimizer.step()
    before = net(x).detach()
    assert recycler.step().recycled == 3
    assert float((net(x) - before).abs().max()) > 1e-3  # live units are gone
    assert float((net(x) - before).mean(0).abs().max()) < 1e-12  # and their mean is not
    for _ in range(2):
        with recycler.listening():
            net(x).sum().backward()
        optimizer.step()
    report = recycler.step()
    assert recycler.state_dict()["method"] == {"owed": {"0": 0.0}}
    assert report.recycled == 6


# ---------------------------------------------------------------- self-normalized resets


def test_snr_resets_units_whose_silence_cannot_be_chance_the_least_likely_first() -> None:
    stats = made(silence=[0, 30, 4, 9, 2], rarity=[1, 0.008, 0.4, 0.0, 0.02], maximum=[1, 1, 1, 0, 1])
    assert SelfNormalizedResets()(Layer(5), stats) == [Reset([3, 1])]
    assert SelfNormalizedResets(eta=0.02)(Layer(5), stats) == [Reset([3, 1, 4])]
    assert SelfNormalizedResets(eta=0.0)(Layer(5), stats) == [Reset([3])]


def test_snr_folds_constants_and_leaves_alone_what_it_cannot_fold() -> None:
    stats = made(silence=[9, 9, 0], rarity=[0, 0, 1], mean=[0.5, 0, 1], minimum=[0.5, 0, 0], maximum=[0.5, 0, 2])
    assert SelfNormalizedResets()(Layer(3), stats) == [Fold([0], [0.5]), Reset([0, 1])]
    assert SelfNormalizedResets()(Layer(3, why_not_foldable="no bias"), stats) == [Reset([1])]


def firing_net() -> tuple[nn.Module, Any]:
    """Unit u of the layer fires in a pass if entry u of its only sample is 1."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3))
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
    return net, lambda *on: torch.tensor([[float(u in on) for u in range(3)]], dtype=torch.double)


def born_dead(name: str, tensor: torch.Tensor, generator: Any) -> None:
    tensor.fill_(-1.0)


def test_snr_by_hand() -> None:
    """Unit 0 fires always, unit 1 every third pass, unit 2 did always and is silent for the last 3 passes."""
    net, x = firing_net()
    adam = torch.optim.Adam(net.parameters(), lr=0.0)
    method = SelfNormalizedResets(eta=0.02)
    recycler = recycle.Recycler(
        recycle.trace(net, lambda: net(x(0, 1, 2))), method, optimizers=[adam], sample_every=1, init=born_dead
    )

    def train(*on: int) -> None:
        with recycler.listening():
            net(x(*on)).sum().backward()
        adam.step()

    for step in range(10):
        train(*([0, 1, 2] if step % 3 == 0 else [0, 2]))
    for _ in range(3):
        train(0)
    stats = recycler.tracker.stats(recycler.graph["0"])
    # 13 passes. Times between firings: thirteen 1s; 1, 3, 3, 3; ten 1s
    assert stats.silence.tolist() == [0, 3, 3]
    usual = (13 + 10 + 10) / (13 + 4 + 10)  # passes between firings, of the layer
    mean = [(10 + usual) / (4 + 1), (10 + usual) / (10 + 1)]
    expected = [1.0, (mean[0] / (1 + mean[0])) ** 3 / (4 + 1), (mean[1] / (1 + mean[1])) ** 3 / (10 + 1)]
    assert stats.rarity.tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[2] < 0.02 and 0.05 < expected[1] < 0.1  # a time of 4 would be unusual for unit 1 as well
    moments = [adam.state[p]["exp_avg_sq"] for p in (net[0].weight, net[2].weight)]
    kept = [net[0].weight[:2].clone(), moments[0][:2].clone(), moments[1][:, :2].clone()]
    report = recycler.step()
    assert report.edits == (("0", Reset([2])),)
    assert net[2].weight.tolist() == [[1, 1, 0]] and net[0].weight[2].tolist() == [-1, -1, -1]
    assert not moments[0][2].any() and not moments[1][:, 2].any()
    now = [net[0].weight[:2], moments[0][:2], moments[1][:, :2]]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)) and all(m.any() for m in kept)
    assert adam.state[net[0].weight]["step"] == 13
    train()
    stats = recycler.tracker.stats(recycler.graph["0"])
    assert stats.silence.tolist() == [1, 4, 1]  # who stays keeps the past, a newborn has none
    usual = (13 + 10) / (13 + 4)
    assert stats.rarity[2].item() == pytest.approx(usual / (1 + usual), rel=1e-6)


def test_snr_lets_a_unit_that_fires_rarely_be_silent_for_long() -> None:
    net, x = firing_net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    graph = recycle.trace(net, lambda: net(x(0, 1, 2)))
    recycler = recycle.Recycler(graph, SelfNormalizedResets(), optimizers=[sgd], sample_every=1)
    found = []
    for step in range(200):
        on = [0, *[1] * (step % 40 == 0), *[2] * (step < 170)]
        with recycler.listening():
            net(x(*on)).sum().backward()
        sgd.step()
        if step % 100 == 99:  # the inter-firing times outlive the windows of these events
            found.append([list(edit.slots) for _, edit in recycler.step().edits])
    assert found == [[], [[2]]]  # units 1 and 2 are both silent for 30 passes or more; unit 1 always was


def test_snr_counts_firings_in_successive_passes_and_no_silence_that_a_reset_ended() -> None:
    """The authors' code cuts the first bin of its histogram off and enters each reset as if the unit had fired.

    Then the unit below would have known only silences, so that none is unusual, and the silences that resets ended
    would have become the habit of the next unit in its place.
    """
    net, x = firing_net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    graph = recycle.trace(net, lambda: net(x(0, 1, 2)))
    recycler = recycle.Recycler(graph, SelfNormalizedResets(eta=0.03), optimizers=[sgd], sample_every=1, init=born_dead)

    def train(*on: int) -> None:
        with recycler.listening():
            net(x(*on)).sum().backward()
        sgd.step()

    for step in range(200):
        train(0, 1, *[2] * (step % 50 != 49))
    usual = (200 + 200 + 199) / (200 + 200 + 196)
    mean = (199 + usual) / (196 + 1)  # 193 times of 1 and 3 of 2; the last pass was silent, so this is the fourth
    rarity = recycler.tracker.stats(graph["0"]).rarity[2].item()
    assert rarity == pytest.approx((3 + mean / (1 + mean)) / (196 + 1), rel=1e-5)
    for _ in range(4):
        assert recycler.step().edits == (("0", Reset([2])),)
        for _ in range(6):
            train(0, 1)


@pytest.mark.parametrize("fires", [0.9, 0.5, 0.1, "in bursts"])
def test_snr_resets_live_units_no_more_often_than_it_says(fires: Any) -> None:
    """Units that are silent for 49 passes at a time, once in 20 firings, are no exception: they do it too often."""
    generator, eta, width = torch.Generator().manual_seed(0), 0.02, 100
    record, left = Firing(), torch.zeros(width)
    alarms = firings = 0
    before = torch.zeros(width, dtype=torch.bool)
    for step in range(1500):
        draw = torch.rand(width, generator=generator)
        fired = left <= 0 if fires == "in bursts" else draw < fires
        left = torch.where(fired, 49.0 * (draw < 0.05), left - 1)
        record.add(fired[None].float())
        if step >= 700:
            seen = record.read()
            alarm = (seen["rarity"] <= eta) & (seen["silence"] > 0)
            alarms += int((alarm & ~before).sum())
            firings += int(fired.sum())
            before = (before | alarm) & ~fired
    assert alarms <= eta * firings


def test_snr_finds_a_layer_that_never_fired() -> None:
    record = Firing()
    for _ in range(7):
        record.add(torch.zeros(4, 3))
    assert record.read()["rarity"].tolist() == [2**-7] * 3


def test_inter_firing_times_fade() -> None:
    record = Firing()
    for _ in range(3000):
        record.add(torch.ones(1, 2))
    record.fade()
    assert record.times.sum(1).tolist() == pytest.approx([1024, 1024])
    assert record.total.tolist() == pytest.approx([1024, 1024])
    for step in range(6000):  # from now on every third pass
        record.add(torch.full((1, 2), float(step % 3 == 2)))
        if step % 600 == 599:
            record.fade()
    assert record.read()["rarity"].tolist() == [1, 1]
    record.add(torch.zeros(1, 2))
    record.add(torch.zeros(1, 2))
    assert record.read()["rarity"][0] > 0.8  # two silent passes are usual now


def test_inter_firing_times_move_with_the_units_of_a_resized_layer() -> None:
    record = Firing()
    for on in ([1.0, 1, 0], [1.0, 0, 0]):
        record.add(torch.tensor([on]))
    record.follow([1, -1])
    assert record.state() is not None
    silent, total, times = record.state()  # type: ignore[misc]
    assert (silent.tolist(), total.tolist(), times.sum(1).tolist()) == ([1, 0], [1, 0], [1, 0])


# ---------------------------------------------------------------- replay


def line(event: int, network: str = "policy", **recycled: int) -> str:
    """One event as a callback writes it."""
    groups = {name: {"width": 6, "recycled": count} for name, count in recycled.items()}
    return json.dumps({"step": 100 * event, "network": network, "event": event, "groups": groups, "edits": []})


def written(folder: Path, *lines: str) -> str:
    path = folder / "edits.jsonl"
    path.write_text("".join(f"{text}\n" for text in lines))
    return str(path)


def at_event(number: int, seed: int = 0) -> Stats:
    return dataclasses.replace(made(seed=seed, mean_abs=[1] * 6, maximum=[1] * 6), event=number)


def test_replay_resets_as_many_random_units_as_the_other_run_recycled(tmp_path: Path) -> None:
    method = Replay(written(tmp_path, line(1, layer=2, other=1), line(2, layer=0, other=3), line(4, layer=9, other=0)))
    for event, layer, other in ((1, 2, 1), (2, 0, 3), (3, 0, 0), (4, 6, 0), (5, 0, 0)):  # 6 is the whole layer
        for name, count in (("layer", layer), ("other", other)):
            edits = method(Layer(6, name), at_event(event))
            assert [len(set(edit.slots)) for edit in edits] == [count] * (count > 0)
            assert all(isinstance(edit, Reset) and edit.birth is None for edit in edits)
    drawn = {unit for seed in range(30) for unit in method(Layer(6), at_event(1, seed))[0].slots}
    assert drawn == set(range(6))
    assert method(Layer(6), at_event(1, 3)) == method(Layer(6), at_event(1, 3))


def test_replay_of_one_of_several_networks(tmp_path: Path) -> None:
    lines = [line(1, "actor", layer=1), line(1, "critic", layer=4)]
    method = Replay(written(tmp_path, *lines))
    with pytest.raises(recycle.NotRecyclable, match="has actor, critic; say which with network="):
        method(Layer(6), at_event(1))
    assert [len(method.for_network(n)(Layer(6), at_event(1))[0].slots) for n in ("actor", "critic")] == [1, 4]
    assert Replay(method.path, network="critic").for_network("actor").network == "critic"  # as its user says
    with pytest.raises(ValueError, match="has no network 'policy', only actor, critic"):
        method.for_network("policy")


def test_replay_without_a_file_says_so_and_does_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.ones(3, 2, dtype=torch.double)
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(x)), Replay())
    with recycler.listening():
        net(x)
    report = recycler.step()
    assert report.edits == () and report.groups["0"].note == "replay needs another run's file: path=.../edits.jsonl"


def test_replay_of_a_run_of_another_network_says_so(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.ones(3, 2, dtype=torch.double)
    method = Replay(written(tmp_path, line(1, fc1=1, fc2=1)))
    recycler = recycle.Recycler(recycle.trace(net, lambda: net(x)), method)
    with recycler.listening():
        net(x)
    report = recycler.step()
    assert report.edits == () and report.groups["0"].note.endswith("has no group '0', only fc1, fc2")


def test_replay_of_a_recorded_run_recycles_the_same_numbers(tmp_path: Path) -> None:
    """Events at which nothing could be done count as events too, or all later ones come too early."""

    def run(method: Any) -> tuple[list[str], list[list[int]]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)).double()
        x = torch.randn(32, 3, dtype=torch.double)
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        graph = recycle.trace(net, lambda: net(x))
        recycler = recycle.Recycler(graph, method, optimizers=[adam], sample_every=1)
        lines, counts = [], []
        for event in range(5):
            with torch.no_grad():
                net[0].bias[:event] = -1e3
                net[2].bias[event] = -1e3
            if event != 1:  # no pass is seen in this window
                with recycler.listening():
                    net(x).sum().backward()
                adam.step()
            report = recycler.step()
            lines.append(json.dumps({"step": event, "network": "policy", **report.to_dict()}))
            counts.append([group.recycled for group in report.groups.values()])
        return lines, counts

    lines, counts = run(ReDo(tau=0.0))
    assert sum(map(sum, counts)) > 8 and counts[1] == [0, 0]
    assert run(Replay(written(tmp_path, *lines)))[1] == counts


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "holds no event"),
        (["{"], "line 1 of .* is no event of an edits.jsonl \\(JSONDecodeError"),
        (["[1]"], "line 1 of .* is no event .*TypeError"),
        ([line(1, layer=1), '{"event": 2, "network": "policy"}'], "line 2 of .* is no event .*KeyError: 'groups'"),
        (['{"event": 1, "network": "policy", "groups": {"layer": {}}}'], "KeyError: 'recycled'"),
        ([line(1, layer=1), line(2, layer=1), line(1, layer=2)], "line 3 of .* is event 1 again: .* more than one run"),
    ],
)
def test_a_file_that_replay_cannot_read_is_one_clear_error(tmp_path: Path, lines: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^replay: .*{reason}"):
        Replay(written(tmp_path, *lines))


def test_a_file_that_replay_cannot_find_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"replay cannot read .*edits\.jsonl: .*No such file"):
        Replay(str(tmp_path / "edits.jsonl"))
    with pytest.raises(ValueError, match="replay cannot read"):
        Replay(str(tmp_path))


# ---------------------------------------------------------------- splitting steepest descent

# unit 0 has most to gain, then 3; 2 has nothing, 1 and 4 are dead; with one input S is a number, of the gradient's sign
SPLITTING = dataclasses.replace(
    made(mean_abs=[1, 0, 1, 1, 0], maximum=[2, 0, 2, 2, 0], outgoing_norm=[1, 1, 9, 2, 1]),
    sample=Sample(
        torch.tensor([[1.0], [1.0]], dtype=torch.double),
        torch.tensor([[1.0, -9, 1, 1, -9], [-1, -8, -1, -1, -8]], dtype=torch.double),
        torch.tensor([[-4.0, 0, 1, -2, 0]] * 2, dtype=torch.double),
    ),
)


def test_s2d_splits_where_the_loss_falls_most_and_along_which_direction() -> None:
    (edit,) = SteepestDescent()(Layer(5), SPLITTING)
    assert isinstance(edit, Split)
    assert (edit.parents, edit.into, edit.share, edit.noise) == ((0, 3), (1, 4), 0.5, 0.1)
    assert edit.along is not None and [abs(row[0]) for row in edit.along] == pytest.approx([1, 1])


def test_s2d_leaves_units_dead_where_no_split_would_help() -> None:
    assert SPLITTING.sample is not None
    worse = dataclasses.replace(SPLITTING.sample, gradient=SPLITTING.sample.gradient.abs())
    assert SteepestDescent()(Layer(5), dataclasses.replace(SPLITTING, sample=worse)) == []
    one = dataclasses.replace(SPLITTING.sample, gradient=torch.tensor([[1.0, 0, -1, 1, 0]] * 2, dtype=torch.double))
    (edit,) = SteepestDescent()(Layer(5), dataclasses.replace(SPLITTING, sample=one))
    assert (edit.parents, edit.slots) == ((2,), (1,))


def test_parents_by_eigenvalue() -> None:
    (edit,) = SplitDead(parent="eigenvalue")(Layer(5), SPLITTING)
    assert edit == Split([0, 3], into=[1, 4], noise=0.1)
    (edit,) = Mirror(parent="eigenvalue")(Layer(5), SPLITTING)
    assert edit == Reset([1, 4], mirror, parents=[0, 3])
    assert "sample" in SplitDead(parent="eigenvalue").needs and "sample" not in SplitDead().needs


@pytest.mark.parametrize("method", [SteepestDescent(), SplitDead(parent="eigenvalue")])
def test_the_splitting_matrix_of_other_units_is_refused(method: Any) -> None:
    with pytest.raises(recycle.NotRecyclable, match="smoothed for ReLU-like units, those of 'layer' are not"):
        method(Layer(5, homogeneous=False), SPLITTING)
    assert method(Layer(3, homogeneous=False), HEALTHY) == []


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()])
def test_s2d_recycles_or_says_why_not(activation: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 1)).double()
    x = torch.randn(64, 3, dtype=torch.double)
    adam = torch.optim.Adam(net.parameters(), lr=1e-9)
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0.0, -1e3
    recycler = recycle.Recycler(
        recycle.trace(net, lambda: net(x)), SteepestDescent(step=1e-3), optimizers=[adam], sample_every=1
    )
    with recycler.listening():
        (net(x) - x[:, :1].abs()).square().mean().backward()
    adam.step()
    before = net(x).detach()
    report = recycler.step()
    if isinstance(activation, nn.Tanh):
        assert report.edits == () and "ReLU-like units" in report.groups["0"].note
    else:
        assert [edit.slots for _, edit in report.edits] == [(2,)]
        assert float((net(x) - before).abs().max()) < 1e-3 * float(before.abs().max())


# ---------------------------------------------------------------- revive

# the layer's mean |activation| is 1: unit 1 is dead, 2 dormant to both rules (score .02), 3 to rule B only (.08)
FADING = made(
    mean=[1.9, 0, 0.02, 0.08, 3],
    mean_abs=[1.9, 0, 0.02, 0.08, 3],
    minimum=[0, 0, 0, 0, 1],
    maximum=[4, 0, 1, 1, 5],
)


def test_revive_folds_and_resets_what_is_dormant_the_deadest_first() -> None:
    assert Revive()(Layer(5), FADING) == [Fold([2], [0.02]), Reset([1, 2], revive, warm=0.1)]
    assert Revive(rule="B")(Layer(5), FADING) == [Fold([2, 3], [0.02, 0.08]), Reset([1, 2, 3], revive, warm=0.1)]
    assert Revive(rule="B", tau=0.0, warm=0.0)(Layer(5), FADING) == [Reset([1], revive)]
    assert Revive(tau=0.0)(Layer(5, why_not_foldable="no bias"), FADING) == [Reset([1], revive, warm=0.1)]


def test_revive_names_its_birth_s_options_in_the_log() -> None:
    (edit,) = Revive(tau=0.0, active=0.2)(Layer(5), FADING)
    assert describe(edit) == {
        "edit": "Reset",
        "units": [1],
        "birth": "revive(active=0.2)",
        "warm": 0.1,
        "weights": True,
    }
    assert [edit] == Revive(tau=0.0, active=0.2)(Layer(5), FADING)


@pytest.mark.parametrize("wrong", [{"tau": -0.1}, {"active": 0.0}, {"active": 1.0}, {"warm": -1.0}, {"warm": 2.0}])
def test_revive_refuses_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"revive needs tau >= 0 \(or None\), 0 < active < 1 and 0 <= warm <= 1"):
        Revive(**wrong)


def test_revive_refuses_a_rule_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="revive has no rule 'A': there are B, C"):
        Revive(rule="A")
