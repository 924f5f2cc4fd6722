import pytest
import torch
from stable_baselines3 import DQN, PPO
from torch import nn

import recycle
from agents.bench import __main__ as bench
from agents.bench import inside
from recycle.track import Tracker

torch.set_num_threads(1)


def small(kind, width):
    kwargs = {"policy_kwargs": {"net_arch": [width // 8, width // 8], "activation_fn": nn.ReLU}}
    kwargs |= {"n_steps": 64, "n_epochs": 1} if kind is PPO else {"buffer_size": 3000}
    return lambda: kind("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **kwargs)


def test_overhead_gives_one_ratio_for_each_pair_and_case(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_maker", small)
    found = bench.overhead(bench.Overhead(pairs=2, steps=128))
    assert list(found) == ["PPO 64x64", "PPO 256x256", "DQN 64x64", "DQN 256x256"]
    assert all(len(ratios) == 2 and all(0 < r < float("inf") for r in ratios) for ratios in found.values())
    shown = capsys.readouterr().out
    assert "learn(128) with the callback over without, 2 pairs" in shown
    assert all(name in shown for name in found)


def test_pairs_alternate_and_are_divided_the_right_way_round(monkeypatch):
    """A learn with the callback that takes 3 s against 2 s without is a ratio of 1.5, whichever comes first."""
    calls = []

    def learn(model, steps, method):
        calls.append((steps, method))
        return 2.0 if method is None else 3.0

    monkeypatch.setattr(bench, "_learn", learn)
    monkeypatch.setattr(bench, "_trace_share", lambda make: 0.5)
    monkeypatch.setattr(bench, "_inside", lambda model, steps, method: 0.02)
    monkeypatch.setattr(bench, "_maker", lambda kind, width: lambda: None)
    found = bench.overhead(bench.Overhead(pairs=4, steps=96, method="redo"))
    assert all(ratios == [1.5] * 4 for ratios in found.values())
    pairs = [method for steps, method in calls if steps == 96][:8]
    assert pairs == ["redo", None, None, "redo"] * 2


def test_what_is_spent_inside_is_a_part_of_learn_and_leaves_no_mark():
    entrances = {(kind, name): getattr(kind, name) for kind, names in inside._ENTRANCES.items() for name in names}
    assert {"_watch_layer", "_watch_step", "_watch_gradient"} < set(inside._ENTRANCES[Tracker])
    assert 0 < bench._inside(small(DQN, 64)(), 256, "redo") < 1
    assert all(getattr(kind, name) is method for (kind, name), method in entrances.items())


def test_the_cases_are_what_their_names_say():
    for kind in (PPO, DQN):
        model = bench._maker(kind, 64)()
        assert type(model) is kind
        hidden = [m for m in model.policy.modules() if isinstance(m, nn.Linear) and m.out_features == 64]
        assert len(hidden) == 4  # PPO: two and two; DQN: two, and two of the target
        assert any(isinstance(m, nn.ReLU) for m in model.policy.modules())


def test_the_command_line_reaches_the_benchmark(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "overhead", asked.append)
    assert bench.main(["overhead", "--pairs", "3", "--steps", "64", "--method", "redo"]) == 0
    assert asked == [bench.Overhead(pairs=3, steps=64, method="redo")]


@pytest.mark.parametrize("argv", [["--method", "splitt"], ["--pairs", "0"], ["--steps", "-1"]])
def test_bad_options_are_one_line(monkeypatch, capsys, argv):
    monkeypatch.setattr(bench, "_maker", small)
    assert bench.main(["overhead", "--pairs", "1", "--steps", "64", *argv]) != 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error:")


def test_trace_measures_every_case_in_a_process_of_its_own(capsys):
    cost = bench.scaling.measured("mlp 16x2")
    assert cost.parameters == 16 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4
    assert cost.seconds > 0
    edits = bench.scaling.measured("apply 16")
    assert edits.parameters == 2 * (16 * 16 + 16) and edits.seconds > 0 and edits.copying > 0


def test_trace_prints_a_table_and_the_exponents(monkeypatch, capsys):
    def linear(case):
        size = int(case.partition(" ")[2].split("x")[0]) * int(case.partition("x")[2] or 1)
        return bench.scaling.Cost(1000 * size, 0.5 * size, 2.5, 0.125 * size if case.startswith("apply") else 0.0)

    monkeypatch.setattr(bench.scaling, "measured", linear)
    assert bench.main(["trace", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("parameters ** 1.00") == 3
    assert "2.50" in shown and "4.0" in shown and "resnet" not in shown


def test_the_large_cases_have_the_sizes_they_are_named_for():
    sizes = {}
    with torch.device("meta"):
        for name in bench.scaling.LARGE:
            kind, _, size = name.partition(" ")
            sizes[kind] = sum(p.numel() for p in bench.scaling._network(kind, size)[0].parameters())
    assert 25.5e6 < sizes["resnet"] < 25.7e6  # torchvision's has 25.56 million
    assert 99e6 < sizes["transformer"] < 101e6


def test_a_case_that_fails_says_so():
    with pytest.raises(RuntimeError, match="case 'mlp nothing' failed"):
        bench.scaling.measured("mlp nothing")


def test_methods_prints_what_each_costs_on_each_network(capsys):
    found = bench.methods(bench.Methods(pairs=1, method=("redo", "cbp")))
    assert list(found) == [(net, name) for net in ("MLP 2x256", "NatureCNN") for name in ("redo", "cbp")]
    for cost in found.values():
        assert 0 < cost.watching < 100 and cost.event > 0
        assert 0 < cost.hooks < 10
        assert cost.amortised == 1 + cost.hooks + cost.event / cost.every
    shown = capsys.readouterr().out
    assert "cost of an update over a plain one, 1 pairs" in shown and "NatureCNN" in shown


def test_an_event_that_is_timed_has_dead_units_to_recycle(monkeypatch):
    reports = []
    step = recycle.Recycler.step

    def kept(self):
        reports.append(step(self))
        return reports[-1]

    monkeypatch.setattr(recycle.Recycler, "step", kept)
    bench.costs.cost_of("redo", "MLP 2x256", pairs=1, events=2)
    assert len(reports) == 2 and all(64 <= report.recycled < 80 for report in reports)


@pytest.mark.parametrize("argv", [["--method", "reddo"], ["--pairs", "0"], ["--num-threads", "0"]])
def test_bad_options_of_methods_are_one_line(capsys, argv):
    assert bench.main(["methods", *argv]) != 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error:")


def test_slopes_measures_every_case_in_a_process_of_its_own():
    watched = bench.slopes.measured("watch 16")
    assert watched["units"] == 32 and watched["parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 8 + 8
    assert watched["event"] > 0 and watched["update"] > 0
    assert watched["statistics"] >= 2 * 16 * 6 * 4  # six moments a unit, at least
    with pytest.raises(RuntimeError, match="case 'watch nothing' failed"):
        bench.slopes.measured("watch nothing")


@pytest.mark.slow
def test_slopes_of_files_and_fleets():
    files = bench.slopes.measured("files 16x2")
    assert files["groups"] == 4 and files["units"] == 64 and files["weights"] > 3 * 4 * files["parameters"]
    assert all(files[name] > 100 for name in ("edits", "events", "progress", "state"))
    fleet = bench.slopes.measured("fleet 2")
    assert fleet["files"] == 2 * 7 and fleet["bytes"] > 2 * 100_000
    assert all(fleet[name] > 0 for name in ("read", "plot", "compare", "tensorboard"))


def test_slopes_prints_costs_and_exponents(monkeypatch, capsys):
    def quadratic(case):
        _, _, size = case.partition(" ")
        number = float(size.partition("x")[0]) * float(size.partition("x")[2] or 1)
        sizes = dict.fromkeys(("units", "parameters", "groups", "runs"), number)
        return sizes | {"cost": number**2, "nothing": 0.0}

    monkeypatch.setattr(bench.slopes, "measured", quadratic)
    assert bench.main(["slopes", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("^2.00") == 4 and "4,096" in shown and "fleet 100" in shown and "fleet 1000" not in shown
