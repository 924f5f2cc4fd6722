import pytest
import torch
from stable_baselines3 import DQN, PPO
from torch import nn

from agents import bench

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
    monkeypatch.setattr(bench, "_maker", lambda kind, width: lambda: None)
    found = bench.overhead(bench.Overhead(pairs=4, steps=96, method="redo"))
    assert all(ratios == [1.5] * 4 for ratios in found.values())
    pairs = [method for steps, method in calls if steps == 96][:8]
    assert pairs == ["redo", None, None, "redo"] * 2


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
