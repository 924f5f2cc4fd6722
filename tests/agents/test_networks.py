import copy
import functools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

import recycle
from agents.networks import networks_of
from agents.observations import BATCH, observations
from recycle.fresh import fresh_rows

torch.set_num_threads(1)

RELU = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 16}}
PI, VF = ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2"), (
    "mlp_extractor.value_net.0",
    "mlp_extractor.value_net.2",
)  # fmt: skip
OUTPUT = "reaches the module's output"


class Spaces(gym.Env):
    """Random observations from any space; every action ends the episode."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


BOX = spaces.Box(-1, 1, (3,), np.float32)


def images(size=36):
    return FakeImageEnv(screen_height=size, screen_width=size, n_channels=3, discrete=True, channel_first=False)


def ppo(policy="MlpPolicy", env="CartPole-v1", **kwargs):
    kwargs.setdefault("policy_kwargs", RELU)
    return PPO(policy, env, n_steps=64, device="cpu", seed=0, **kwargs)


def dqn(policy="MlpPolicy", env="CartPole-v1", **kwargs):
    kwargs.setdefault("policy_kwargs", RELU)
    return DQN(policy, env, buffer_size=100, device="cpu", seed=0, **kwargs)


def traced(model):
    (network,) = networks_of(model)
    return network, recycle.trace(network.module, *network.calls)


def shape(graph):
    """Names and widths, in order."""
    return [(group.name, group.width) for group in graph]


def consumers(group):
    return [axis.name for axis in group.outgoing]


def cnn(prefix, features=16):
    return [
        (f"{prefix}.cnn.0", 32),
        (f"{prefix}.cnn.2", 64),
        (f"{prefix}.cnn.4", 64),
        (f"{prefix}.linear.0", features),
    ]


# Which groups there are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ppo, lambda: A2C("MlpPolicy", "CartPole-v1", policy_kwargs=RELU, device="cpu")])
def test_actor_critic_mlp(make):
    network, graph = traced(make())
    assert network.name == "policy" and network.targets == () and len(network.optimizers) == 1
    assert shape(graph) == [(name, 16) for name in (*PI, *VF)]
    assert [consumers(group) for group in graph] == [
        ["mlp_extractor.policy_net.2.weight"],
        ["action_net.weight"],
        ["mlp_extractor.value_net.2.weight"],
        ["value_net.weight"],
    ]
    assert all(group.exact and group.homogeneous for group in graph)
    assert graph.frozen == {"action_net": OUTPUT, "value_net": OUTPUT}


def test_dqn_mlp_with_its_target():
    model = dqn(tau=0.25)
    network, graph = traced(model)
    assert network.name == "q_net" and network.module is model.q_net
    assert network.targets == ((model.q_net_target, 0.25),) and network.init is None
    assert network.optimizers == (model.policy.optimizer,)
    assert shape(graph) == [("q_net.0", 16), ("q_net.2", 16)]
    assert graph.frozen == {"q_net.4": OUTPUT}


def test_continuous_actions_leave_log_std_alone():
    _, graph = traced(ppo(env="Pendulum-v1"))
    assert shape(graph) == [(name, 16) for name in (*PI, *VF)]
    named = {axis.name for group in graph for axis in (*group.incoming, *group.outgoing)}
    assert not any("log_std" in name for name in named)
    assert consumers(graph[PI[1]]) == ["action_net.weight"]
    assert graph.frozen["value_net"] == OUTPUT and "action_net" in graph.frozen


@pytest.mark.parametrize(
    "actions", [spaces.Discrete(3), spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)],
    ids=["discrete", "box", "multi_discrete", "multi_binary"],
)  # fmt: skip
def test_every_action_space_of_ppo(actions):
    _, graph = traced(ppo(env=Spaces(BOX, actions)))
    assert shape(graph) == [(name, 16) for name in (*PI, *VF)]


def places(graph):
    """Every group with all its tensors and entries; and what is frozen, by name."""
    axes = {
        group.name: sorted(
            (axis.name, axis.dim, axis.role, axis.bias, axis.hooked, axis.groups, axis.index.tolist())
            for axis in (*group.incoming, *group.outgoing)
        )
        for group in graph
    }
    frozen = {name.partition("[")[0] for name in graph.frozen}  # a head may be told part by part
    return axes, {group.name: (group.exact, group.one_value) for group in graph}, frozen


@pytest.mark.parametrize(
    ("kind", "policy", "env", "own"),
    [
        (PPO, "MlpPolicy", "CartPole-v1", {}),
        (PPO, "MlpPolicy", "Pendulum-v1", {}),
        (PPO, "MlpPolicy", Spaces(BOX, spaces.MultiDiscrete([2, 3])), {}),
        (PPO, "MlpPolicy", Spaces(BOX, spaces.MultiBinary(3)), {"share_features_extractor": False}),
        (A2C, "CnnPolicy", images(), {"share_features_extractor": False, **SMALL_CNN}),
        (PPO, "MultiInputPolicy", SimpleMultiObsEnv(), {}),
        (MaskablePPO, "MlpPolicy", "CartPole-v1", {}),
        (TRPO, "MlpPolicy", "CartPole-v1", {}),
    ],
)
def test_what_follows_the_heads_has_no_units(kind, policy, env, own):
    model = kind(policy, env, n_steps=64, device="cpu", seed=0, policy_kwargs={**RELU, **own})
    network, graph = traced(model)
    batch = observations(model)
    actions = torch.as_tensor(np.array([model.action_space.sample() for _ in range(BATCH)])).float()
    whole = recycle.trace(network.module, lambda: model.policy.evaluate_actions(batch, actions))
    assert places(graph) == places(whole)


def test_the_noise_of_gsde_reads_units():
    _, graph = traced(ppo(env=Spaces(BOX, spaces.Box(-1, 1, (2,))), use_sde=True))
    assert [group.name for group in graph] == [PI[0], *VF]
    assert "log_std" in graph.frozen[PI[1]]
    assert graph.frozen["action_net"] == "its value is read by Python"  # torch checks a distribution's parameters


def test_units_of_a_distribution_are_found_where_a_policy_has_its_own():
    class Own(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values * self.mlp_extractor.policy_net(obs)[:, :1], log_prob, entropy

    _, graph = traced(ppo(Own))
    assert PI[1] not in [group.name for group in graph] and VF[1] in [group.name for group in graph]


def test_a_policy_whose_evaluation_is_wrapped_is_its_own():
    class Own(ActorCriticPolicy):
        @functools.wraps(ActorCriticPolicy.evaluate_actions)
        def evaluate_actions(self, obs, actions):
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values * self.mlp_extractor.policy_net(obs)[:, :1], log_prob, entropy

    _, graph = traced(ppo(Own))
    assert PI[1] not in [group.name for group in graph] and VF[1] in [group.name for group in graph]


class Mixed(nn.Module):
    """A critic that reads what the actor's layer gives, but not in ``forward``, which nobody calls here."""

    latent_dim_pi = latent_dim_vf = 8

    def __init__(self, features):
        super().__init__()
        self.pi, self.vf, self.mix = nn.Linear(features, 8), nn.Linear(features, 8), nn.Linear(8, 8)

    def forward(self, features):
        raise NotImplementedError

    def forward_actor(self, features):
        return torch.relu(self.pi(features))

    def forward_critic(self, features):
        return torch.relu(self.vf(features) + self.mix(self.forward_actor(features)))


def test_the_layers_between_are_traced_as_training_runs_them():
    class Own(ActorCriticPolicy):
        def _build_mlp_extractor(self):
            self.mlp_extractor = Mixed(self.features_dim)

    model = PPO(Own, "CartPole-v1", n_steps=64, device="cpu", policy_kwargs={"share_features_extractor": False})
    _, graph = traced(model)
    assert sorted(consumers(graph["mlp_extractor.pi"])) == ["action_net.weight", "mlp_extractor.mix.weight"]


@pytest.mark.parametrize(
    "seen",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (3,), np.float32),
        spaces.Box(-1, 1, (2, 3), np.float64),
    ],
    ids=["discrete", "multi_discrete", "multi_binary", "unbounded", "huge", "matrix"],
)
@pytest.mark.parametrize("make", [ppo, dqn])
def test_every_observation_space(make, seen):
    _, graph = traced(make(env=Spaces(seen, spaces.Discrete(3))))
    assert sum(width for _, width in shape(graph)) == (64 if make is ppo else 32)


def test_ppo_cnn_with_a_shared_extractor():
    _, graph = traced(ppo("CnnPolicy", images(), policy_kwargs=SMALL_CNN))
    assert shape(graph) == cnn("features_extractor")  # once, though it has three names in the policy
    assert sorted(consumers(graph["features_extractor.linear.0"])) == ["action_net.weight", "value_net.weight"]


def test_ppo_cnn_with_separate_extractors():
    _, graph = traced(ppo("CnnPolicy", images(), policy_kwargs={**SMALL_CNN, "share_features_extractor": False}))
    found = shape(graph)
    assert len(found) == 8 and sorted(width for _, width in found) == [16, 16, 32, 32, 64, 64, 64, 64]
    last = [group for group in graph if group.name.endswith("linear.0")]
    assert sorted(consumers(group) for group in last) == [["action_net.weight"], ["value_net.weight"]]


def test_dqn_cnn():
    _, graph = traced(dqn("CnnPolicy", images(), policy_kwargs=SMALL_CNN))
    assert shape(graph) == cnn("features_extractor")
    assert consumers(graph["features_extractor.linear.0"]) == ["q_net.0.weight"]
    assert graph.frozen == {"q_net.0": OUTPUT}


@pytest.mark.parametrize("size", [36, 44])
def test_flattened_channels_own_their_columns(size):
    side = ((size - 8) // 4 + 1 - 4) // 2 + 1 - 2  # 1 and 2: what the last convolution leaves
    _, graph = traced(dqn("CnnPolicy", images(size), policy_kwargs=SMALL_CNN))
    (axis,) = graph["features_extractor.cnn.4"].outgoing
    assert axis.name == "features_extractor.linear.0.weight" and axis.dim == 1
    wanted = torch.arange(64 * side**2).reshape(64, side**2)  # channel c: columns c * side**2 and on
    assert torch.equal(axis.index.sort(dim=1).values, wanted)
    (before,) = graph["features_extractor.cnn.2"].outgoing
    assert before.name == "features_extractor.cnn.4.weight" and before.dim == 1
    assert torch.equal(before.index, torch.arange(64)[:, None])


@pytest.mark.parametrize("make", [ppo, dqn])
def test_dict_observations(make):
    model = make("MultiInputPolicy", SimpleMultiObsEnv())
    _, graph = traced(model)
    image = cnn("features_extractor.extractors.img", 256)
    heads = [(n, 16) for n in (*PI, *VF)] if make is ppo else [("q_net.0", 16), ("q_net.2", 16)]
    assert shape(graph) == image + heads
    joined = graph["features_extractor.extractors.img.linear.0"]
    assert len(joined.outgoing) == (2 if make is ppo else 1)
    for axis in joined.outgoing:  # the image's 256 features come before the vector's 5
        assert torch.equal(axis.index, torch.arange(256)[:, None]) and joined.tensor(axis.name).shape[1] == 261
    (flat,) = graph["features_extractor.extractors.img.cnn.4"].outgoing
    assert flat.span == 16 and flat.index.unique().numel() == 64 * 16


def test_the_watch_call_runs_every_layer():
    ran: list[str] = []
    for model in (ppo(), dqn(), ppo("CnnPolicy", images(), policy_kwargs=SMALL_CNN)):
        network, graph = traced(model)
        ran.clear()
        for group in graph:
            consumer = network.module.get_submodule(group.outgoing[0].name.rpartition(".")[0])
            consumer.register_forward_hook(lambda *_, name=group.name: ran.append(name))
        batch, _ = model.policy.obs_to_tensor(model.observation_space.sample()[None])
        network.watch(batch)
        assert set(ran) == {group.name for group in graph}


def test_a_split_of_every_group_leaves_the_policy_as_it_was():
    pictures = ppo("CnnPolicy", images(44), policy_kwargs=SMALL_CNN)
    for model in (ppo(), pictures, dqn("MultiInputPolicy", SimpleMultiObsEnv())):
        network, graph = traced(model)
        with torch.no_grad():
            for group in graph:  # silence unit 1, so that it may be overwritten
                for axis in group.outgoing:
                    group.tensor(axis.name).index_fill_(axis.dim, axis.index[1], 0.0)
        batch = model.observation_space.sample()
        batch = {k: v[None] for k, v in batch.items()} if isinstance(batch, dict) else batch[None]
        seen, _ = model.policy.obs_to_tensor(batch)

        def outputs(network=network, seen=seen):
            with torch.no_grad():
                found = network.watch(seen)
            return [found] if isinstance(found, torch.Tensor) else [found[0].distribution.logits, found[1]]

        before = outputs()
        for group in graph:
            recycle.apply(recycle.Split([0], [1]), group)
        for old, new in zip(before, outputs(), strict=True):
            assert torch.allclose(old, new, rtol=1e-5, atol=1e-5)  # policies turn observations into float32


def test_other_algorithms_are_refused_by_name():
    ars = pytest.importorskip("sb3_contrib").ARS("LinearPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match=r"implemented for PPO, .* TQC and CrossQ, got ARS\. Use recycle\.trace"):
        networks_of(ars)


# How fresh units begin -----------------------------------------------------------------------------------------


def fresh(model, name, seed=0):
    """Fresh weight rows and biases of all units of a group, as the model's builder would have drawn them."""
    network, graph = traced(model)
    group = graph[name]
    rows = fresh_rows(group, torch.arange(group.width), network.init, torch.Generator().manual_seed(seed))
    return rows[0].reshape(group.width, -1), rows[1].flatten()


def test_ppo_draws_fresh_rows_orthogonally():
    weight, bias = fresh(ppo(), "mlp_extractor.policy_net.2")
    assert torch.allclose(weight @ weight.T, 2 * torch.eye(16), atol=1e-5)  # gain sqrt(2)
    assert torch.equal(bias, torch.zeros(16))
    weight, _ = fresh(ppo(), "mlp_extractor.value_net.0")  # 16 rows of 4: here the columns are orthogonal
    assert torch.allclose(weight.T @ weight, 2 * torch.eye(4), atol=1e-5)


def test_ppo_draws_fresh_filters_orthogonally():
    weight, bias = fresh(ppo("CnnPolicy", images(), policy_kwargs=SMALL_CNN), "features_extractor.cnn.2")
    assert weight.shape == (64, 32 * 16)
    assert torch.allclose(weight.norm(dim=1), torch.full((64,), math.sqrt(2)), atol=1e-5)
    assert torch.equal(bias, torch.zeros(64))


def test_heads_have_their_own_gains():
    model = ppo()
    (network,) = networks_of(model)
    assert network.init is not None
    for name, gain in (("action_net", 0.01), ("value_net", 1.0), ("mlp_extractor.policy_net.2", math.sqrt(2))):
        weight = torch.empty(8, 16)
        network.init(f"{name}.weight", weight, torch.Generator().manual_seed(0))
        assert torch.allclose(weight @ weight.T, gain**2 * torch.eye(8), atol=1e-5)
        built = model.policy.get_parameter(f"{name}.weight").detach()  # and so did stable-baselines3
        assert torch.allclose(built.norm(dim=1), torch.full((len(built),), gain), atol=1e-5)


def test_without_ortho_init_and_in_dqn_torchs_own_scale_is_kept():
    plain = ppo(policy_kwargs={**RELU, "ortho_init": False})
    assert networks_of(plain)[0].init is None
    for model, name in ((plain, "mlp_extractor.policy_net.2"), (dqn(), "q_net.2")):
        draws = [fresh(model, name, seed) for seed in range(8)]
        for part in (torch.cat([w for w, _ in draws]), torch.cat([b for _, b in draws])):
            bound = 1 / math.sqrt(16)  # uniform in +-1/sqrt(fan_in)
            assert part.abs().max() <= bound
            assert part.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert part.abs().max() > 0.9 * bound


# Looking leaves no trace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ppo, dqn, lambda: ppo(env="Pendulum-v1")], ids=["ppo", "dqn", "box"])
def test_probing_draws_from_no_generator_and_changes_no_weight(make):
    model = make()
    model.action_space.seed(5)
    model.observation_space.seed(5)
    twins = copy.deepcopy((model.action_space, model.observation_space))
    weights = {k: v.clone() for k, v in model.policy.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    mode = [m.training for m in model.policy.modules()]
    traced(model)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert mode == [m.training for m in model.policy.modules()]
    assert all(p.grad is None for p in model.policy.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.policy.state_dict().items())
    for space, twin in zip((model.action_space, model.observation_space), twins, strict=True):
        for _ in range(5):
            assert np.array_equal(space.sample(), twin.sample())
