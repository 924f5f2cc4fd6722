"""Layer norm and concatenated ReLUs in policies of every kind: built, trained, saved and loaded."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.save_util import load_from_zip_file
from torch import nn

from agents import RecycleCallback
from agents.algorithms import algorithm_of
from agents.layered import CReLU, layered, layered_kwargs

torch.set_num_threads(1)

NET = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
QUICK = {
    PPO: {"n_steps": 32, "batch_size": 16, "n_epochs": 1},
    A2C: {},
    DQN: {"learning_starts": 10, "batch_size": 8, "buffer_size": 200},
    SAC: {"learning_starts": 10, "batch_size": 8, "buffer_size": 200},
    TD3: {"learning_starts": 10, "batch_size": 8, "buffer_size": 200},
}


def built(kind, env=None, policy="MlpPolicy", net=NET, **options):
    env = env or ("Pendulum-v1" if kind in (SAC, TD3) else "CartPole-v1")
    kwargs = dict(net) | layered_kwargs(kind, policy, **({"layer_norm": False, "crelu": False} | options))
    return kind(layered, env, policy_kwargs=kwargs, device="cpu", seed=0, **QUICK[kind])


def linears(module):
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def test_crelu_gives_both_signs():
    assert CReLU()(torch.tensor([[1.0, -2.0]])).tolist() == [[1.0, 0.0, 0.0, 2.0]]
    assert CReLU()(torch.zeros(2, 3, 4, 4)).shape == (2, 6, 4, 4)


def test_hidden_layers_are_halved_and_what_is_read_stays_as_wide():
    policy = built(PPO, crelu=True).policy
    plain = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=dict(NET), device="cpu", seed=0, **QUICK[PPO]).policy
    assert linears(policy.mlp_extractor.policy_net) == [(4, 8), (16, 8)]
    assert linears(policy.action_net) == [(16, 2)]
    kept = policy.mlp_extractor.policy_net[0].weight
    assert torch.equal(kept, plain.mlp_extractor.policy_net[0].weight[:8])  # as its builder initialises


def test_norms_stand_before_every_activation_and_nowhere_else():
    policy = built(TD3, layer_norm=True).policy
    assert [type(m).__name__ for m in policy.actor.mu] == [
        "Linear",
        "Sequential",
        "Linear",
        "Sequential",
        "Linear",
        "Tanh",
    ]
    assert [type(m).__name__ for m in policy.actor.mu[1]] == ["LayerNorm", "ReLU"]
    assert sum(isinstance(m, nn.LayerNorm) for m in policy.critic.modules()) == 4
    both = built(DQN, layer_norm=True, crelu=True).policy.q_net.q_net
    assert [type(m).__name__ for m in both[1]] == ["LayerNorm", "CReLU"] and both[1][0].normalized_shape == (8,)


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"crelu": True}, {"layer_norm": True, "crelu": True}])
@pytest.mark.parametrize("kind", list(QUICK))
def test_they_train_recycle_and_are_saved_and_loaded(tmp_path, kind, options):
    model = built(kind, **options)
    optimizers = {n: m.optimizer for n, m in model.policy.named_modules() if hasattr(m, "optimizer")}
    held = {id(p) for o in optimizers.values() for g in o.param_groups for p in g["params"]}
    live = {id(p) for n, p in model.policy.named_parameters() if "target" not in n}
    assert live <= held
    before = {n: p.detach().clone() for n, p in model.policy.named_parameters()}
    model.learn(100, callback=RecycleCallback(method="redo", every=32, sample_every=1))
    now = dict(model.policy.named_parameters())
    hidden = [n for n in before if "target" not in n and now[n].dim() > 1]
    assert hidden and all(not torch.equal(before[n], now[n]) for n in hidden)
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=model.env, device="cpu")
    assert algorithm_of(load_from_zip_file(tmp_path / "model")[0]) is kind
    state = loaded.policy.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.policy.state_dict().items())
    loaded.learn(50, reset_num_timesteps=False)


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"crelu": True}])
def test_widths_that_change_are_remembered(tmp_path, options):
    model = built(PPO, **options)
    model.learn(100, callback=RecycleCallback(method="tests.agents.test_elastic:Widen", every=32, sample_every=1))
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=model.env, device="cpu")
    shapes = [{n: tuple(p.shape) for n, p in m.policy.named_parameters()} for m in (model, loaded)]
    assert shapes[0] == shapes[1]
    assert ("crelu" not in options) == (shapes[0]["mlp_extractor.policy_net.0.weight"][0] == 16)  # LayerNorm: fixed


class Pictures(gym.Env):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def test_convolutions_take_part():
    model = built(DQN, env=Pictures(), policy="CnnPolicy", net={}, layer_norm=True, crelu=True)
    cnn = model.policy.q_net.features_extractor.cnn
    assert [m.out_channels for m in cnn if isinstance(m, nn.Conv2d)] == [16, 32, 32]
    assert isinstance(cnn[1][0], nn.GroupNorm) and isinstance(cnn[1][1], CReLU)
    model.learn(20)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: built(PPO, crelu=True, net={"net_arch": [15]}), "width must be even, got 15"),
        (lambda: built(DQN, crelu=True, net={"net_arch": []}), "no Linear or Conv2d layer directly followed"),
        (
            lambda: layered_kwargs(PPO, "Mlp", layer_norm=True, crelu=False),
            "PPO has no policy 'Mlp': there are Mlp",
        ),
    ],
)
def test_what_has_no_place_for_them_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
