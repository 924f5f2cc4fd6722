"""When, where and how many: triggers and budgets on statistics written by hand, and growth of real networks."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recycle
from recycle import Fold, Grow, NotRecyclable, Prune, Recycler, Reset, Split
from recycle.births import Given, revive
from recycle.edits import born, fewer
from recycle.methods import find
from recycle.methods.budget import Budget
from recycle.methods.folding import Folding
from recycle.methods.grow import Growth
from recycle.methods.redo import ReDo
from recycle.methods.senn import SelfExpanding
from recycle.methods.together import check_together, joined
from recycle.methods.triggers import Every, Plateau, Rank, Score, trigger
from recycle.metrics import numerical_rank
from recycle.stats import Stats


@dataclass
class Layer:
    """All that a growth may see of a group; ``others`` are the layers of the same network."""

    name: str
    width: int
    why_fixed: str = ""
    homogeneous: bool = True
    why_not_foldable: str = ""
    each: int = 10  # parameters of a unit
    parameters: int = 100

    def cost(self, count: int = 1) -> int:
        return self.each * count


def seen(width: int, *, event: int = 1, dead: int = 0, **given: Any) -> Stats:
    """Statistics of a layer whose last ``dead`` units are dead, unit u having a utility of u + 1."""
    live = torch.arange(1, width + 1).double()
    live[width - dead :] = 0
    names = ("firing_rate", "variance", "gradient", "weight_gradient", "age", "incoming_norm", "silence", "rarity")
    values = {name: torch.zeros(width, dtype=torch.double) for name in names}
    values |= {"mean": live, "mean_abs": live, "minimum": torch.zeros(width).double(), "maximum": 2 * live}
    values |= {"outgoing_norm": torch.ones(width).double()}
    return Stats(samples=10, event=event, **(values | given))


def rows(rank: int, width: int, samples: int = 40) -> Tensor:
    """Activations of that many directions, all of the same size."""
    table = torch.zeros(samples, width)
    table[:rank, :rank] = torch.eye(rank)
    return table


def asked(growth: Growth, layers: list[Layer], *, event: int = 1, **stats: Stats) -> dict[str, Any]:
    """What each layer is told at an event whose edits are all made: edits, or why not; in the order of asking."""
    every = {layer.name: stats.get(layer.name) or seen(layer.width) for layer in layers}
    every = {name: replace(one, event=event) for name, one in every.items()}
    told: dict[str, Any] = {}
    for name in growth.survey(layers, every):
        layer = next(layer for layer in layers if layer.name == name)
        try:
            told[name] = growth(layer, every[name])
        except NotRecyclable as error:
            told[name] = str(error)
            continue
        for edit in told[name]:
            layer.width += born(edit) - (len(edit.units) if isinstance(edit, Prune) else 0)
    return told


# Triggers ------------------------------------------------------------------------------------------------------


def wishes(when: Any, layers: list[Layer], **stats: Stats) -> dict[str, float]:
    found: dict[str, float] = when(layers, stats)
    return found


def test_fixed_fires_at_every_so_many_events() -> None:
    a = Layer("a", 4)
    fired = [event for event in range(1, 10) if wishes(Every(3), [a], a=seen(4, event=event))]
    assert fired == [3, 6, 9]


def test_the_rank_is_counted_relative_to_the_largest_singular_value() -> None:
    table = torch.diag(torch.tensor([5.0, 1.0, 0.06, 0.04, 0.0]))
    assert [numerical_rank(table, t) for t in (0.001, 0.01, 0.1, 0.5)] == [4, 3, 2, 1]
    assert numerical_rank(1e-6 * table, 0.01) == 3
    assert numerical_rank(torch.zeros(5, 3)) == 0
    assert numerical_rank(torch.ones(5, 3)) == 1


def test_layers_grow_that_use_all_their_width() -> None:
    layers = [Layer("full", 10), Layer("fuller", 10), Layer("idle", 10)]
    stats = {name: seen(10, activations=rows(rank, 10)) for name, rank in [("full", 9), ("fuller", 10), ("idle", 8)]}
    assert wishes(Rank(0.9), layers, **stats) == {"full": 0.9, "fuller": 1.0}
    assert wishes(Rank(0.91), layers, **stats) == {"fuller": 1.0}
    assert wishes(Rank(0.5), [Layer("wide", 50)], wide=seen(50, activations=rows(20, 50, 20))) == {}  # 20 samples


def losses(when: Plateau, *values: float) -> list[int]:
    a = Layer("a", 4)
    told = [wishes(when, [a], a=seen(4, recorded={when.quantity: value})) for value in values]
    return [event for event, found in enumerate(told, 1) if found]


def test_a_plateau_waits_for_its_patience_and_then_anew() -> None:
    assert losses(Plateau(patience=2), 5, 4, 3, 3, 3, 3, 3, 3) == [5, 7]
    assert losses(Plateau(patience=3), 5, 4, 4, 4, 3, 3, 3, 3) == [8]


def test_a_plateau_s_threshold_is_relative_and_strict() -> None:
    assert losses(Plateau(patience=1, threshold=0.1), 100, 91, 80) == [2]
    assert losses(Plateau(patience=1, threshold=0.1), 100, 90, 89.9) == [2, 3]  # 91 is then the best: 90 >= 81.9
    assert losses(Plateau(patience=1, threshold=0.1), 100, 89) == []
    assert losses(Plateau(patience=1, threshold=0.1, mode="max"), 100, 109, 125) == [2]
    assert losses(Plateau(patience=1, threshold=0.1, mode="max"), -100, -95, -80) == [2]


def test_a_value_that_is_none_counts_for_nothing() -> None:
    assert losses(Plateau(patience=2), 3, math.nan, math.inf, 3, math.nan, 3) == [6]


def test_a_plateau_remembers() -> None:
    first, second = Plateau(patience=3), Plateau(patience=3)
    assert losses(first, 3, 3, 3) == []
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert losses(second, 3) == [1] == losses(first, 3)


def test_what_nobody_recorded_is_asked_for_by_name() -> None:
    with pytest.raises(
        NotRecyclable, match=r"plateau of 'loss' cannot be seen: accuracy was recorded .*\.record\('loss'"
    ):
        wishes(Plateau(), [Layer("a", 4)], a=seen(4, recorded={"accuracy": 1.0}))


def test_a_score_has_to_pass_both_thresholds() -> None:
    gains = {"a": (0.05, 1e-3), "b": (0.05, 3e-3), "c": (0.03, 1.0), "d": (0.2, 1.0)}
    when = Score(score=lambda group, stats: gains[group.name])
    found = wishes(when, [Layer(name, 4) for name in gains], **{name: seen(4) for name in gains})
    assert found == {"b": 0.05, "d": 0.2}


def test_a_layer_without_a_score_does_not_grow_and_where_none_has_one_the_reasons_are_told() -> None:
    def score(group: Any, stats: Any) -> tuple[float, float]:
        if group.width < 8:
            raise NotRecyclable("too few examples")
        return 1.0, 1.0

    small, large = Layer("small", 4), Layer("large", 8)
    when = Score(score=score)
    assert wishes(when, [small, large], small=seen(4), large=seen(8)) == {"large": 1.0}
    with pytest.raises(NotRecyclable, match=r"no layer has a score \(small: too few examples\)"):
        wishes(when, [small], small=seen(4))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("every:4", Every(4)),
        ("rank:0.8", Rank(0.8)),
        ("rank", Rank()),
        ("plateau:train/value_loss,3,0.05", Plateau("train/value_loss", 3, 0.05)),
        ("plateau:rollout/ep_rew_mean,4,0,max", Plateau("rollout/ep_rew_mean", 4, 0.0, "max")),
        ("score:0.1", Score(0.1)),
    ],
)
def test_triggers_as_words(words: str, expected: Any) -> None:
    assert trigger(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("never", "when is one of every:EVENTS, rank:SHARE"),
        ("every:often", "got 'every:often'"),
        ("every:1,2", "when is one of"),
        ("every:0", "N >= 1, got 0"),
        ("rank:1.1", "0 < share <= 1"),
        ("plateau:loss,0", "patience >= 1"),
        ("plateau:loss,1,0.1,up", "plateau has no mode 'up': there are min, max"),
        ("score:-1", "numbers >= 0"),
    ],
)
def test_words_that_say_no_trigger_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Growth(when=words)


# Where and how many --------------------------------------------------------------------------------------------


def test_alone_it_adds_units_like_the_module_s_own_or_with_their_hinge_in_the_data() -> None:
    assert asked(Growth(when="every:1", count=3), [Layer("a", 4)]) == {"a": [Grow(3)]}
    growth = Growth(when="every:1", birth="revive")
    assert asked(growth, [Layer("a", 4)]) == {"a": [Grow(1, revive)]} and "inputs" in growth.needs


@pytest.mark.parametrize(("count", "width", "gain"), [(0.25, 8, 2), (0.25, 2, 1), (0.5, 9, 4), (1, 9, 1), (5, 2, 5)])
def test_a_count_is_of_units_or_a_share_of_the_width(count: float, width: int, gain: int) -> None:
    assert asked(Growth(when="every:1", count=count), [Layer("a", width)]) == {"a": [Grow(gain)]}


def test_the_later_layers_are_asked_first() -> None:
    layers = [Layer("a", 4), Layer("b", 4), Layer("c", 4)]
    assert list(asked(Growth(when="every:1"), layers)) == ["c", "b", "a"]


def test_of_layers_that_another_method_widens_the_one_that_wants_most_is_asked_first() -> None:
    layers = [Layer("a", 4), Layer("b", 6), Layer("c", 5)]
    assert list(asked(Growth(Proposals(Grow(1)), when="score:0,0"), layers)) == ["b", "c", "a"]
    assert list(asked(Growth(Proposals(Grow(1)), when="every:1"), layers)) == ["a", "c", "b"]  # the narrowest


def test_the_best_is_what_the_trigger_values_most_and_of_equals_the_narrowest() -> None:
    layers = [Layer("a", 10), Layer("b", 10), Layer("c", 5)]
    ranks = {"a": seen(10, activations=rows(10, 10)), "b": seen(10, activations=rows(9, 10)),
             "c": seen(5, activations=rows(5, 5))}  # fmt: skip
    told = asked(Growth(when="rank:0.9", where="best"), layers, **ranks)
    assert told == {"a": [], "b": [], "c": [Grow(1)]}
    assert asked(Growth(when="every:1", where="best"), layers)["c"] == [Grow(1)]


def test_no_layer_becomes_wider_than_most() -> None:
    growth = Growth(when="every:1", count=3, most=8)
    layers = [Layer("a", 4), Layer("b", 7)]
    assert asked(growth, layers, event=1) == {"a": [Grow(3)], "b": [Grow(1)]}
    told = asked(growth, layers, event=2)
    assert told["a"] == [Grow(1)] and told["b"] == "it is to grow, but has its most=8 units already"


def test_a_budget_of_units_is_cut_to_the_last_one_and_then_spent() -> None:
    growth = Growth(when="every:1", count=2, budget=15)
    layers = [Layer("a", 6), Layer("b", 4)]
    assert asked(growth, layers, event=1) == {"a": [Grow(2)], "b": [Grow(2)]}
    told = asked(growth, layers, event=2)  # the narrower one is served first
    assert told == {"a": "it is to grow, but there is no room for another unit (budget=15)", "b": [Grow(1)]}
    assert sum(layer.width for layer in layers) == 15
    assert all(isinstance(why, str) for why in asked(growth, layers, event=3).values())


def test_a_budget_of_parameters_counts_what_a_unit_brings() -> None:
    layers = [Layer("a", 4, each=30), Layer("b", 4, each=7)]
    assert Budget(parameters=129).shares(layers, layers, [5, 5]) == [0, 4]
    assert Budget(parameters=130).shares(layers, layers, [5, 5]) == [1, 0]
    assert Budget(parameters=99).shares(layers, layers, [5, 5]) == [0, 0]
    assert Budget(most=6, units=11).shares(layers, layers, [5, 5]) == [2, 1]
    assert Budget().shares(layers, layers, [5, 5]) == [5, 5]


def test_a_network_rests_after_it_grew() -> None:
    growth = Growth(when="every:1", cooldown=2)
    layer = Layer("a", 4)
    assert [event for event in range(1, 9) if asked(growth, [layer], event=event)["a"]] == [1, 4, 7]


def test_a_layer_of_one_size_says_why_and_others_grow() -> None:
    told = asked(Growth(when="every:1"), [Layer("a", 4, why_fixed="the forward pass hard-codes 4"), Layer("b", 4)])
    assert told == {"a": "it is to grow, but cannot change its width: the forward pass hard-codes 4", "b": [Grow(1)]}


def test_layers_that_may_not_be_edited_now_are_not_asked_about_but_count() -> None:
    growth = Growth(when="every:1", count=9, budget=12)
    layers = [Layer("a", 4), Layer("b", 5)]
    assert list(growth.survey(layers, {"b": seen(5)})) == ["b", "a"]
    assert growth(layers[1], seen(5)) == [Grow(3)]


# By another method ---------------------------------------------------------------------------------------------


class Proposals:
    """Proposes what it was given, and scores layers by their width."""

    needs = ("weight_gradient",)

    def __init__(self, *edits: Any) -> None:
        self.edits = list(edits)
        self.asked = 0

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        self.asked += 1
        return list(self.edits)

    def score(self, group: Any, stats: Any) -> tuple[float, float]:
        return group.width / 10, 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


def test_the_other_method_is_asked_only_when_a_layer_is_to_grow_and_is_cut_to_what_it_may() -> None:
    by = Proposals(Fold([0], [1.0]), Grow(2), Split([1, 2, 3]), Grow(4))
    growth = Growth(by, when="every:2", count=4)
    assert "weight_gradient" in growth.needs
    assert asked(growth, [Layer("a", 4)], event=1) == {"a": []} and by.asked == 0
    assert asked(growth, [Layer("a", 4)], event=2) == {"a": [Fold([0], [1.0]), Grow(2), Split([1, 2])]}


def test_without_a_count_it_is_the_other_method_s() -> None:
    by = Proposals(Grow(3))
    assert asked(Growth(by, when="every:1"), [Layer("a", 4)]) == {"a": [Grow(1)]}
    by.count = 2  # type: ignore[attr-defined]
    assert asked(Growth(by, when="every:1"), [Layer("a", 4)]) == {"a": [Grow(2)]}
    assert asked(Growth(by, when="every:1", count=3), [Layer("a", 4)]) == {"a": [Grow(3)]}
    assert asked(Growth(when="every:1"), [Layer("a", 4)]) == {"a": [Grow(1)]}


def test_a_method_that_adds_no_unit_is_not_what_a_network_grows_by() -> None:
    told = asked(Growth(ReDo(tau=1.0), when="every:1"), [Layer("a", 4)])
    assert told == {"a": "it is to grow, but ReDo proposes no new unit (only Reset)"}
    assert asked(Growth(ReDo(tau=0.0), when="every:1"), [Layer("a", 4)]) == {"a": []}


def test_a_method_that_looks_at_the_network_s_mistakes_sees_them_and_one_that_inserts_layers_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=draw), torch.randint(0, 3, (64,), generator=draw)

    def examples() -> tuple[Tensor, Tensor, Tensor]:
        outputs = net(x)
        return outputs, nn.functional.cross_entropy(outputs, y, reduction="none"), y

    method = Growth(Folding(examples), when="every:1")
    recycler = Recycler(recycle.trace(net, lambda: net(x)), method, optimizers=[torch.optim.SGD(net.parameters())])
    with recycler.listening():
        examples()[1].mean().backward()
    assert [type(edit) for _, edit in recycler.step().edits] == [Grow]
    with pytest.raises(ValueError, match="layer_cost of SelfExpanding would be ignored"):
        Growth(SelfExpanding(layer_cost=20))


def test_a_proposal_is_cut_to_its_first_newborns() -> None:
    assert fewer(Grow(3, revive, parents=[2, 1, 0]), 2) == Grow(2, revive, parents=[2, 1])
    rows = torch.arange(6.0).reshape(3, 2)
    assert fewer(Grow(3, Given(rows, usual_length=True)), 2) == Grow(2, Given(rows[:2], usual_length=True))
    assert fewer(Split([2, 1], along=[[1, 2], [3, 4]]), 1) == Split([2], along=[[1, 2]])
    for edit in (Grow(2), Split([1, 2], into=[3, 4]), Reset([1, 2, 3]), Prune([1, 2, 3])):
        assert fewer(edit, 2) == edit and born(edit) == (2 if isinstance(edit, Grow) else 0)


def test_a_score_test_asks_the_proposing_method() -> None:
    layers = [Layer("a", 4), Layer("b", 6)]
    assert asked(Growth(Proposals(Grow(1)), when="score:0.5,0.5", count=1), layers) == {"a": [], "b": [Grow(1)]}
    copied = copy.deepcopy(Growth(Proposals(Grow(1)), when="score"))
    assert copied._trigger.score.__self__ is copied.by  # type: ignore[attr-defined]


def test_a_score_test_without_a_score_says_what_it_lacks() -> None:
    assert Growth(when="score").lacks.endswith("of the method that proposes units, and no method proposes units")
    assert Growth(ReDo(), when="score").lacks.endswith("and ReDo has none")
    assert not Growth(Proposals(), when="score").lacks


def test_named_together_one_grows_by_the_other() -> None:
    made = joined([Growth(when="every:3"), Proposals(Grow(1))])
    assert len(made) == 1 and made[0].when == "every:3" and isinstance(made[0].by, Proposals)
    check_together(made)
    with pytest.raises(ValueError, match=r"pass Growth\(Proposals\(\)\) in place of the two"):
        check_together([Growth(), Proposals()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "gradmax"}, r"by is a method such as GradMax\(\), got 'gradmax'. By name write grow\+METHOD"),
        ({"by": ReDo}, "by is a method such as"),
        ({"by": ReDo(), "birth": "revive"}, "ReDo says what is born"),
        ({"when": 3}, "or a Trigger; got 3"),
        ({"where": "all"}, "there are each, best"),
        ({"prune": "yes"}, "there are none, dead, utility"),
        ({"birth": "gradmax"}, "grow has no birth 'gradmax': there are init, revive"),
        ({"count": 0}, "count is a whole number of units, or a share"),
        ({"count": 1.5}, "got 1.5"),
        ({"most": 1}, "most is at least 2"),
        ({"budget": 0}, "budget is at least 2"),
        ({"cooldown": -1}, "cooldown counts events"),
        ({"maturity": -1}, "maturity updates, 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Growth(**options)


# Prune and grow ------------------------------------------------------------------------------------------------


def test_dead_units_make_room_for_as_many_elsewhere() -> None:
    growth = Growth(when="every:1", count=2, prune="dead")
    layers = [Layer("a", 8), Layer("b", 8)]
    told = asked(growth, layers, a=seen(8), b=seen(8, dead=3))
    assert list(told.items()) == [("b", [Prune([5, 6])]), ("a", [Grow(2)])]
    assert [layer.width for layer in layers] == [10, 6]


def test_while_the_budget_is_not_spent_nothing_is_pruned() -> None:
    growth = Growth(when="every:1", count=2, prune="dead", budget=20)
    told = asked(growth, [Layer("a", 8), Layer("b", 8)], b=seen(8, dead=3))
    assert told == {"a": [Grow(2)], "b": [Grow(2)]}


def test_the_least_useful_units_go_dead_ones_first() -> None:
    growth = Growth(when="every:1", where="best", count=4, prune="utility", maturity=0)
    layers = [Layer("a", 4), Layer("b", 8), Layer("c", 5)]
    told = asked(growth, layers, b=seen(8, dead=1), c=seen(5))
    assert told["a"] == [Grow(4)]
    assert told["b"][-1] == Prune([7, 0, 1]) and told["c"][-1] == Prune([0])  # dead, .29, .57 | .33, .67
    assert told["b"][0] == Fold([0, 1], [1.0, 2.0])  # what a live unit says on average stays; the dead one said nothing
    assert sum(layer.width for layer in layers) == 17


def test_where_all_layers_are_to_grow_only_the_first_does_if_live_units_must_go_for_it() -> None:
    layers = [Layer("a", 8), Layer("b", 6)]
    told = asked(Growth(when="every:1", prune="utility", maturity=0), layers)
    assert told["b"] == [Grow(1)] and told["a"][-1] == Prune([0])


def test_units_are_judged_when_they_are_old_enough() -> None:
    layers = [Layer("a", 8), Layer("b", 6)]
    ages = torch.tensor([999, 5, 1000, 2000, 1000, 0, 0, 0]).double()
    told = asked(Growth(when="every:1", prune="utility", count=2), layers, a=seen(8, age=ages))
    assert told["b"] == [Grow(2)] and told["a"][-1] == Prune([2, 3])
    assert asked(Growth(when="every:1", prune="utility"), [Layer("a", 8), Layer("b", 6)]) == {
        "a": [],
        "b": "it is to grow, but there is no room for another unit (budget=14)",
    }


def test_one_layer_alone_keeps_its_dead_units_and_says_so() -> None:
    told = asked(Growth(when="every:1", prune="dead"), [Layer("a", 8)])
    assert told == {"a": "it is to grow, but there is no room for another unit (budget=8)"}
    told = asked(Growth(when="every:1", prune="dead"), [Layer("a", 8)], a=seen(8, dead=2))
    assert told == {"a": "it is to grow, but there is no room for another unit, and it has dead ones of its own"}


def test_a_layer_keeps_two_units() -> None:
    layers = [Layer("a", 8), Layer("b", 4)]
    told = asked(Growth(when="every:1", count=4, prune="dead"), layers, b=seen(4, dead=4))
    assert told == {"b": [Prune([0, 1])], "a": [Grow(2)]}


def test_what_was_not_given_after_all_is_not_taken() -> None:
    """Targets, a cooldown or a cap may hold a prune back: then there is no room."""
    growth = Growth(when="every:1", count=2, prune="dead")
    layers = [Layer("a", 8), Layer("b", 8)]
    stats = {"a": seen(8), "b": seen(8, dead=3)}
    assert growth.survey(layers, stats) == ["b", "a"]
    assert growth(layers[1], stats["b"]) == [Prune([5, 6])]
    layers[1].width -= 1  # one of the two
    assert growth(layers[0], stats["a"]) == [Grow(1)]


@pytest.mark.parametrize("seed", range(300))
def test_whatever_is_held_back_no_bound_is_broken(seed: int) -> None:
    draw = random.Random(seed)
    layers = [Layer(name, draw.randint(2, 12), why_fixed=draw.choice(["", "", "", "it is"])) for name in "abcd"]
    start = sum(layer.width for layer in layers)
    budget = draw.choice([None, start, start + 5])
    most = draw.choice([None, 12, 14])
    prune: Any = draw.choice(["none", "dead", "utility"])
    count = draw.choice([1, 3, 0.25, 0.5])
    where: Any = draw.choice(["each", "best"])
    growth = Growth(when="every:1", count=count, most=most, budget=budget, prune=prune, where=where, maturity=0)
    bound = start if budget is None and prune != "none" else math.inf if budget is None else budget
    for event in range(1, 9):
        observed = [layer for layer in layers if draw.random() < 0.9]
        stats = {e.name: seen(e.width, event=event, dead=draw.choice([0, 0, 1, e.width])) for e in observed}
        order = growth.survey(layers, stats)
        assert sorted(order) == list("abcd")
        for layer in sorted(layers, key=lambda layer: order.index(layer.name)):
            if layer.name not in stats:
                continue
            try:
                edits = growth(layer, stats[layer.name])
            except NotRecyclable:
                continue
            given = [unit for edit in edits if isinstance(edit, Prune) for unit in edit.units]
            taken = sum(map(born, edits))
            assert not (given and taken) and (not layer.why_fixed or not edits)
            assert prune != "dead" or stats[layer.name].dead[given].all()
            assert len(set(given)) == len(given) <= layer.width - 2
            layer.width += taken - sum(draw.random() < 0.8 for _ in given)
            assert not taken or most is None or layer.width <= most
            assert sum(other.width for other in layers) <= bound


# Real networks -------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()


X = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def recycler(net: nn.Module, growth: Any, **options: Any) -> tuple[Recycler, Callable[[], float]]:
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    found = Recycler(recycle.trace(net, lambda: net(X)), growth, optimizers=[adam], sample_every=1, **options)

    def update() -> float:
        with found.listening():
            loss = (net(X) - X[:, :2].sin()).square().mean()
            loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    return found, update


def widths(found: Recycler) -> list[int]:
    return [group.width for group in found.graph]


def test_a_network_grows_exactly_and_trains_on() -> None:
    net = network()
    found, update = recycler(net, Growth(when="every:2", count=2, birth="revive", most=9))
    told = []
    for _ in range(6):
        before = update()
        with torch.no_grad():
            output = net(X)
        told.append(found.step())
        with torch.no_grad():
            assert torch.allclose(output, net(X), rtol=1e-12, atol=0)
    assert before < 0.5
    assert widths(found) == [9, 9]
    assert [[edit.count for _, edit in report.edits] for report in told] == [[], [2, 2], [], [2, 1], [], [0] * 0]
    assert [group for group, _ in told[1].edits] == ["2", "0"]  # in the order in which they were made
    assert list(told[1].groups) == ["0", "2"] and told[1].groups["0"].width_after == 8 and told[1].units == 15
    assert "6 -> 8 units" in str(told[1])
    assert told[-1].groups["0"].note == "it is to grow, but has its most=9 units already"


def test_every_newborn_has_its_hinge_in_the_data_whichever_layers_grow_at_one_event() -> None:
    """A layer that grew must not take from the layer before it what its births look at."""
    net = network()
    found, update = recycler(net, Growth(when="every:1", count=8, birth="revive"))
    update()
    found.step()
    update()
    for name, width in (("0", 6), ("2", 5)):
        fires = found.tracker.stats(found.graph[name]).firing_rate[width:]
        assert (fires > 0.4).all() and (fires < 0.6).all()


def test_while_no_trigger_fires_training_is_as_without_growth() -> None:
    nets, states = [network(), network()], []
    for net, method in zip(nets, (Growth(when="rank:1"), find("monitor")()), strict=True):
        with torch.no_grad():
            net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]
            net[2].weight[1], net[2].bias[1] = net[2].weight[0], net[2].bias[0]
            net[2].weight[:, 1], net[4].weight[:, 1] = net[2].weight[:, 0], net[4].weight[:, 0]
        found, update = recycler(net, method)
        for _ in range(3):
            update()
            assert not found.step().edits
        states.append(net.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_growth_waits_for_a_loss_that_stands_still_and_says_whom_to_tell() -> None:
    found, update = recycler(network(), Growth(when="plateau:loss,2"))
    update()
    assert {group.note for group in found.step().groups.values()} == {
        "the plateau of 'loss' cannot be seen: nothing was recorded since the last event. Call "
        "recycler.record('loss', value) in the training loop"
    }
    for values in ((4.0, 2.0), (torch.tensor(3.0), 3.0), (1.0, 5.0)):
        assert widths(found) == [6, 5]
        update()
        for value in values:
            found.record("loss", value)
        found.step()
    assert widths(found) == [7, 6]


def test_prune_and_grow_keeps_the_number_of_units_and_the_function() -> None:
    net = network()
    with torch.no_grad():
        net[2].bias[:3] = -1e3
    found, update = recycler(net, Growth(when="every:1", prune="dead", count=2, birth="revive"))
    update()
    with torch.no_grad():
        output = net(X)
    report = found.step()
    assert [(name, type(edit).__name__) for name, edit in report.edits] == [("2", "Prune"), ("0", "Grow")]
    assert widths(found) == [8, 3]
    with torch.no_grad():
        assert torch.allclose(output, net(X), rtol=1e-12, atol=0)
    update()


def test_a_saved_growth_goes_on_exactly() -> None:
    def grown(by: Any) -> Growth:
        return Growth(by, when="plateau:loss,3", cooldown=1, prune="utility", budget=20)

    nets = [network(), network()]
    first, second = (recycler(net, grown(Proposals(Grow(1)))) for net in nets)
    for found, update in (first, second):
        for _ in range(3):
            update()
            found.record("loss", 1.0)
            found.step()
        found.record("loss", 1.0)
    fresh, update = recycler(nets[1], grown(Proposals(Grow(1))))
    fresh.load_state_dict(copy.deepcopy(second[0].state_dict()))
    told = []
    for found, step in ((first[0], first[1]), (fresh, update)):
        step()
        told.append(found.step().to_json())
        assert widths(found) == [7, 6]
    assert told[0] == told[1]
    assert fresh.method.state_dict() == first[0].method.state_dict()  # type: ignore[union-attr]
    assert fresh.method.by.asked == 2  # type: ignore[union-attr]


def test_a_network_that_cannot_grow_says_why_layer_by_layer() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu().view(-1, 6))

    net = Fixed().double()
    found, update = recycler(net, Growth(when="every:1"))
    update()
    report = found.step()
    assert not report.edits and widths(found) == [6]
    assert report.groups["a"].note.startswith("it is to grow, but cannot change its width: ")


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2, bias=False)),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8, 2)),
    lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), Last(nn.LSTM(1, 4, batch_first=True)), nn.Linear(4, 2)),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 3])
def test_the_cost_of_a_unit_is_what_growing_adds(make: Any, count: int) -> None:
    net = make().double()
    (group,) = recycle.trace(net, lambda: net(X))
    before = group.parameters
    assert before == sum(p.numel() for p in net.parameters())
    expected = group.cost(count)
    recycle.apply(Grow(count), group)
    assert group.parameters - before == expected > 0


class Last(nn.Module):
    """A recurrent layer's last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.layer(x)[0][:, -1]
        return last
