"""Models whose layers have changed their widths: saved, loaded by stable-baselines3 alone, trained on."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from torch import nn

import recycle
from agents import RecycleCallback, networks_of, remember_widths
from agents.elastic import elastic
from recycle import Grow, Prune, Split


class Pictures(gym.Env[Any, Any]):
    """Random pictures, alone or beside random numbers."""

    def __init__(self, *, numbers: bool = False) -> None:
        picture = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.observation_space = spaces.Dict({"a": picture, "b": spaces.Box(-1, 1, (3,))}) if numbers else picture
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), float(action), False, False, {}


HALVES = {"net_arch": {"pi": [8], "vf": [8, 4]}, "activation_fn": nn.ReLU}
SMALL = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
ON = {"n_steps": 32, "batch_size": 16, "n_epochs": 1}
OFF = {"learning_starts": 10, "buffer_size": 200, "batch_size": 8}
MODELS: dict[str, tuple[Any, str, Any, dict[str, Any], bool]] = {  # and whether net_arch can say the new widths
    "ppo": (PPO, "MlpPolicy", "CartPole-v1", ON | {"policy_kwargs": SMALL}, True),
    "ppo with halves": (PPO, "MlpPolicy", "CartPole-v1", ON | {"policy_kwargs": HALVES}, True),
    "a2c": (A2C, "MlpPolicy", "CartPole-v1", {"policy_kwargs": SMALL}, True),
    "dqn": (DQN, "MlpPolicy", "CartPole-v1", OFF | {"policy_kwargs": SMALL}, True),
    "ppo cnn": (PPO, "CnnPolicy", Pictures, ON, False),
    "dqn cnn": (DQN, "CnnPolicy", Pictures, OFF, False),
    "ppo dict": (PPO, "MultiInputPolicy", lambda: Pictures(numbers=True), ON | {"policy_kwargs": SMALL}, False),
}  # fmt: skip


def made(name: str) -> Any:
    kind, policy, env, kwargs, _ = MODELS[name]
    return kind(policy, env if isinstance(env, str) else env(), seed=0, device="cpu", **kwargs)


def resize(model: Any) -> dict[str, int]:
    """Another width for every group that can have one; returns all widths."""
    widths = {}
    for network in networks_of(model):
        graph = recycle.trace(network.module, *network.calls)
        held: dict[str, Any] = {"optimizers": network.optimizers, "targets": network.targets}
        for number, group in enumerate(graph):
            edit = [Prune([0, 3]), Grow(5), Split([1, 1, 2])][number % 3]
            recycle.apply(edit, group, **held, generator=torch.Generator().manual_seed(0))
        widths |= {group.name: group.width for group in graph}
    return widths


def tensors(model: Any) -> list[torch.Tensor]:
    state = model.policy.optimizer.state_dict()["state"]
    return [*model.policy.state_dict().values(), *(t for s in state.values() for t in s.values())]


@pytest.mark.parametrize("name", MODELS)
def test_a_resized_model_is_saved_and_loaded_and_trains_on(name: str, tmp_path: Any) -> None:
    model = made(name)
    model.learn(96)
    widths = resize(model)
    rng = torch.get_rng_state()
    remember_widths(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert (model.policy_class is not elastic) is MODELS[name][4]
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(loaded), strict=True))
    for _ in range(5):
        seen = model.observation_space.sample()
        assert model.predict(seen, deterministic=True)[0] == loaded.predict(seen, deterministic=True)[0]
    for one in (model, loaded):
        held = [p for group in one.policy.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in held]
        one.learn(96, reset_num_timesteps=False)
        changed = [not torch.equal(a, b) for a, b in zip(before, held, strict=True)]
        assert sum(changed) > len(changed) / 2
        assert {id(p) for p in held} <= {id(p) for p in one.policy.parameters()}
        assert resize_is_seen(one) == widths


def resize_is_seen(model: Any) -> dict[str, int]:
    graphs = [recycle.trace(network.module, *network.calls) for network in networks_of(model)]
    return {group.name: group.width for graph in graphs for group in graph}


class Widen:
    """Splits unit 0 into a new one, and prunes the last, at every other event."""

    needs = ("minimum", "maximum")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        self.calls += 1
        return [Split([0, 1], noise=0.1)] if self.calls % 2 else [Prune([group.width - 1])]


@pytest.mark.parametrize("name", ["ppo", "dqn", "dqn cnn"])
def test_a_method_resizes_while_the_agent_trains(name: str, tmp_path: Any) -> None:
    callback = RecycleCallback(method="tests.agents.test_elastic:Widen", every=32, edits=tmp_path / "edits.jsonl")
    model = made(name)
    model.learn(224, callback=callback)
    edits = [type(e).__name__ for reports in callback.reports for r in reports.values() for _, e in r.edits]
    assert {"Split", "Prune"} <= set(edits)
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(loaded), strict=True))
    loaded.learn(96, callback=callback, reset_num_timesteps=False)
    again = RecycleCallback(method="monitor", every=32)
    loaded.learn(64, callback=again, reset_num_timesteps=False)
    assert sum(group.width for group in again.reports[-1][networks_of(loaded)[0].name].groups.values()) > 32


def test_widths_that_net_arch_can_say_need_nothing_of_ours_to_load(tmp_path: Any) -> None:
    model = made("ppo")
    resize(model)
    remember_widths(model)
    model.save(tmp_path / "model.zip")
    code = (
        "import sys; from stable_baselines3 import PPO; "
        f"print(PPO.load({str(tmp_path / 'model.zip')!r}, device='cpu').policy.net_arch); "
        "assert not any(name.split('.')[0] in ('agents', 'recycle') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'pi': [14, 21], 'vf': [19, 14]}"
