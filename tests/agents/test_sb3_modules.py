"""Features extractors, normalisation and policies of the users' own, trained with a RecycleCallback."""

from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TQC
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.dqn.policies import DQNPolicy
from torch import nn

import recycle
from agents import RecycleCallback, networks_of, remember_widths

torch.set_num_threads(1)

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (PPO, {"n_steps": 32, "batch_size": 16, "n_epochs": 1}),
    "a2c": (A2C, {"n_steps": 8}),
    "dqn": (DQN, {"learning_starts": 10, "buffer_size": 200, "batch_size": 8}),
}
METHODS = ["monitor", "split", "redo", "random", "tests.agents.test_elastic:Widen"]


class Normed(BaseFeaturesExtractor):
    """One hidden layer behind a BatchNorm."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 12)
        self.net = nn.Sequential(nn.Linear(observation_space.shape[0], 12), nn.BatchNorm1d(12), nn.ReLU())

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        return self.net(seen)


def made(name: str, policy: Any = "MlpPolicy", env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    kind, own = KINDS[name]
    own = own | {"policy_kwargs": {"net_arch": [16], "activation_fn": nn.ReLU} | kwargs}
    return kind(policy, env, seed=0, device="cpu", **own)


def recycler(method: str) -> RecycleCallback:
    return RecycleCallback(method=method, every=32, sample_every=1)


def statistics(net: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in net.named_buffers() if "running_" in name]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Train and eval mode -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_batch_norm_statistics_move_in_training_only(name, method):
    model = made(name, features_extractor_class=Normed)
    net = networks_of(model)[0].module
    before = statistics(net)
    callback = recycler(method)
    callback.init_callback(model)  # traces and proves
    asked = np.stack([model.observation_space.sample() for _ in range(8)]).clip(-1, 1)
    model.predict(asked)
    assert before and same(before, statistics(net))
    model.learn(96, callback=callback)
    after = statistics(net)
    assert not any(len(a) == len(b) and torch.equal(a, b) for a, b in zip(before, after, strict=True))
    first = model.predict(asked, deterministic=True)[0]
    assert np.array_equal(first, model.predict(asked, deterministic=True)[0])
    assert same(after, statistics(net)) and not any(m.training for m in net.modules())


def alive(model: Any) -> bool:
    """DQN copies the running statistics through lists of views that it made when it was built."""
    for kept, net in ((model.batch_norm_stats, model.q_net), (model.batch_norm_stats_target, model.q_net_target)):
        now = [b for name, b in net.named_buffers() if "running_" in name]
        if [(t.data_ptr(), t.shape) for t in kept] != [(t.data_ptr(), t.shape) for t in now] or len(now) != 2:
            return False
    return True


@pytest.mark.parametrize("method", METHODS)
def test_dqn_copies_running_statistics_after_every_kind_of_edit(method):
    model = made("dqn", features_extractor_class=Normed)
    assert alive(model)
    model.target_update_interval = 1
    model.learn(96, callback=recycler(method))
    assert alive(model)
    model._on_step()
    assert same(statistics(model.q_net), statistics(model.q_net_target))


@pytest.mark.parametrize("kind", [QRDQN, SAC, TD3, DDPG, TQC], ids=lambda kind: kind.__name__)
def test_every_list_of_running_statistics_follows_a_resize(kind):
    own = {"learning_starts": 10, "buffer_size": 200, "batch_size": 8}
    own["policy_kwargs"] = {"net_arch": [8], "features_extractor_class": Normed}
    model = kind("MlpPolicy", "CartPole-v1" if kind is QRDQN else "Pendulum-v1", seed=0, device="cpu", **own)
    callback = RecycleCallback(method="tests.agents.test_elastic:Widen", every=16)
    model.learn(64, callback=callback)
    lists = {name: kept for name, kept in vars(model).items() if "batch_norm_stats" in name}
    assert len(lists) == (4 if isinstance(model, TD3) else 2)
    for name, kept in lists.items():
        prefix, target = name.split("batch_norm_stats")
        net = getattr(model, (prefix.rstrip("_") or ("quantile_net" if kind is QRDQN else "critic")) + target)
        now = [buffer for key, buffer in net.named_buffers() if "running_" in key]
        assert len(now[0]) != 12 and [t.data_ptr() for t in kept] == [t.data_ptr() for t in now]
    for network in callback.recyclers.values():
        for target, _ in network.targets:
            assert [s.shape for s in statistics(network.graph.module)] == [s.shape for s in statistics(target)]
    model.learn(32, reset_num_timesteps=False)


@pytest.mark.parametrize("edit", [recycle.Prune([2]), recycle.Grow(3), recycle.Split([1]), recycle.Reset([1])])
def test_batch_norm_rows_follow_in_the_target_too(edit):
    model = made("dqn", features_extractor_class=Normed)
    (network,) = networks_of(model)
    group = next(iter(recycle.trace(network.module, *network.calls)))
    recycle.apply(edit, group, optimizers=network.optimizers, targets=network.targets)
    remember_widths(model)
    assert alive(model)
    resized = not isinstance(edit, recycle.Reset)
    assert (group.width != 12) is resized
    assert all(len(s) == group.width for net in (model.q_net, model.q_net_target) for s in statistics(net))


# Extractors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_separate_extractors_stay_separate(shared):
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True)
    kwargs = {"share_features_extractor": shared, "features_extractor_kwargs": {"features_dim": 8}}
    model = made("ppo", "CnnPolicy", env, **kwargs).learn(64, callback=recycler("tests.agents.test_elastic:Widen"))
    pi, vf = model.policy.pi_features_extractor, model.policy.vf_features_extractor
    assert (pi is vf) is shared
    assert shared or not {id(p) for p in pi.parameters()} & {id(p) for p in vf.parameters()}
    held = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.policy.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_the_target_has_an_extractor_of_its_own(method):
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=True)
    kwargs = {"features_extractor_kwargs": {"features_dim": 8}}
    model = made("dqn", "CnnPolicy", env, **kwargs).learn(64, callback=recycler(method))
    online, target = (dict(net.features_extractor.named_parameters()) for net in (model.q_net, model.q_net_target))
    assert online.keys() == target.keys() and not {id(p) for p in online.values()} & {id(p) for p in target.values()}
    assert all(p.shape == target[name].shape for name, p in online.items())
    assert not same(list(online.values()), list(target.values()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_dict_observations(name, method, tmp_path):
    model = made(name, "MultiInputPolicy", SimpleMultiObsEnv()).learn(64, callback=recycler(method))
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert same(list(model.policy.state_dict().values()), list(loaded.policy.state_dict().values()))
    loaded.learn(32, callback=recycler(method), reset_num_timesteps=False)
    assert loaded.num_timesteps >= 96


# Policies ------------------------------------------------------------------------------------------------------


class Mine(ActorCriticPolicy):
    """A policy class of the user's."""


class MyQ(DQNPolicy):
    """A policy class of the user's."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("name", KINDS)
def test_custom_policies_and_optimizers(name, optimizer, method, tmp_path):
    policy = MyQ if name == "dqn" else Mine
    model = made(name, policy, optimizer_class=optimizer).learn(64, callback=recycler(method))
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert type(loaded.policy) is policy and type(loaded.policy.optimizer) is optimizer
    assert same(list(model.policy.state_dict().values()), list(loaded.policy.state_dict().values()))
