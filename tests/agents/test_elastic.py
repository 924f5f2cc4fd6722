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
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

import recycle
from agents import RecycleCallback, inspect, load_policy, networks_of, remember_widths
from agents.elastic import elastic
from recycle import Grow, NotRecyclable, Prune, Split


class Pictures(gym.Env[Any, Any]):
    """Random pictures, alone or beside random numbers."""

    def __init__(self, *, numbers: bool = False, discrete: bool = True) -> None:
        picture = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.observation_space = spaces.Dict({"a": picture, "b": spaces.Box(-1, 1, (3,))}) if numbers else picture
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), float(np.sum(action)), False, False, {}


def moving() -> Pictures:
    return Pictures(discrete=False)


def moving_with_numbers() -> Pictures:
    return Pictures(numbers=True, discrete=False)


def with_numbers() -> Pictures:
    return Pictures(numbers=True)


CART, SWING = "CartPole-v1", "Pendulum-v1"
SMALL = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
HALVES = SMALL | {"net_arch": {"pi": [8], "vf": [8, 4]}}
PARTS = SMALL | {"net_arch": {"pi": [12], "qf": [16, 8]}}
LSTM = SMALL | {"lstm_hidden_size": 8}
PIXELS = SMALL | {"features_extractor_kwargs": {"features_dim": 16}}
MIXED = SMALL | {"features_extractor_kwargs": {"cnn_output_dim": 16}}
ON = {"n_steps": 32, "batch_size": 16, "n_epochs": 1}
TRUST = {"n_steps": 32, "batch_size": 16}
OFF = {"learning_starts": 10, "buffer_size": 200, "batch_size": 8}
RARE = OFF | {"train_freq": 4}
MODELS: dict[str, tuple[Any, str, Any, dict[str, Any], dict[str, Any], bool]] = {
    # and whether net_arch can say the new widths
    "ppo": (PPO, "MlpPolicy", CART, ON, SMALL, True),
    "ppo with halves": (PPO, "MlpPolicy", CART, ON, HALVES, True),
    "ppo with noise of states": (PPO, "MlpPolicy", SWING, ON | {"use_sde": True}, SMALL, True),
    "a2c": (A2C, "MlpPolicy", CART, {}, SMALL, True),
    "trpo": (TRPO, "MlpPolicy", CART, TRUST, SMALL, True),
    "maskable ppo": (MaskablePPO, "MlpPolicy", CART, ON, SMALL, True),
    "recurrent ppo": (RecurrentPPO, "MlpLstmPolicy", CART, ON, LSTM, True),
    "dqn": (DQN, "MlpPolicy", CART, OFF, SMALL, True),
    "qrdqn": (QRDQN, "MlpPolicy", CART, OFF, SMALL | {"n_quantiles": 5}, True),
    "sac": (SAC, "MlpPolicy", SWING, OFF, SMALL, False),  # the critics differ
    "sac with one critic": (SAC, "MlpPolicy", SWING, OFF, PARTS | {"n_critics": 1}, True),
    "sac with noise of states": (SAC, "MlpPolicy", SWING, OFF | {"use_sde": True}, PARTS | {"n_critics": 1}, True),
    "td3": (TD3, "MlpPolicy", SWING, OFF, SMALL, False),
    "td3 with three critics": (TD3, "MlpPolicy", SWING, OFF, PARTS | {"n_critics": 3}, False),
    "ddpg": (DDPG, "MlpPolicy", SWING, OFF, SMALL, True),
    "tqc": (TQC, "MlpPolicy", SWING, OFF, PARTS | {"n_quantiles": 5}, False),
    "tqc with noise of states": (TQC, "MlpPolicy", SWING, OFF | {"use_sde": True}, PARTS, False),
    "crossq": (CrossQ, "MlpPolicy", SWING, OFF, SMALL, False),
    "crossq with one critic": (CrossQ, "MlpPolicy", SWING, OFF, PARTS | {"n_critics": 1}, True),
    "ppo cnn": (PPO, "CnnPolicy", Pictures, ON, PIXELS, False),
    "dqn cnn": (DQN, "CnnPolicy", Pictures, RARE, PIXELS, False),
    "qrdqn cnn": (QRDQN, "CnnPolicy", Pictures, RARE, PIXELS | {"net_arch": []}, False),
    "td3 cnn": (TD3, "CnnPolicy", moving, RARE, PIXELS, False),
    "recurrent ppo cnn": (RecurrentPPO, "CnnLstmPolicy", Pictures, ON, PIXELS | LSTM, False),
    "ppo dict": (PPO, "MultiInputPolicy", with_numbers, ON, MIXED, False),
    "sac dict": (SAC, "MultiInputPolicy", moving_with_numbers, RARE, MIXED, False),
}


def made(name: str) -> Any:
    kind, policy, env, kwargs, widths, _ = MODELS[name]
    env = env if isinstance(env, str) else env()
    return kind(policy, env, seed=0, device="cpu", policy_kwargs=dict(widths), **kwargs)


def learn(model: Any, steps: int, **kwargs: Any) -> None:
    model.learn(steps, **kwargs, **({"use_masking": False} if isinstance(model, MaskablePPO) else {}))


def resize(model: Any) -> dict[str, int]:
    """Another width for every group that can have one; returns all widths."""
    for network in networks_of(model):
        held: dict[str, Any] = {"optimizers": network.optimizers, "targets": network.targets}
        for number, group in enumerate(network.trace()):
            if group.resizable:
                edit = [Prune([0, 3]), Grow(5), Split([1, 1, 2])][number % 3]
                recycle.apply(edit, group, **held, generator=torch.Generator().manual_seed(0))
    return widths_of(model)


def widths_of(model: Any) -> dict[str, int]:
    return {f"{n.name} {group.name}": group.width for n in networks_of(model) for group in n.trace()}


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """All whose state the model saves: of actor, critic, entropy coefficient."""
    held = [recursive_getattr(model, name) for name in model._get_torch_save_params()[0]]
    return [one for one in held if isinstance(one, torch.optim.Optimizer)]


def tensors(model: Any) -> list[torch.Tensor]:
    states = [state for one in optimizers(model) for state in one.state_dict()["state"].values()]
    return [*model.policy.state_dict().values(), *(torch.as_tensor(t) for s in states for t in s.values())]


def same(model: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(other), strict=True))


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_resized_model_is_saved_and_loaded_and_trains_on(name: str, tmp_path: Any) -> None:
    model = made(name)
    learn(model, 64)
    before = widths_of(model)
    widths = resize(model)
    kept = {group for group in before if before[group] == widths[group]}
    assert all("lstm" in group for group in kept)
    rng = torch.get_rng_state()
    remember_widths(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert (model.policy_class is not elastic) is MODELS[name][-1]
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert same(model, loaded)
    for _ in range(5):
        seen = model.observation_space.sample()
        old, new = (one.predict(seen, deterministic=True)[0] for one in (model, loaded))
        assert np.array_equal(old, new)
    for one in (model, loaded):
        held = [p for optimizer in optimizers(one) for group in optimizer.param_groups for p in group["params"]]
        values = [p.detach().clone() for p in held]
        learn(one, 64, reset_num_timesteps=False)
        changed = [not torch.equal(a, b) for a, b in zip(values, held, strict=True)]
        assert sum(changed) > len(changed) / 2
        known = [*one.policy.parameters(), getattr(one, "log_ent_coef", None)]
        assert {id(p) for p in held} <= {id(p) for p in known}
        assert widths_of(one) == widths
        assert all(shapes(n.module) == shapes(target) for n in networks_of(one) for target, _ in n.targets)


class Widen:
    """Splits unit 0 into a new one, and prunes the last, at every other event."""

    needs = ("minimum", "maximum")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, group: Any, stats: Any) -> list[Any]:
        self.calls += 1
        return [Split([0, 1], noise=0.1)] if self.calls % 2 else [Prune([group.width - 1])]


@pytest.mark.parametrize("name", [n for n in MODELS if not set(n.split()) & {"with", "dict", "cnn"}] + ["dqn cnn"])
def test_a_method_resizes_while_the_agent_trains(name: str, tmp_path: Any) -> None:
    callback = RecycleCallback(method="tests.agents.test_elastic:Widen", every=32, edits=tmp_path / "edits.jsonl")
    model = made(name)
    learn(model, 224, callback=callback)
    edits = [type(e).__name__ for reports in callback.reports for r in reports.values() for _, e in r.edits]
    notes = {group.note for reports in callback.reports for r in reports.values() for group in r.groups.values()}
    assert "Split" in edits
    assert "Prune" in edits or "1 still alive in the target network" in notes
    widths = widths_of(model)
    assert set(widths.values()) != set(widths_of(made(name)).values())
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert same(model, loaded)
    assert widths_of(loaded) == widths
    learn(loaded, 64, callback=callback, reset_num_timesteps=False)
    again = RecycleCallback(method="monitor", every=32)
    learn(loaded, 64, callback=again, reset_num_timesteps=False)
    seen = {f"{n} {name}": group.width for n, r in again.reports[-1].items() for name, group in r.groups.items()}
    assert seen == widths_of(loaded)


@pytest.mark.parametrize("name", ["ppo", "ppo dict", "dqn cnn", "sac", "td3", "crossq"])
def test_the_policy_alone_is_saved_and_loaded(name: str, tmp_path: Any) -> None:
    model = made(name)
    resize(model)
    remember_widths(model)
    model.policy.save(tmp_path / "policy.pth")
    kind = type(model.policy)
    if MODELS[name][-1]:  # net_arch says it all
        assert shapes(kind.load(tmp_path / "policy.pth", device="cpu")) == shapes(model.policy)
    policy = load_policy(kind, tmp_path / "policy.pth", device="cpu")
    assert type(policy) is kind
    saved = model.policy.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in policy.state_dict().items())
    for _ in range(5):
        seen = model.observation_space.sample()
        assert np.array_equal(*(one.predict(seen, deterministic=True)[0] for one in (model, policy)))


def test_a_policy_of_another_kind_is_refused(tmp_path: Any) -> None:
    policy = made("ppo").policy
    policy.extra = nn.Linear(2, 2)
    policy.save(tmp_path / "policy.pth")
    with pytest.raises(NotRecyclable, match=r"ActorCriticPolicy has no tensor 'extra\.weight'"):
        load_policy(type(policy), tmp_path / "policy.pth")


@pytest.mark.parametrize("name", ["ppo cnn", "sac", "td3", "tqc", "crossq", "qrdqn cnn", "recurrent ppo cnn"])
def test_a_resized_model_tells_its_algorithm(name: str, tmp_path: Any) -> None:
    model = made(name)
    last = networks_of(model)[-1]
    group = next(group for group in last.trace() if group.resizable)
    recycle.apply(Prune([0]), group, optimizers=last.optimizers, targets=last.targets)
    remember_widths(model)
    assert model.policy_class is elastic
    model.save(tmp_path / "model.zip")
    env = DummyVecEnv([lambda: model.get_env().envs[0]])
    loaded = inspect.load(tmp_path / "model.zip", env)
    assert type(loaded) is type(model) and same(model, loaded)


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
