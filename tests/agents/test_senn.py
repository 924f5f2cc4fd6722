"""An agent that widens by itself while it trains."""

from __future__ import annotations

from pathlib import Path

import torch
from stable_baselines3 import PPO
from torch import nn

from agents import RecycleCallback

EAGER = {"relative": 0.0, "absolute": 0.0, "certainty": 0.0, "proposals": 8, "steps": 20}


def test_a_ppo_agent_that_starts_at_width_8_ends_wider_and_loads(tmp_path: Path) -> None:
    policy = {"net_arch": [8], "activation_fn": nn.ReLU}
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=256, batch_size=64, policy_kwargs=policy, seed=0, device="cpu")
    callback = RecycleCallback(method="senn", method_kwargs=EAGER, every=256, sample_every=2)
    model.learn(1280, callback=callback)
    edits = [edit for reports in callback.reports for report in reports.values() for edit in report.edits]
    assert edits and len(edits) <= sum(len(reports) for reports in callback.reports)  # one layer an event
    widths = [
        model.policy.mlp_extractor.policy_net[0].out_features,
        model.policy.mlp_extractor.value_net[0].out_features,
    ]
    assert sum(widths) == 16 + sum(edit.count for _, edit in edits)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    observations = torch.randn(20, 4)
    for one, other in zip(model.policy(observations, True), loaded.policy(observations, True), strict=True):
        assert torch.equal(one, other)
