"""Certificates of stable-baselines3 models: whatever space bounds the observations."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ, RecurrentPPO
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

import recycle
from agents import RecycleCallback, attach
from agents.networks import networks_of

UNIT = spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
PARTS = {"box": UNIT, "code": spaces.Discrete(4), "bits": spaces.MultiBinary(2), "codes": spaces.MultiDiscrete([2, 3])}
BOUNDED = {**PARTS, "image": IMAGE, "dict": spaces.Dict({**PARTS, "image": IMAGE})}
UNBOUNDED = {
    "nothing": spaces.Box(-np.inf, np.inf, (3,)),
    "float32": spaces.Box(np.array([-1, -3.4e38], np.float32), np.array([1, 3.4e38], np.float32)),
    "a part": spaces.Dict({"a": UNIT, "b": spaces.Box(0, np.inf, (2,))}),
}


class Anything(gym.Env):
    def __init__(self, space):
        self.observation_space, self.action_space = space, spaces.Discrete(2)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 0.0, self.steps % 8 == 0, False, {}


def model_of(kind, space, **options):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if space == IMAGE else "MlpPolicy"
    small = {"n_steps": 32, "batch_size": 16, "n_epochs": 1} if kind is PPO else {"buffer_size": 100}
    kwargs = {"activation_fn": nn.ReLU, "net_arch": [8, 8]}
    env = options.pop("env", None) or Anything(space)
    return kind(policy, env, policy_kwargs=kwargs, seed=0, device="cpu", **small)


@torch.no_grad()
def silence(groups):
    """No input wakes unit 1 of these any more."""
    for group in groups:
        bias = next(a for a in group.incoming if a.role == "bias")
        group.tensor(bias.name)[bias.index[1]] = -1e7


@pytest.mark.parametrize("name", sorted(BOUNDED))
@pytest.mark.parametrize("kind", [PPO, DQN])
def test_a_silenced_unit_is_certified_and_observations_lie_in_the_box(kind, name):
    model = model_of(kind, BOUNDED[name])
    (network,) = networks_of(model)
    graph = recycle.trace(network.module, *network.calls)
    silence(graph)
    certified = recycle.certify(graph, *network.box)
    tracker = recycle.recycler.Tracker(graph, sample_every=1, training_only=False)
    with tracker, torch.no_grad():
        for _ in range(10):
            obs, _ = model.policy.obs_to_tensor(model.observation_space.sample())
            network.watch(obs)
    assert set(certified) == {group.name for group in graph}
    for group in graph:
        assert bool(certified[group.name][1])
        assert not bool((certified[group.name] & ~tracker.stats(group).dead).any()), "certified, yet it fired"


@pytest.mark.parametrize("name", sorted(UNBOUNDED))
def test_without_bounds_nothing_is_computed(name):
    (network,) = networks_of(model_of(PPO, UNBOUNDED[name]))
    assert network.box is None
    report = attach(model_of(PPO, UNBOUNDED[name]))["policy"].report()
    assert all(np.isnan(group.certified) for group in report.groups.values())
    assert "certified" not in str(report)


def test_normalised_observations_are_clipped_and_so_bounded():
    env = VecNormalize(DummyVecEnv([lambda: Anything(UNBOUNDED["nothing"])]), clip_obs=5.0)
    (network,) = networks_of(model_of(PPO, UNBOUNDED["nothing"], env=env))
    _, low, high = network.box
    assert low.tolist() == [[-5.0] * 3] and high.tolist() == [[5.0] * 3]


def test_only_the_normalised_keys_are_clipped():
    space = spaces.Dict({"a": spaces.Box(-50, 50, (2,)), "b": spaces.Box(-50, 50, (1,))})
    env = VecNormalize(DummyVecEnv([lambda: Anything(space)]), clip_obs=5.0, norm_obs_keys=["a"])
    (network,) = networks_of(model_of(PPO, space, env=env))
    _, low, high = network.box
    assert high["a"].tolist() == [[5.0, 5.0]] and high["b"].tolist() == [[50.0]] and low["b"].tolist() == [[-50.0]]


def test_events_report_and_log_what_is_certified(tmp_path):
    from stable_baselines3.common.logger import configure

    model = model_of(PPO, UNIT)
    with torch.no_grad():
        model.policy.mlp_extractor.policy_net[0].bias[:4] = -1e3
    model.set_logger(configure(str(tmp_path), ["json"]))
    callback = RecycleCallback(method="monitor", every=32, sample_every=1)
    model.learn(96, callback=callback)
    group = callback.reports[0]["policy"].groups["mlp_extractor.policy_net.0"]
    assert group.certified == 0.5 and group.dead >= 0.5
    assert "50.0% certified" in str(callback.reports[0]["policy"])
    assert '"recycle/policy/mlp_extractor.policy_net.0/certified": 0.5' in (tmp_path / "progress.json").read_text()


RECURRENT = [
    (UNIT, {}),
    (UNIT, {"shared_lstm": True, "enable_critic_lstm": False}),
    (UNIT, {"enable_critic_lstm": False}),  # the critic then begins with a layer that has no activation
    (UNIT, {"net_arch": [], "share_features_extractor": False, "n_lstm_layers": 2}),
    (IMAGE, {"net_arch": [4], "share_features_extractor": False}),
    (spaces.Dict({"box": UNIT, "image": IMAGE}), {}),
]


@pytest.mark.parametrize(("space", "options"), RECURRENT)
def test_what_is_certified_around_an_lstm_never_fires_whatever_came_before(space, options):
    policy = "MultiInputLstmPolicy" if isinstance(space, spaces.Dict) else "CnnLstmPolicy" if space == IMAGE else None
    kwargs = {"activation_fn": nn.ReLU, "net_arch": [8, 8], "lstm_hidden_size": 6, **options}
    small = {"n_steps": 32, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu", "policy_kwargs": kwargs}
    model = RecurrentPPO(policy or "MlpLstmPolicy", Anything(space), **small)
    (network,) = networks_of(model)
    graph = network.trace()
    rectified = [group for group in graph if not group.name.startswith(("lstm", "critic"))]
    silence(rectified)
    certified = recycle.certify(graph, *network.box)
    tracker = recycle.recycler.Tracker(graph, sample_every=1, training_only=False)
    with tracker, torch.no_grad():
        state, start = None, np.ones(1, bool)
        for _ in range(30):
            _, state = model.predict(space.sample(), state, start, deterministic=True)
            start[:] = False
            network.watch(model.policy.obs_to_tensor(space.sample())[0])
    for group in graph:
        assert certified[group.name].tolist() == [group in rectified and unit == 1 for unit in range(group.width)]
        assert not bool((certified[group.name] & ~tracker.stats(group).dead).any()), "certified, yet it fired"


class Continuous(Anything):
    def __init__(self, space):
        super().__init__(space)
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)


def continuous(kind, space, **options):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    kwargs = {"activation_fn": nn.ReLU, "net_arch": [8, 8]}
    return kind(policy, Continuous(space), policy_kwargs=kwargs, buffer_size=100, seed=0, device="cpu", **options)


OFF_POLICY = [(SAC, {}), (SAC, {"use_sde": True}), (TQC, {}), (TD3, {}), (DDPG, {}), (CrossQ, {})]


@pytest.mark.parametrize(("kind", "options"), OFF_POLICY)
def test_actors_and_critics_are_certified_for_every_observation_and_action(kind, options):
    model = continuous(kind, UNIT, **options)
    for network in networks_of(model):
        run, low, high = network.box
        assert (low[1] == -1).all() and (high[1] == 1).all() if network.name == "critic" else (low == -1).all()
        graph = network.trace()
        assert len(graph)
        silence(graph)
        certified = recycle.certify(graph, run, low, high)
        for group in graph:
            assert certified[group.name][1], f"{network.name} {group.name}"
            assert not certified[group.name].all()


@pytest.mark.parametrize("kind", [SAC, TQC, TD3, DDPG, CrossQ])
def test_what_is_bounded_is_what_actor_and_critic_say(kind):
    model = continuous(kind, UNIT)
    observation, action = torch.rand(3, 3) * 2 - 1, torch.rand(3, 2) * 2 - 1
    model.policy.set_training_mode(False)
    actor, critic = networks_of(model)
    said = actor.box[0](observation)
    known = (
        actor.module.get_action_dist_params(observation)[0] if isinstance(said, tuple) else actor.module(observation)
    )
    assert torch.equal(said[0] if isinstance(said, tuple) else said, known)
    values = critic.module(observation, action)
    values = [values[:, i] for i in range(values.shape[1])] if isinstance(values, torch.Tensor) else values
    assert all(map(torch.equal, critic.box[0]((observation, action)), values))


def test_actors_and_critics_on_unbounded_observations_have_no_box():
    assert [network.box for network in networks_of(continuous(SAC, UNBOUNDED["nothing"]))] == [None, None]
    assert all(network.box for network in networks_of(continuous(TD3, spaces.Dict({"a": UNIT, "b": UNIT}))))
