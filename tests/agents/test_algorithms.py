"""Every algorithm of stable-baselines3 and sb3-contrib: train, recycle, save, load, train on."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import recycle
from agents import RecycleCallback, attach, train
from agents import inspect as look
from agents.algorithms import ALGOS, algorithm, algorithm_of
from agents.inspect import Args, inspect
from agents.networks import networks_of
from recycle import Reset, Split
from recycle.outputs import returned
from recycle.report import Report

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

gym.register("Masked-v0", lambda: InvalidActionEnvDiscrete(dim=6, n_invalid_actions=2), max_episode_steps=50)
ON_POLICY = [PPO, A2C, TRPO, MaskablePPO, RecurrentPPO]
ACTOR_AND_CRITIC = [SAC, TD3, DDPG, TQC, CrossQ]
EVERY = [*ON_POLICY, DQN, QRDQN, *ACTOR_AND_CRITIC]
CASES = [(kind, policy) for kind in EVERY for policy in ("Mlp", "Cnn", "MultiInput")
         if not (kind is CrossQ and policy != "Mlp")]  # fmt: skip


def named(case):
    return case.__name__ if isinstance(case, type) else str(case)


def environment(kind, policy):
    discrete = kind not in ACTOR_AND_CRITIC
    if policy == "Cnn":
        return FakeImageEnv(screen_height=36, screen_width=36, discrete=discrete)
    if policy == "MultiInput":
        return SimpleMultiObsEnv(discrete_actions=discrete, random_start=False)
    if kind is MaskablePPO:
        return InvalidActionEnvDiscrete(dim=6, n_invalid_actions=2)
    return gym.make("CartPole-v1" if discrete else "Pendulum-v1")


def build(kind, policy="Mlp", env=None, **options):
    env = environment(kind, policy) if env is None else env
    widths = {"net_arch": [16, 16]}
    extractor = {"Mlp": {}, "Cnn": {"features_dim": 16}, "MultiInput": {"cnn_output_dim": 16}}[policy]
    if extractor:
        widths["features_extractor_kwargs"] = extractor
    if kind in ON_POLICY:
        widths["activation_fn"] = nn.ReLU
        steps = {"n_steps": 16} if kind is A2C else {"n_steps": 16, "batch_size": 16}
        if kind is RecurrentPPO:
            policy, widths["lstm_hidden_size"] = f"{policy}Lstm", 8
    else:
        steps = {"learning_starts": 4, "batch_size": 8, "buffer_size": 200}
        if kind in (DQN, QRDQN):
            steps |= {"train_freq": 2, "target_update_interval": 8}
    widths |= options.pop("policy_kwargs", {})
    return kind(f"{policy}Policy", env, device="cpu", seed=0, policy_kwargs=widths, **{**steps, **options})


def learn(model, steps, callback=None):
    masks = {"use_masking": False} if isinstance(model, MaskablePPO) and not has_masks(model) else {}
    return model.learn(steps, callback=callback, **masks)


def has_masks(model):
    return hasattr(model.get_env().envs[0].unwrapped, "action_masks")


def shape(graph):
    return [(group.name, group.width) for group in graph]


def killable(network, graph):
    """Groups that a hook sees and whose units a ReLU can silence."""
    return [group for group in graph if (group.observers() and group.homogeneous) or renorm(network.module)]


def renorm(module):
    return any(hasattr(layer, "ra_mean") for layer in module.modules())


@torch.no_grad()
def kill(model, units=(1, 2)):
    """Give units a bias that no input overcomes, in the networks and their targets; how many, by network."""
    killed = {}
    for network in networks_of(model):
        groups = killable(network, network.trace())
        killed[network.name] = len(units) * len(groups)
        for module in (network.module, *(target for target, _ in network.targets)):
            for group in groups:
                bias = next(axis for axis in group.incoming if axis.role == "bias")
                module.get_parameter(bias.name)[list(units)] = -1e3
                for axis in group.incoming:
                    if axis.role == "buffer":  # long after the death of a unit its running statistics are zero
                        module.get_buffer(axis.name)[list(units)] = 0.0
    return killed


def step_on_the_killed(callback, units=(1, 2)):
    """One event at which only the killed units are recycled: others may be dead on what was seen alone."""
    reports = {}
    for name, recycler in callback.recyclers.items():
        recycler.method = Only(recycler.method, set(units))
        reports[name] = recycler.step()
    return reports


class Only:
    """A method's edits of some units."""

    def __init__(self, method, units):
        self.method, self.units, self.needs = method, units, method.needs

    def __call__(self, group, stats):
        return [part for edit in self.method(group, stats) if (part := edit.only(self.units)).slots]


def outputs(model, seed=0):
    """What every network says about random observations."""
    model.policy.set_training_mode(False)
    space = copy.deepcopy(model.observation_space)
    space.seed(seed)
    seen = [space.sample() for _ in range(4)]
    stacked = {k: np.stack([s[k] for s in seen]) for k in seen[0]} if isinstance(seen[0], dict) else np.stack(seen)
    obs, _ = model.policy.obs_to_tensor(stacked)
    found = []
    for network in networks_of(model):
        torch.manual_seed(0)
        with torch.no_grad():
            found += [t.clone() for t in returned(network.watch(obs)) if t.is_floating_point()]
    return found


# Which groups there are ----------------------------------------------------------------------------------------

PI, VF = "mlp_extractor.policy_net", "mlp_extractor.value_net"
HEADS = [(f"{PI}.0", 16), (f"{PI}.2", 16), (f"{VF}.0", 16), (f"{VF}.2", 16)]
TWINS = [("qf0.0", 16), ("qf0.2", 16), ("qf1.0", 16), ("qf1.2", 16)]
GROUPS = {
    PPO: {"policy": HEADS},
    A2C: {"policy": HEADS},
    TRPO: {"policy": HEADS},
    MaskablePPO: {"policy": HEADS},
    RecurrentPPO: {"policy": [("lstm_actor", 8), ("lstm_critic", 8), *HEADS]},
    DQN: {"q_net": [("q_net.0", 16), ("q_net.2", 16)]},
    QRDQN: {"quantile_net": [("quantile_net.0", 16), ("quantile_net.2", 16)]},
    SAC: {"actor": [("latent_pi.0", 16), ("latent_pi.2", 16)], "critic": TWINS},
    TQC: {"actor": [("latent_pi.0", 16), ("latent_pi.2", 16)], "critic": TWINS},
    TD3: {"actor": [("mu.0", 16), ("mu.2", 16)], "critic": TWINS},
    DDPG: {"actor": [("mu.0", 16), ("mu.2", 16)], "critic": TWINS[:2]},
    CrossQ: {
        "actor": [("latent_pi.1", 16), ("latent_pi.4", 16)],
        "critic": [("qf0.1", 16), ("qf0.4", 16), ("qf1.1", 16), ("qf1.4", 16)],
    },
}


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_groups_of_the_mlp_policies(kind):
    graphs = {network.name: network.trace() for network in networks_of(build(kind))}
    assert {name: shape(graph) for name, graph in graphs.items()} == GROUPS[kind]
    assert all(group.exact for graph in graphs.values() for group in graph)


@pytest.mark.parametrize("kind", [SAC, TQC, CrossQ], ids=named)
def test_the_last_latent_layer_has_two_consumers(kind):
    *_, last = networks_of(build(kind))[0].trace()
    assert [axis.name for axis in last.outgoing] == ["mu.weight", "log_std.weight"]


def test_batch_renorm_rows_belong_to_the_units():
    (actor, _) = networks_of(build(CrossQ))
    held = {axis.name: axis.role for axis in actor.trace()["latent_pi.1"].incoming}
    assert held == {
        "latent_pi.1.weight": "weight",
        "latent_pi.1.bias": "bias",
        "latent_pi.3.ra_mean": "buffer",
        "latent_pi.3.ra_var": "buffer",
        "latent_pi.3.scale": "gain",
        "latent_pi.3.bias": "bias",
    }


CONVOLUTIONS = [("cnn.0", 32), ("cnn.2", 64), ("cnn.4", 64), ("linear.0", 16)]


@pytest.mark.parametrize("kind", [k for k in EVERY if k is not CrossQ], ids=named)
def test_groups_of_the_cnn_policies(kind):
    for network in networks_of(build(kind, "Cnn")):
        found = shape(network.trace())
        assert found[:4] == [(f"features_extractor.{name}", width) for name, width in CONVOLUTIONS]
        rest = dict(found[4:])
        assert rest == dict(GROUPS[kind][network.name])


# Recycling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "policy"), CASES, ids=named)
def test_train_recycle_save_load_and_train_on(kind, policy, tmp_path):
    model = build(kind, policy, **({"learning_rate": 0.0, "policy_delay": 1} if kind is CrossQ else {}))
    killed = kill(model)
    assert all(killed.values())
    behind = kind is CrossQ  # BatchRenorm, whose trained shift would move even a dead unit's constant: no learning
    method, options = ("split", {"noise": 0.0}) if behind else ("redo", {"tau": 0.0})
    callback = RecycleCallback(method=method, method_kwargs=options, every=10_000, sample_every=1)
    learn(model, 16 if kind in ON_POLICY else 12, callback)
    if behind:
        settle(model)
    before = outputs(model)
    reports = step_on_the_killed(callback)
    assert {name: report.recycled for name, report in reports.items()} == killed
    for old, new in zip(before, outputs(model), strict=True):
        assert torch.allclose(old, new, rtol=1e-4, atol=1e-5 * max(1, float(old.abs().max())))
    model.save(tmp_path / "model.zip")
    again = kind.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    for old, new in zip(outputs(model), outputs(again), strict=True):
        assert torch.equal(old, new)
    learn(again, 32, RecycleCallback(every=16, sample_every=1, method="split"))
    assert all(p.isfinite().all() for p in again.policy.parameters())


@torch.no_grad()
def settle(model):
    """Bring the running statistics of dead units down to their constant, as some thousand updates would."""
    for network in networks_of(model):
        for group in network.trace():
            for axis in group.incoming:
                if axis.role == "buffer":
                    network.module.get_buffer(axis.name)[[1, 2]] = 0.0


@pytest.mark.parametrize("kind", EVERY, ids=named)
@pytest.mark.parametrize("method", ["split", "redo"])
def test_the_callback_recycles_while_it_trains(kind, method):
    if kind is CrossQ and method == "redo":
        pytest.skip("behind BatchRenorm a dead unit is a constant that is not zero; redo goes by zero")
    model = build(kind)
    killed = kill(model)
    callback = RecycleCallback(method=method, every=16, sample_every=1)
    if kind is CrossQ:  # events between single updates
        callback = RecycleCallback(method=method, every=1, sample_every=1)
    learn(model, 48 if kind in ON_POLICY else 34, callback)
    for name, count in killed.items():
        assert sum(event[name].recycled for event in callback.reports) >= count, "\n".join(
            str(event[name]) for event in callback.reports
        )
    assert all(p.isfinite().all() for p in model.policy.parameters())


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_watching_changes_nothing(kind):
    plain = build(kind)
    learn(plain, 48)
    watched = build(kind)
    learn(watched, 48, RecycleCallback(method="monitor", every=16, sample_every=2))
    for (name, one), other in zip(plain.policy.state_dict().items(), watched.policy.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_looking_leaves_no_trace(kind):
    model = build(kind)
    before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    modes = [m.training for m in model.policy.modules()]
    state = torch.get_rng_state()
    watchers = attach(model)
    for watcher in watchers.values():
        watcher.detach()
    assert set(watchers) == set(GROUPS[kind])
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.policy.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.policy.state_dict().items())
    assert all(p.grad is None for p in model.policy.parameters())


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_two_environments_and_normalised_observations(kind):
    name = "Pendulum-v1" if kind in ACTOR_AND_CRITIC else "CartPole-v1"
    model = build(kind, env=VecNormalize(make_vec_env(name, n_envs=2, seed=0)))
    killed = kill(model)
    callback = RecycleCallback(method="split", every=16 if kind is not CrossQ else 2, sample_every=1)
    learn(model, 100, callback)
    for network, count in killed.items():
        assert sum(event[network].recycled for event in callback.reports) >= count


# Targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SAC, TQC, TD3, DDPG], ids=named)
def test_a_split_reaches_the_polyak_targets(kind):
    model = build(kind)
    kill(model)
    callback = RecycleCallback(method="split", method_kwargs={"noise": 0.0}, every=10_000, sample_every=1)
    learn(model, 12, callback)
    reports = step_on_the_killed(callback)
    targets = {network.name: target for network in networks_of(model) for target, tau in network.targets if tau < 1}
    assert set(targets) == ({"actor", "critic"} if kind in (TD3, DDPG) else {"critic"})
    for name, target in targets.items():
        edits = [(group, edit) for group, edit in reports[name].edits if isinstance(edit, Split)]
        assert {group for group, _ in edits} == {group for group, _ in GROUPS[kind][name]}
        for group, edit in edits:
            weight = target.get_parameter(f"{group}.weight")
            assert torch.equal(weight[list(edit.slots)], weight[list(edit.parents)])


@pytest.mark.parametrize("kind", [SAC, TD3], ids=named)
def test_a_unit_that_lives_in_the_target_is_left_alone(kind):
    model = build(kind)
    kill(model)
    ((target, _),) = networks_of(model)[1].targets
    with torch.no_grad():
        target.qf0[0].bias[1] = 1e3
    callback = RecycleCallback(method="redo", method_kwargs={"tau": 0.0}, every=10_000, sample_every=1)
    learn(model, 6, callback)
    report = step_on_the_killed(callback)["critic"]
    assert report.groups["qf0.0"].note == "1 still alive in the target network"
    assert report.groups["qf0.0"].recycled == report.groups["qf1.0"].recycled - 1


def test_the_batch_kept_for_targets_holds_no_graph():
    model = build(SAC)
    callback = RecycleCallback(method="redo", every=10_000, sample_every=1)
    learn(model, 8, callback)
    args, _ = callback.recyclers["critic"]._soft.batch
    assert len(args) == 2 and not any(t.requires_grad for t in args)  # the actions are the actor's own


def test_dead_units_behind_batch_renorm_wait_until_their_statistics_have_settled():
    model = build(CrossQ, learning_rate=0.0)
    killed = kill(model)
    with torch.no_grad():
        for module in (model.actor, model.critic):
            for name, buffer in module.named_buffers():
                if name.endswith("ra_var"):
                    buffer.fill_(1.0)  # as while the units still lived: evaluation gives another constant
            for layer in module.modules():
                if hasattr(layer, "ra_mean"):
                    layer.bias.fill_(0.1)
    callback = RecycleCallback(method="split", every=10_000, sample_every=1)
    learn(model, 12, callback)
    assert {name: report.recycled for name, report in step_on_the_killed(callback).items()} == dict.fromkeys(killed, 0)
    settle(model)
    learn(model, 12, callback)
    settle(model)
    assert {name: report.recycled for name, report in step_on_the_killed(callback).items()} == killed


# Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [(PPO, f"{PI}.2"), (SAC, "latent_pi.2"), (TQC, "latent_pi.2")], ids=named)
def test_state_dependent_noise_freezes_the_last_latent_layer(kind, name):
    model = build(kind, env="Pendulum-v1", use_sde=True)
    network = networks_of(model)[0]
    graph = network.trace()
    assert graph.frozen[name] == "aten.mm multiplies it by a weight computed from 'log_std'"
    assert not any("log_std" in axis.name for group in graph for axis in (*group.incoming, *group.outgoing))
    kill(model)
    callback = RecycleCallback(method="redo", method_kwargs={"tau": 0.0}, every=10_000, sample_every=1)
    learn(model, 16, callback)
    noise = network.module.action_dist.exploration_mat.clone()
    before = outputs(model)
    assert step_on_the_killed(callback)[network.name].recycled >= 2
    assert torch.equal(noise, network.module.action_dist.exploration_mat)  # log_std is no unit's: the noise stands
    for old, new in zip(before, outputs(model), strict=True):
        assert torch.allclose(old, new, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SAC, TD3], ids=named)
def test_an_extractor_that_actor_and_critic_share_is_frozen(kind):
    model = build(kind, "Cnn", policy_kwargs={"share_features_extractor": True})
    for network in networks_of(model):
        graph = network.trace()
        assert dict(shape(graph)) == dict(GROUPS[kind][network.name])
        assert graph.frozen["features_extractor.cnn.2"].startswith("actor and critic share it, and each is traced")


def test_recurrent_units_are_watched_and_keep_their_number():
    model = build(RecurrentPPO)
    callback = RecycleCallback(method="redo", every=16, sample_every=1)
    learn(model, 48, callback)
    seen = callback.reports[0]["policy"].groups["lstm_actor"]
    assert seen.samples > 0
    assert not seen.note
    group = callback.recyclers["policy"].graph["lstm_actor"]
    assert not group.resizable
    assert "one lstm_hidden_size" in group.why_fixed


def test_names_are_looked_up_in_all_networks():
    model = build(SAC)
    callback = RecycleCallback(method="monitor", include=["latent_pi.0", "qf1"], exclude=["qf1.2"])
    callback.prepare(model)
    assert {k: shape(r.graph) for k, r in callback.recyclers.items()} == {
        "actor": [("latent_pi.0", 16)],
        "critic": [("qf1.0", 16)],
    }
    only = RecycleCallback(method="monitor", include=["qf1"])
    learn(model, 8, only)
    assert set(only.recyclers) == {"critic"}
    with pytest.raises(ValueError, match=r"no group is called 'qf2'; did you mean 'qf"):
        RecycleCallback(include=["qf2"]).prepare(model)


# Recurrent states ----------------------------------------------------------------------------------------------

LSTMS = [{}, {"shared_lstm": True, "enable_critic_lstm": False}, {"enable_critic_lstm": False}, {"n_lstm_layers": 2}]


@pytest.mark.parametrize("options", LSTMS, ids=["own", "shared", "actor_only", "two_layers"])
def test_live_states_follow_an_edit_of_recurrent_units(options):
    model = build(RecurrentPPO, env=make_vec_env("CartPole-v1", n_envs=3, seed=0), policy_kwargs=options)
    learn(model, 48)
    (network,) = networks_of(model)
    graph = network.trace()
    groups = [group for group in graph if group.name.startswith("lstm")]
    assert groups
    for group in groups:
        old = copy.deepcopy(model._last_lstm_states)
        edits = (Split([3], [5]), Reset([6]))
        for edit in edits:
            recycle.apply(edit, group)
        network.follow(graph, Report(0, {}, tuple((group.name, edit) for edit in edits)))
        layer = 1 if "l1" in group.name else 0
        followed = {"lstm_critic": ("vf",)}.get(group.name.split(".")[0], ("pi",))
        if model.policy.lstm_critic is None:
            followed = ("pi", "vf")
        for side in ("pi", "vf"):
            for was, now in zip(getattr(old, side), getattr(model._last_lstm_states, side), strict=True):
                wanted = was.clone()
                if side in followed:
                    wanted[layer, :, 5] = was[layer, :, 3]
                    wanted[layer, :, 6] = 0.0
                assert torch.equal(now, wanted)
                assert side not in followed or not torch.equal(was, now)
    learn(model, 48)


class Recurrent:
    """Splits recurrent unit 3 into unit 5, at every event."""

    needs = ("minimum",)

    def __call__(self, group, stats):
        return [Split([3], [5])] if group.name == "lstm_actor" else []


def test_the_next_rollout_begins_with_states_that_followed():
    model = build(RecurrentPPO, env=make_vec_env("CartPole-v1", n_envs=3, seed=0))
    seen = []

    class States(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            seen.append(copy.deepcopy(self.model._last_lstm_states.pi))

        def _on_training_start(self):
            self.stored = []

        def _on_rollout_end(self):
            self.stored.append(self.model.rollout_buffer.hidden_states_pi[0, 0].copy())

    before, after = States(), States()
    ours = RecycleCallback(method=f"{__name__}:Recurrent", every=48, sample_every=1)
    learn(model, 144, CallbackList([before, ours, after]))
    old, new = seen[2:4]  # around the first event
    for was, now in zip(old, new, strict=True):
        assert torch.equal(now[0, :, 5], was[0, :, 3]) and not torch.equal(was[0, :, 5], was[0, :, 3])
        assert torch.equal(now[0, :, :5], was[0, :, :5])
    assert np.array_equal(after.stored[1][:, 5], after.stored[1][:, 3])  # the buffer's first row is the live state


def test_a_split_recurrent_unit_acts_as_before_from_the_live_state():
    model = build(RecurrentPPO)
    learn(model, 32)
    policy, (network,) = model.policy, networks_of(model)
    group = network.trace()["lstm_actor"]
    with torch.no_grad():
        for axis in group.outgoing:  # unit 5 says nothing, so it may be overwritten
            group.tensor(axis.name)[:, axis.index[5]] = 0.0
    obs = torch.zeros(1, 4)

    def logits():
        with torch.no_grad():
            distribution, _ = policy.get_distribution(obs, model._last_lstm_states.pi, torch.zeros(1))
        return distribution.distribution.logits

    before = logits()
    edit = Split([3], [5])
    recycle.apply(edit, group)
    assert not torch.allclose(before, logits(), atol=1e-7)  # the newborn still has the old unit's state
    network.follow(network.trace(), Report(0, {}, (("lstm_actor", edit),)))
    assert torch.allclose(before, logits(), atol=1e-6)


# By name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY, ids=named)
def test_a_saved_model_tells_its_algorithm(kind):
    data = vars(build(kind))
    assert algorithm_of(data) is (TD3 if kind is DDPG else kind)
    assert kind in map(algorithm, ALGOS)


def test_an_algorithm_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sb3_contrib", None)
    with pytest.raises(ValueError, match=r"tqc is an algorithm of sb3-contrib: pip install 'recycle-rl\[contrib\]'"):
        algorithm("tqc")
    with pytest.raises(ValueError, match=r"no algorithm 'sacc' for --algo: did you mean 'sac'"):
        algorithm("sacc")


@pytest.mark.parametrize("kind", [A2C, RecurrentPPO, QRDQN, SAC, DDPG, CrossQ], ids=named)
def test_a_saved_model_can_be_looked_at(kind, tmp_path):
    model = build(kind)
    kill(model)
    model.save(tmp_path / "model.zip")
    name = "Pendulum-v1" if kind in ACTOR_AND_CRITIC else "CartPole-v1"
    found = inspect(Args(tmp_path / "model.zip", name, steps=40))
    assert {part.network.name for part in found} == set(GROUPS[kind])
    for part in found:
        first = next(name for name, _ in GROUPS[kind][part.network.name] if not name.startswith("lstm"))
        assert part.stats(first).samples >= 40 and part.stats(first).dead[[1, 2]].all()


@pytest.mark.parametrize("algo", ALGOS)
def test_algorithms_train_from_the_command_line_and_are_looked_at(algo, tmp_path, capsys):
    kind = algorithm(algo)
    env = "Masked-v0" if kind is MaskablePPO else "Pendulum-v1" if kind in ACTOR_AND_CRITIC else "CartPole-v1"
    size = ["n_steps:16"] * (kind in ON_POLICY) + ["batch_size:8"] * (kind is not A2C)
    words = ["--algo", algo, "--env", env, "-n", "128", "--every", "40", "--log-folder", str(tmp_path)]
    options = ["--policy-kwargs", "net_arch:[8]", "activation_fn:relu", "--hyperparams", *size]
    assert train.main([*words, *options]) == 0
    (config,) = tmp_path.rglob("config.yaml")
    assert f"policy_class: {type(build(kind).policy).__name__}" in config.read_text()
    assert (config.parent / "edits.jsonl").read_text()
    capsys.readouterr()
    assert look.main([str(config.parent / "model.zip"), "--env", env, "--steps", "40"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{network}: units over " in shown for network in GROUPS[kind])


def test_an_environment_without_masks_is_one_line(tmp_path, capsys):
    assert train.main(["--algo", "maskable_ppo", "--env", "CartPole-v1", "--log-folder", str(tmp_path)]) == 2
    assert "this one has no method action_masks(). Use ppo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("algo", "env"), [("tqc", "CartPole-v1"), ("qrdqn", "Pendulum-v1")])
def test_action_spaces_that_do_not_fit_are_one_line(algo, env, tmp_path, capsys):
    assert train.main(["--algo", algo, "--env", env, "--log-folder", str(tmp_path)]) == 2
    kind = "Box" if algo == "tqc" else "Discrete"
    assert f"error: {algo} needs a {kind} action space, the environment has " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
