"""Agents that grow while they train: by methods that look at gradients, in stable-baselines3's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3 import DQN, PPO, SAC
from torch import nn

from agents import RecycleCallback

SMALL: dict[Any, tuple[str, dict[str, Any]]] = {
    PPO: ("CartPole-v1", {"n_steps": 64, "batch_size": 32, "n_epochs": 1}),
    DQN: ("CartPole-v1", {"learning_starts": 32, "train_freq": 4}),
    SAC: ("Pendulum-v1", {"learning_starts": 32, "batch_size": 32}),
}


@pytest.mark.parametrize("algorithm", SMALL, ids=lambda algorithm: algorithm.__name__)
@pytest.mark.parametrize("method", ["gradmax", "tiny"])
def test_an_agent_grows_saves_and_loads(algorithm: Any, method: str, tmp_path: Path) -> None:
    env, options = SMALL[algorithm]
    kwargs = {"activation_fn": nn.ReLU, "net_arch": [8, 8]}
    model = algorithm("MlpPolicy", env, policy_kwargs=kwargs, seed=0, **options)
    callback = RecycleCallback(method=method, method_kwargs={"most": 10}, every=64, sample_every=1)
    model.learn(260, callback=callback)
    reports = [report for event in callback.reports for report in event.values()]
    grown = [group for report in reports for group, _ in report.edits]
    assert {name.rpartition(".")[2] for name in grown} >= {"0", "2"}  # both hidden layers
    notes = {
        group.note for reports in callback.reports for report in reports.values() for group in report.groups.values()
    }
    assert any("the output moved" in note for note in notes) is (method == "tiny")
    assert max(widths(model)) == 10
    model.save(tmp_path / "model.zip")
    again = algorithm.load(tmp_path / "model.zip")
    assert widths(again) == widths(model)
    seen = np.full((3, *model.observation_space.shape), 0.1, dtype=np.float32)
    np.testing.assert_array_equal(
        model.predict(seen, deterministic=True)[0], again.predict(seen, deterministic=True)[0]
    )


def test_without_a_loss_firefly_says_so() -> None:
    env, options = SMALL[PPO]
    model = PPO("MlpPolicy", env, policy_kwargs={"activation_fn": nn.ReLU, "net_arch": [8, 8]}, seed=0, **options)
    callback = RecycleCallback(method="firefly", every=64, sample_every=1)
    model.learn(140, callback=callback)
    notes = [group.note for report in callback.reports[0].values() for group in report.groups.values()]
    assert notes and all("firefly tries new units out: pass loss=" in note for note in notes)
    assert set(widths(model)) <= {1, 2, 8}


def widths(model: Any) -> list[int]:
    """Rows of every Linear, in order."""
    return [layer.out_features for layer in model.policy.modules() if isinstance(layer, nn.Linear)]
