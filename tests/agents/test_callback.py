import base64
import copy
import csv
import inspect
import json
import pickle
import re
import sys
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

import recycle
from agents import RecycleCallback, attach
from agents.algorithms import algorithm_of
from agents.observations import recent

torch.set_num_threads(1)

RELU = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
GROUPS = [f"mlp_extractor.{half}_net.{layer}" for half in ("policy", "value") for layer in (0, 2)]
DEAD = [1, 3, 5]
METHODS = ["split", "mirror", "redo", "random"]


def ppo(env="CartPole-v1", **kwargs):
    kwargs = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "policy_kwargs": RELU, "seed": 0} | kwargs
    return PPO("MlpPolicy", env, device="cpu", **kwargs)


def dqn(env="CartPole-v1", **kwargs):
    kwargs = {"buffer_size": 500, "learning_starts": 20, "batch_size": 16, "policy_kwargs": RELU, "seed": 0} | kwargs
    return DQN("MlpPolicy", env, device="cpu", **kwargs)


def sac(env="Pendulum-v1", **kwargs):
    kwargs = {"learning_starts": 20, "batch_size": 16, "policy_kwargs": dict(RELU), "seed": 0} | kwargs
    return SAC("MlpPolicy", env, device="cpu", **kwargs)


def kill(model, units=DEAD):
    """Make these units of every hidden layer dead for good, in the target network as well."""
    nets = [model.q_net, model.q_net_target] if isinstance(model, DQN) else [model.policy]
    names = ["q_net.0", "q_net.2"] if isinstance(model, DQN) else GROUPS
    with torch.no_grad():
        for net in nets:
            for name in names:
                net.get_submodule(name).bias[units] = -1e3
    return model


def lift(model):
    """Keep every hidden unit alive."""
    with torch.no_grad():
        for name in GROUPS:
            model.policy.get_submodule(name).bias.fill_(1.0 if name.endswith(".0") else 30.0)
    return model


def recycler(**kwargs):
    return RecycleCallback(**({"every": 128, "sample_every": 1} | kwargs))


def everything(model):
    """All that training has made: weights, optimizer state, random numbers, rewards."""
    optimizer = model.policy.optimizer.state_dict()["state"]
    return {
        "weights": {k: v.clone() for k, v in model.policy.state_dict().items()},
        "optimizer": {(i, k): torch.as_tensor(v).clone() for i, s in optimizer.items() for k, v in s.items()},
        "torch": {"state": torch.get_rng_state()},
        "numpy": {"state": torch.tensor(np.random.get_state()[1].astype(np.int64))},
        "actions": {"next": torch.tensor(np.array([model.action_space.sample() for _ in range(4)]))},
        "rewards": {"episodes": torch.tensor([[e["r"], e["l"]] for e in model.ep_info_buffer])},
        "clock": {"steps": torch.tensor([model.num_timesteps, model._n_updates])},
        "seen": {"last": torch.as_tensor(model._last_obs)},
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        for key, value in one[part].items():
            assert torch.equal(value, other[part][key]), (part, key)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def hooks(model):
    net = model.q_net if isinstance(model, DQN) else model.policy
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())
    return count + len(model.policy.optimizer._optimizer_step_pre_hooks)


class Probe(BaseCallback):
    """Notes what it is asked to at every rollout start: ``look(model)``."""

    def __init__(self, look, at="rollout_start"):
        super().__init__()
        self.look, self.at, self.seen = look, at, []

    def _note(self, moment):
        if self.at in (moment, "always"):
            self.seen.append((moment, self.model.num_timesteps, self.look(self.model)))

    def _on_rollout_start(self):
        self._note("rollout_start")

    def _on_rollout_end(self):
        self._note("rollout_end")

    def _on_step(self):
        self._note("step")
        return True

    def _on_training_end(self):
        self._note("training_end")


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


# Watching changes nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "steps"),
    [(ppo, 512), (dqn, 400), (lambda: dqn(tau=0.1, target_update_interval=1), 400), (lambda: ppo("Pendulum-v1"), 256)],
    ids=["ppo", "dqn", "dqn-polyak", "ppo-box"],
)
def test_monitor_leaves_training_bit_identical(make, steps):
    plain = make().learn(steps)
    alone = everything(plain)
    watch = recycler(method="monitor")
    watched = make().learn(steps, callback=watch)
    assert_same(alone, everything(watched))
    assert sum(g.samples for r in watch.reports for part in r.values() for g in part.groups.values()) > 0


@pytest.mark.parametrize("method", ["split", "mirror", "redo"])
def test_with_nothing_dead_every_method_leaves_training_bit_identical(method):
    kwargs = {"tau": 0.0} if method == "redo" else {}
    alone = everything(lift(ppo()).learn(384))
    callback = recycler(method=method, method_kwargs=kwargs)
    other = lift(ppo()).learn(384, callback=callback)
    assert [r["policy"].fraction("dead") for r in callback.reports] == [0] * 3
    assert [r["policy"].recycled for r in callback.reports] == [0] * len(callback.reports)
    assert_same(alone, everything(other))


def test_methods_act_together_by_their_names(tmp_path):
    """Whole layers change on the schedule of the recyclers, and are logged beside them."""
    options = {"layer_reset.last": 1, "redo.tau": 0.1}
    callback = recycler(method="redo+layer_reset", method_kwargs=options, every=64, edits=tmp_path / "edits.jsonl")
    model = dqn()
    before = model.q_net.q_net[-1].weight.detach().clone()
    model.learn(400, callback=callback)
    assert [type(m).__name__ for m in callback.method] == ["ReDo", "LayerReset"] and callback.method[0].tau == 0.1
    made = [i for line in lines(tmp_path / "edits.jsonl") for i in line.get("interventions", ())]
    assert made and all(i == {"edit": "Renew", "layers": ["q_net.4"], "weights": True} for i in made)
    assert not torch.equal(before, model.q_net.q_net[-1].weight)
    nested = recycler(method=["redo", "layer_reset"], method_kwargs={"redo": {"tau": 0.1}, "layer_reset": {"last": 1}})
    assert nested.method == callback.method


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("redo+cbp", {}, "both edit single units"),
        ("redo+l2_int", {}, "did you mean 'l2_init'"),
        ("redo+l2_init", {"tau": 0.1}, r"options say whose they are \(redo.NAME\), got 'tau'"),
        ("redo+l2_init", {"cbp.rate": 0.1}, "got 'cbp.rate'"),
        ("redo+l2_init", {"redo.strength": 0.1}, "method 'redo' has no option"),
    ],
)
def test_methods_that_do_not_go_together_are_refused_at_once(method, options, reason):
    with pytest.raises(ValueError, match=reason):
        recycler(method=method, method_kwargs=options)


@pytest.mark.parametrize("method", ["l2_init", "shrink_perturb", "layer_reset"])
def test_a_model_with_whole_network_methods_goes_on_where_it_was_saved(tmp_path, method):
    def run(model, path):
        model.learn(256, callback=recycler(method=method, every=64, edits=path), reset_num_timesteps=False)
        return model

    whole = run(run(ppo(), tmp_path / "whole.jsonl"), tmp_path / "whole.jsonl")
    part = run(ppo(), tmp_path / "part.jsonl")
    part.save(tmp_path / "model")
    state = part.recycle_state["recyclers"]["policy"]
    loaded = PPO.load(tmp_path / "model", env=part.env)
    assert len(loaded.recycle_state["recyclers"]["policy"]["anchors"]) == (method == "l2_init")
    if method == "l2_init":
        start = dict(ppo().policy.named_parameters())
        assert (
            all(torch.equal(v, start[k]) for k, v in state["anchors"][0].items()) and "log_std" not in state["anchors"]
        )
    again = run(loaded, tmp_path / "part.jsonl")
    assert whole.num_timesteps == again.num_timesteps == 512
    made = [lines(tmp_path / f"{name}.jsonl") for name in ("whole", "part")]
    assert [line.get("interventions") for line in made[0]] == [line.get("interventions") for line in made[1]]


@pytest.mark.parametrize(("make", "kind", "name"), [(ppo, PPO, "policy"), (dqn, DQN, "q_net")])
def test_an_injected_model_is_saved_loaded_and_goes_on(tmp_path, make, kind, name):
    model = make()
    first = recycler(method="plasticity_injection", every=64)
    model.learn(200, callback=first)
    assert sum(len(reports[name].interventions) for reports in first.reports) == 1
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=model.env)
    assert algorithm_of(load_from_zip_file(tmp_path / "model")[0]) is kind
    assert_same({"weights": state(model.policy)}, {"weights": state(loaded.policy)})
    one, other = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert one.keys() == other.keys() and all(torch.equal(one[i][k], other[i][k]) for i in one for k in one[i])
    trained = {n for n, p in model.policy.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in loaded.policy.named_parameters() if p.requires_grad}
    assert any(".new." in n for n in trained) and not any(".old." in n or ".twin." in n for n in trained)
    before = {n: p.detach().clone() for n, p in loaded.policy.named_parameters()}
    second = recycler(method="plasticity_injection", every=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its state is used
        loaded.learn(200, callback=second, reset_num_timesteps=False)
    assert not any(reports[name].interventions for reports in second.reports)
    moved = {n for n, p in loaded.policy.named_parameters() if not torch.equal(p, before[n]) and "target" not in n}
    assert moved == {n for n in trained if "target" not in n}


def test_injection_is_refused_where_every_parameter_is_differentiated():
    contrib = pytest.importorskip("sb3_contrib")
    model = contrib.TRPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
    with pytest.raises(ValueError, match="TRPO differentiates by every parameter"):
        recycler(method="plasticity_injection").prepare(model)


@pytest.mark.parametrize(("make", "names"), [(ppo, ["policy"]), (dqn, ["q_net"]), (sac, ["actor", "critic"])])
def test_jumps_of_the_output_are_logged_and_change_nothing(tmp_path, make, names):
    models, states, folders = [], [], [tmp_path / "with", tmp_path / "without"]
    for jumps, folder in zip((True, False), folders, strict=True):
        model = make()
        model.set_logger(configure(str(folder), ["csv"]))
        model.learn(300, callback=recycler(method="monitor", every=128, jumps=jumps))
        models.append(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert not torch.equal(flat(models[0]), flat(make()))
    assert_same({"weights": state(models[0].policy)}, {"weights": state(models[1].policy)})
    found = [line for line in lines(folders[0] / "edits.jsonl") if "jumps" in line]
    assert {line["network"] for line in found} == set(names)
    for name in names:
        seen = [line["jumps"] for line in found if line["network"] == name]
        assert all(jump["0"] == 0 for jump in seen if "0" in jump)  # monitor
        assert max(jump.get("5", 0) for jump in seen) > 0  # learning
    header = (folders[0] / "progress.csv").read_text().splitlines()[0].split(",")
    assert f"recycle/{names[0]}/jump_5" in header
    assert not any("jumps" in line for line in lines(folders[1] / "edits.jsonl"))


def test_jumps_go_on_with_a_loaded_model(tmp_path):
    model = ppo(n_epochs=4)
    model.learn(128, callback=recycler(method="redo", every=64, jumps=True))  # the event at 64, and 8 updates
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=model.env)
    callback = recycler(method="redo", every=64, jumps=True)
    loaded.learn(128, callback=callback, reset_num_timesteps=False)
    assert callback.reports[0]["policy"].jumps.keys() == {0, 5}


def test_recent_observations_are_those_of_the_buffers():
    model = ppo()
    kept = []
    model.learn(
        64, callback=Probe(lambda m: kept.append(recent(m)) or m.rollout_buffer.observations.copy(), "rollout_end")
    )
    probe = kept[-1]
    assert probe.shape == (64, 4)
    model = dqn(env=make_vec_env("CartPole-v1", n_envs=3))
    model.learn(60)
    found = recent(model, most=10)
    rows = model.replay_buffer.observations[: model.replay_buffer.pos].reshape(-1, 4)
    assert found.shape == (10, 4) and all((rows == row.numpy()).all(1).any() for row in found)


def test_attach_watches_and_never_changes():
    alone = everything(ppo().learn(256))
    model = ppo()
    found = attach(model, sample_every=1)
    model.learn(256)
    assert_same(alone, everything(model))
    assert list(found) == ["policy"]
    report = found["policy"].report()
    assert {g.samples for g in report.groups.values()} == {4 * 2 * 64}  # rollouts, epochs, samples of each


# When it acts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "name"), [(ppo, "policy"), (dqn, "q_net")])
def test_weights_change_at_rollout_starts_only(make, name):
    before, after = Probe(flat, "always"), Probe(flat, "always")
    callback = recycler(method="random", method_kwargs={"count": 2})
    make().learn(512, callback=CallbackList([before, callback, after]))
    changed = [
        (moment, step)
        for (moment, step, old), (_, _, new) in zip(before.seen, after.seen, strict=True)
        if not torch.equal(old, new)
    ]
    recycled = [r[name].recycled for r in callback.reports]
    assert {moment for moment, _ in changed} == {"rollout_start"}
    assert len(changed) == sum(r > 0 for r in recycled) == 3
    assert [step for _, step in changed] == [128, 256, 384]


def rollout_starts(total, chunk, every):
    """Steps at which an event is due: the first rollout start at least ``every`` steps after the last one."""
    last, found = 0, []
    for start in range(0, total, chunk):
        if start - last >= every:
            last = start
            found.append(start)
    return found


@pytest.mark.parametrize(("n_envs", "every"), [(1, 64), (1, 100), (1, 1), (4, 256), (4, 300)])
def test_the_schedule_counts_environment_steps_of_all_copies(tmp_path, n_envs, every):
    model = ppo(make_vec_env("CartPole-v1", n_envs, seed=0), n_steps=32)
    total = 32 * n_envs * 8
    model.learn(total, callback=recycler(method="monitor", every=every, edits=tmp_path / "edits.jsonl"))
    wanted = rollout_starts(total, 32 * n_envs, every)
    assert wanted and [line["step"] for line in lines(tmp_path / "edits.jsonl")] == [*wanted, total]


def test_dqn_keeps_the_schedule_with_several_copies(tmp_path):
    model = dqn(make_vec_env("CartPole-v1", 4, seed=0))  # a rollout is 4 steps of each copy
    model.learn(320, callback=recycler(every=50, method="monitor", edits=tmp_path / "edits.jsonl"))
    assert [line["step"] for line in lines(tmp_path / "edits.jsonl")] == [64, 128, 192, 256, 320]


def test_before_warmup_events_only_report(tmp_path):
    path = tmp_path / "edits.jsonl"
    callback = recycler(method="redo", every=64, warmup=200, edits=path)
    kill(ppo()).learn(384, callback=callback)
    got = {line["step"]: sum(g["recycled"] for g in line["groups"].values()) for line in lines(path)}
    assert list(got) == [64, 128, 192, 256, 320, 384]
    assert got[64] == got[128] == got[192] == 0 and got[256] >= 4 * len(DEAD)
    assert all(line["groups"][GROUPS[0]]["dead"] >= 3 / 16 for line in lines(path)[:4])


def test_cap_and_cooldown(tmp_path):
    callback = recycler(method="random", method_kwargs={"count": 8}, every=64, cap=0.25, cooldown=2)
    ppo().learn(320, callback=callback)
    for report in (r["policy"] for r in callback.reports[:-1]):
        for name in GROUPS:
            slots = [s for group, edit in report.edits if group == name for s in edit.slots]
            assert len(slots) <= 4 and report.groups[name].recycled == len(slots)
    for name in GROUPS:
        slots = [{s for g, e in r["policy"].edits if g == name for s in e.slots} for r in callback.reports[:-1]]
        assert len(slots) == 4
        for earlier in range(4):
            for later in range(earlier + 1, min(earlier + 3, 4)):
                assert not slots[earlier] & slots[later]


@pytest.mark.parametrize(
    "bad",
    [
        {"every": 0},
        {"warmup": -1},
        {"cap": 0},
        {"cap": 1.5},
        {"cooldown": -1},
        {"sample_every": 0},
        {"keep_reports": 0},
    ],
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=rf"\b{next(iter(bad))}\b"):
        RecycleCallback(**bad)


@pytest.mark.parametrize("bad", [{"every": "10"}, {"keep_reports": "10"}, {"keep_reports": None}, {"jumps": 1}])
def test_options_of_another_kind_are_refused(bad):
    with pytest.raises(TypeError, match=rf"\b{next(iter(bad))}\b"):
        RecycleCallback(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "splitt"}, "did you mean 'split'"),
        ({"method": "nowhere:Method"}, "no method 'nowhere:Method'"),
        ({"method": "redo", "method_kwargs": {"noise": 1}}, "'redo' has no option 'noise': there are tau, score"),
        ({"method": "redo", "method_kwargs": {"tau": -1}}, "tau >= 0"),
    ],
)
def test_unknown_methods_and_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        RecycleCallback(**options)


# What an event does to training --------------------------------------------------------------------------------


def log_ratio(model):
    """Largest |log ratio| of the rollout's actions under the policy of now: 0 before the first minibatch."""
    buffer = model.rollout_buffer
    obs = torch.as_tensor(buffer.observations.reshape(-1, *buffer.obs_shape))
    actions = torch.as_tensor(buffer.actions.reshape(-1, *buffer.actions.shape[2:]))
    model.policy.set_training_mode(True)
    with torch.no_grad():
        chosen = actions.long().flatten() if isinstance(model.action_space, gym.spaces.Discrete) else actions
        _, log_prob, _ = model.policy.evaluate_actions(obs, chosen)
    return float((log_prob - torch.as_tensor(buffer.log_probs.flatten())).abs().max())


@pytest.mark.parametrize("method", [*METHODS, "monitor"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_ratio_of_the_first_minibatch_is_one(method, env):
    probe = Probe(log_ratio, "rollout_end")
    callback = recycler(method=method, every=64)
    kill(ppo(env)).learn(256, callback=CallbackList([callback, probe]))
    assert len(probe.seen) == 4
    assert all(abs(np.expm1(ratio)) <= 1e-5 for _, _, ratio in probe.seen)
    recycled = sum(r["policy"].recycled for r in callback.reports)
    assert recycled >= 4 * len(DEAD) if method != "monitor" else recycled == 0


@pytest.mark.parametrize("method", ["split", "mirror", "redo"])
def test_ppo_says_the_same_before_and_after_an_exact_event(method):
    def probabilities(model):
        with torch.no_grad():
            return model.policy.get_distribution(seen).distribution.probs, model.policy.predict_values(seen)

    seen = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    before, after = Probe(probabilities), Probe(probabilities)
    kwargs = {"noise": 0.0} if method == "split" else {"tau": 0.0}
    callback = recycler(method=method, method_kwargs=kwargs, every=64)
    kill(ppo()).learn(128, callback=CallbackList([before, callback, after]))
    assert callback.reports[0]["policy"].recycled >= 12
    for old, new in zip(before.seen[1][2], after.seen[1][2], strict=True):
        assert torch.allclose(old, new, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_hard_target_is_left_alone(method):
    before, after = Probe(lambda m: state(m.q_net_target)), Probe(lambda m: state(m.q_net_target))
    online = Probe(lambda m: flat(m))
    callback = recycler(method=method, every=100)
    kill(dqn(target_update_interval=10_000)).learn(240, callback=CallbackList([before, online, callback, after]))
    assert callback.reports[0]["q_net"].recycled >= 2 * len(DEAD)
    for (_, _, old), (_, _, new) in zip(before.seen, after.seen, strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)


def split_by_hand(weights, edits):
    """Plain splits (share 1/2, no noise) of a DQN's layers, written out."""
    weights = {k: v.clone() for k, v in weights.items()}
    following = {"q_net.0": "q_net.2", "q_net.2": "q_net.4"}
    for name, edit in edits:
        for parent, slot in zip(edit.parents, edit.into, strict=True):
            weights[f"{name}.weight"][slot] = weights[f"{name}.weight"][parent]
            weights[f"{name}.bias"][slot] = weights[f"{name}.bias"][parent]
            columns = weights[f"{following[name]}.weight"]
            columns[:, slot] = columns[:, parent] * 0.5
            columns[:, parent] = columns[:, parent] * 0.5
    return weights


def test_a_polyak_target_gets_the_same_edit_of_its_own_weights():
    before = Probe(lambda m: (state(m.q_net), state(m.q_net_target)))
    after = Probe(lambda m: (state(m.q_net), state(m.q_net_target)))
    callback = recycler(method="split", method_kwargs={"noise": 0.0}, every=100)
    model = kill(dqn(tau=0.05, target_update_interval=1, learning_rate=1e-3))
    model.learn(140, callback=CallbackList([before, callback, after]))
    edits = callback.reports[0]["q_net"].edits
    assert {name for name, _ in edits} == {"q_net.0", "q_net.2"}
    assert all(isinstance(edit, recycle.Split) for _, edit in edits)
    index = next(i for i, (_, step, _) in enumerate(before.seen) if step == 100)
    (online, target), (online_after, target_after) = before.seen[index][2], after.seen[index][2]
    assert not torch.equal(online["q_net.0.weight"], target["q_net.0.weight"])  # the target lags behind
    for old, new in ((online, online_after), (target, target_after)):
        wanted = split_by_hand(old, edits)
        assert all(torch.equal(wanted[k], new[k]) for k in wanted)


def test_a_unit_that_lives_in_the_polyak_target_waits():
    model = kill(dqn(tau=1e-6, target_update_interval=1))
    with torch.no_grad():
        model.q_net_target.get_submodule("q_net.0").bias[1] = 1.0
    callback = recycler(method="redo", method_kwargs={"tau": 0.0}, every=100)
    model.learn(140, callback=callback)
    report = callback.reports[0]["q_net"]
    slots = {slot for name, edit in report.edits if name == "q_net.0" for slot in edit.slots}
    assert 1 not in slots and {3, 5} <= slots
    assert "still alive in the target" in report.groups["q_net.0"].note


@pytest.mark.parametrize(("kind", "initial"), [(torch.optim.RMSprop, 0.0), (RMSpropTFLike, 1.0)])
def test_fresh_units_of_a2c_begin_with_their_optimizers_own_state(kind, initial):
    def look(model):
        weight = model.policy.get_submodule(GROUPS[1]).weight
        held = model.policy.optimizer.state.get(weight)
        return None if held is None else held["square_avg"].clone()

    kwargs = RELU | {"optimizer_class": kind, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
    model = A2C("MlpPolicy", "CartPole-v1", n_steps=16, policy_kwargs=kwargs, use_rms_prop=False, seed=0, device="cpu")
    before, after = Probe(look), Probe(look)
    callback = recycler(method="redo", method_kwargs={"tau": 0.0}, every=64)
    kill(model).learn(80, callback=CallbackList([before, callback, after]))
    assert before.seen[4][1] == 64 and callback.reports[0]["policy"].recycled >= 12
    old, new = before.seen[4][2], after.seen[4][2]
    recycled = [s for name, e in callback.reports[0]["policy"].edits if name == GROUPS[1] for s in e.slots]
    above = [s for name, e in callback.reports[0]["policy"].edits if name == GROUPS[0] for s in e.slots]
    assert set(DEAD) <= set(recycled)
    assert torch.equal(new[recycled], torch.full((len(recycled), 16), initial))
    kept = [i for i in range(16) if i not in recycled]
    columns = [i for i in range(16) if i not in above]
    assert torch.equal(new[kept][:, columns], old[kept][:, columns])
    assert torch.equal(new[kept][:, above], torch.full((len(kept), len(above)), initial))


@pytest.mark.parametrize("make", [ppo, dqn])
def test_newborns_begin_as_the_models_builder_would_have_them(make):
    name = GROUPS[1] if make is ppo else "q_net.2"

    def look(model):
        layer = (model.policy if make is ppo else model.q_net).get_submodule(name)
        return layer.weight.detach()[DEAD].clone(), layer.bias.detach()[DEAD].clone()

    probe = Probe(look)
    callback = recycler(method="redo", method_kwargs={"tau": 0.0}, every=64, include=[name])
    kill(make()).learn(128, callback=CallbackList([callback, probe]))
    weight, bias = next(seen for _, step, seen in probe.seen if step == 64)
    if make is ppo:  # orthogonal, with gain sqrt(2) and no bias
        assert torch.allclose(weight @ weight.T, 2 * torch.eye(3), atol=1e-5)
        assert torch.equal(bias, torch.zeros(3))
    else:  # uniform in +-1/sqrt(16)
        assert weight.abs().max() <= 0.25 and bias.abs().max() <= 0.25
        assert weight.std() == pytest.approx(0.25 / 3**0.5, rel=0.25)


def test_recycled_units_live_again():
    callback = recycler(method="redo", every=128)
    kill(ppo(learning_rate=1e-4)).learn(384, callback=callback)
    first, second = callback.reports[0]["policy"], callback.reports[1]["policy"]
    for name in (GROUPS[0], GROUPS[2]):
        assert first.groups[name].dead == pytest.approx(3 / 16) and first.groups[name].recycled >= 3
        assert first.groups[name].dead_after == 0 and second.groups[name].dead == 0


# Hooks, and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ppo, dqn])
def test_learn_twice_hooks_once_and_leaves_no_hook(make):
    model, probe = make(), Probe(hooks)
    callback = recycler()
    assert hooks(model) == 0
    model.learn(128, callback=CallbackList([callback, probe]))
    assert hooks(model) == 0
    once = {count for _, _, count in probe.seen}
    model.learn(128, callback=CallbackList([callback, probe]), reset_num_timesteps=False)
    assert {count for _, _, count in probe.seen} == once and len(once) == 1 and min(once) > 0
    assert hooks(model) == 0


def test_an_interrupted_learn_does_not_hook_twice():
    class Stop(BaseCallback):
        def _on_step(self):
            raise KeyboardInterrupt

    model, callback, probe = ppo(), recycler(), Probe(hooks)
    model.learn(64, callback=CallbackList([callback, probe]))
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, callback=CallbackList([callback, Stop()]))
    model.learn(64, callback=CallbackList([callback, probe]))
    assert len({count for _, _, count in probe.seen}) == 1
    assert hooks(model) == 0


class Break(BaseCallback):
    """Ctrl-C at a step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.num_timesteps == self.at:
            raise KeyboardInterrupt
        return True


WIDEN = "tests.agents.test_elastic:Widen"


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("make", [ppo, dqn])
def test_after_an_interrupt_a_model_is_saved_and_goes_on(make, same, tmp_path):
    model, callback = make(), recycler(method=WIDEN, every=32)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10_000, callback=[callback, Break(300)])
    assert hooks(model) > 0
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True))
    assert hooks(loaded) == 0
    following = callback if same else recycler(method=WIDEN, every=32)
    for one in (loaded, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.learn(300, callback=following, reset_num_timesteps=False)
        assert hooks(one) == 0
        (latest,) = following.reports[-1].values()
        assert all(group.samples for group in latest.groups.values())


def test_an_interrupt_between_two_layers_leaves_a_model_that_can_be_saved(tmp_path, monkeypatch):
    model, callback = ppo(), recycler(method=WIDEN, every=128)
    model.learn(128, callback=callback)
    applied = recycle.editing.apply

    def interrupted(edit, group, **kwargs):
        if group.name.endswith("value_net.0"):
            raise KeyboardInterrupt
        applied(edit, group, **kwargs)

    monkeypatch.setattr(recycle.editing, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(256, callback=callback, reset_num_timesteps=False)
    monkeypatch.undo()
    widths = [layer.out_features for layer in model.policy.mlp_extractor.modules() if isinstance(layer, nn.Linear)]
    assert widths == [18, 15, 16, 16]  # the actor's layers have changed, the critic's have not
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True))
    with pytest.warns(UserWarning, match="statistics begin anew"):
        model.learn(256, callback=callback, reset_num_timesteps=False)
    assert hooks(model) == 0 and callback.reports[-1]["policy"].groups


def test_another_watcher_of_a_resized_model_stops_and_says_so():
    model = ppo()
    other = attach(model, sample_every=1)["policy"]
    with pytest.warns(UserWarning, match=r"a tracker stops watching: .*was resized by something other than") as said:
        model.learn(512, callback=recycler(method=WIDEN, every=128))
    assert sum("stops watching" in str(warning.message) for warning in said) == 1
    report = other.report()
    assert all("trace again and attach a new tracker" in group.note for group in report.groups.values())
    assert other.step().edits == () and hooks(model) == 0
    again = attach(model, sample_every=1)["policy"]
    model.learn(128)
    assert all(group.samples and not group.note for group in again.report().groups.values())


def test_learn_again_from_step_zero_keeps_the_schedule(tmp_path):
    model, callback = ppo(), recycler(method="monitor", edits=tmp_path / "edits.jsonl")
    model.learn(256, callback=callback)
    model.learn(256, callback=callback)  # the clock starts at 0 again, and the event due at 256 comes first
    assert [line["step"] for line in lines(tmp_path / "edits.jsonl")] == [128, 256, 0, 128, 256]


def test_chunks_shorter_than_the_interval_add_up():
    model, callback = ppo(), recycler(method="monitor", every=256)
    for _ in range(6):
        model.learn(128, callback=callback)  # each counts from 0 again
    edited = [report["policy"].event for report in callback.reports]
    assert len(edited) == 6 + 2  # the last look of each learn, and an event before the third and the fifth


def test_one_callback_for_two_models_watches_the_second():
    callback = recycler(method="monitor")
    first, second = ppo(), ppo(seed=1)
    first.learn(128, callback=callback)
    second.learn(128, callback=callback)
    assert callback.recyclers["policy"].graph.module is second.policy
    assert hooks(first) == hooks(second) == 0


def test_an_event_callback_around_it_is_warned_about():
    wrapped = EveryNTimesteps(64, callback=recycler())
    with pytest.warns(UserWarning, match="EveryNTimesteps forwards no rollout events"):
        ppo().learn(64, callback=wrapped)


def test_a_replaced_train_is_refused_and_nothing_hooked():
    model = ppo()
    train = model.train
    model.train = lambda: train()
    with pytest.raises(ValueError, match=r"model\.train has been replaced"):
        model.learn(64, callback=recycler())
    assert hooks(model) == 0 and model.num_timesteps == 0


def test_tanh_is_said_once_and_saturated_units_are_reported():
    model = ppo(policy_kwargs={"net_arch": [16, 16]})
    with torch.no_grad():
        model.policy.get_submodule(GROUPS[0]).bias[:4] = 1e3  # tanh of it is 1, whatever comes in
        model.policy.get_submodule(GROUPS[3]).bias[:2] = -1e3
    callback = recycler(method="monitor")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.learn(128, callback=callback)
        model.learn(128, callback=callback)
    assert sum("Tanh" in str(w.message) and "constant and saturated" in str(w.message) for w in told) == 1
    groups = callback.reports[0]["policy"].groups
    assert [groups[name].constant for name in GROUPS] == [0.25, 0, 0, 0.125]
    assert [groups[name].saturated for name in GROUPS] == [0.25, 0, 0, 0.125]


def test_relu_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppo().learn(64, callback=recycler())


def test_include_and_exclude():
    for options, wanted in (
        ({"include": ["mlp_extractor.policy_net"]}, GROUPS[:2]),
        ({"exclude": ["mlp_extractor.policy_net"]}, GROUPS[2:]),
        ({"include": ["mlp_extractor"], "exclude": [GROUPS[1]]}, [GROUPS[0], *GROUPS[2:]]),
        ({"include": [GROUPS[3]]}, GROUPS[3:]),
    ):
        callback = recycler(method="redo", every=64, **options)
        model = kill(ppo())
        model.learn(128, callback=callback)
        report = callback.reports[0]["policy"]
        assert list(report.groups) == wanted
        assert {name for name, _ in report.edits} == set(wanted)


@pytest.mark.parametrize("options", [{"include": ["policy_net"]}, {"exclude": ["mlp_extractor.policy_net.1"]}])
def test_a_name_that_matches_nothing_is_refused(options):
    model = ppo()
    (name,) = next(iter(options.values()))
    with pytest.raises(ValueError, match=rf"no group is called '{name}'; .*there are mlp_extractor.policy_net.0"):
        model.learn(64, callback=recycler(**options))
    assert hooks(model) == 0


def test_nothing_to_recycle_is_refused_with_reasons():
    with pytest.raises(ValueError, match=r"nothing can be recycled in this PPO: action_net: reaches the module's out"):
        ppo(policy_kwargs={"net_arch": []}).learn(64, callback=recycler())
    sac = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": []})
    with pytest.raises(ValueError, match=r"nothing can be recycled in this SAC: mu: reaches the module's output"):
        sac.learn(1, callback=recycler())


def test_to_include_and_exclude_everything_is_refused():
    with pytest.raises(ValueError, match=r"include|exclude"):
        ppo().learn(64, callback=recycler(include=[GROUPS[0]], exclude=[GROUPS[0]]))


# The record ----------------------------------------------------------------------------------------------------


def test_only_the_latest_reports_are_kept(tmp_path):
    callback = recycler(method="monitor", every=64, edits=tmp_path / "edits.jsonl", keep_reports=2)
    ppo().learn(320, callback=callback)
    assert [reports["policy"].event for reports in callback.reports] == [4, 5]
    assert len(lines(tmp_path / "edits.jsonl")) == 5


@pytest.mark.parametrize(("make", "name"), [(ppo, "policy"), (dqn, "q_net")])
def test_every_event_is_a_line_and_two_runs_agree(tmp_path, make, name):
    texts = []
    for run in range(2):
        path = tmp_path / f"{run}.jsonl"
        callback = recycler(method="split", every=64, edits=path)
        kill(make()).learn(320, callback=callback)
        texts.append(path.read_text())
        told = lines(path)
        assert len(told) == len(callback.reports) == 5
        assert {line["network"] for line in told} == {name}
        for line, report in zip(told, callback.reports, strict=True):
            step = line.pop("step")
            assert step % 64 == 0 and line.pop("network") == name
            assert line == json.loads(json.dumps(report[name].to_dict()))
            slots = {}
            for edit in line["edits"]:
                slots.setdefault(edit["group"], set()).update(edit.get("into", edit.get("units", [])))
            assert {g: len(s) for g, s in slots.items()} == {
                g: v["recycled"] for g, v in line["groups"].items() if v["recycled"]
            }
        assert sum(sum(g["recycled"] for g in line["groups"].values()) for line in told) > 0
    assert texts[0] == texts[1]


def test_event_numbers_are_not_given_twice(tmp_path):
    path = tmp_path / "edits.jsonl"
    ppo().learn(320, callback=recycler(every=64, edits=path))
    numbers = [(line["network"], line["event"]) for line in lines(path)]
    assert len(set(numbers)) == len(numbers)


def test_without_a_path_the_lines_go_beside_the_logs(tmp_path):
    model = ppo()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = recycler()
    model.learn(256, callback=callback)
    assert len(lines(tmp_path / "edits.jsonl")) == len(callback.reports) == 2


def test_totals_count_every_recycled_unit_once():
    callback = recycler(method="redo", every=64)
    model = kill(ppo())
    model.learn(256, callback=callback)
    counted = model.recycle_state["totals"]["policy"]
    assert counted["recycled"] == sum(r["policy"].recycled for r in callback.reports) >= 12
    assert counted["re_died"] == sum(r["policy"].re_died for r in callback.reports[:-1])


def test_evaluation_passes_do_not_count(tmp_path):
    counts, ends = [], []
    for evaluated in (False, True):
        callback = recycler(method="redo", every=64)
        beside = [callback]
        if evaluated:
            env = Monitor(gym.make("CartPole-v1"))
            best = str(tmp_path / "best")
            beside.append(EvalCallback(env, eval_freq=20, n_eval_episodes=2, best_model_save_path=best, verbose=0))
            beside.append(CheckpointCallback(64, str(tmp_path / "checkpoints")))
        model = kill(ppo()).learn(256, callback=CallbackList(beside))
        counts.append([g.samples for r in callback.reports for g in r["policy"].groups.values()])
        ends.append((everything(model)["weights"], [r["policy"].to_json() for r in callback.reports]))
    assert counts[0] == counts[1] == [128] * 16  # 64 samples in each of 2 epochs, four layers, four windows
    assert all(torch.equal(ends[0][0][k], ends[1][0][k]) for k in ends[0][0])
    assert ends[0][1] == ends[1][1]
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"rl_model_{n}_steps.zip" for n in sorted((64, 128, 192, 256), key=str)]
    middle = PPO.load(tmp_path / "checkpoints" / "rl_model_192_steps.zip", device="cpu")
    assert middle.recycle_state["recyclers"]["policy"]["events"] == 2  # those of steps 64 and 128


# Saving and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "kind", "name"), [(ppo, PPO, "policy"), (dqn, DQN, "q_net")])
def test_the_state_travels_with_the_model(tmp_path, make, kind, name):
    model, callback = kill(make()), recycler(method="redo", every=64)
    model.learn(256, callback=callback)
    model.save(tmp_path / "model.zip")
    loaded = kind.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    seen = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    assert np.array_equal(model.predict(seen, deterministic=True)[0], loaded.predict(seen, deterministic=True)[0])
    assert all(torch.equal(v, loaded.policy.state_dict()[k]) for k, v in model.policy.state_dict().items())
    assert loaded.recycle_state["totals"] == model.recycle_state["totals"]
    before = model.recycle_state["recyclers"][name]
    after = loaded.recycle_state["recyclers"][name]
    assert after["events"] == before["events"] == len(callback.reports) == 4  # the last one at the end of training
    assert torch.equal(after["generator"], before["generator"])
    assert all(torch.equal(before["recycled_at"][k], after["recycled_at"][k]) for k in before["recycled_at"])

    again = recycler(method="redo", every=64, seed=9, edits=tmp_path / "edits.jsonl")
    loaded.learn(256, callback=again, reset_num_timesteps=False)
    told = lines(tmp_path / "edits.jsonl")
    assert [line["step"] for line in told][:2] == [256, 320]  # the last event before saving was at step 192
    assert again.reports[0][name].event == 5
    total = loaded.recycle_state["totals"][name]["recycled"]
    assert total == model.recycle_state["totals"][name]["recycled"] + sum(r[name].recycled for r in again.reports)


def test_going_on_with_the_same_callback_and_with_a_loaded_model_is_the_same(tmp_path):
    """The windows, ages and generator in the zip are those of the callback that stays in memory."""
    reports = []
    for reload in (False, True):
        model, callback = kill(ppo()), recycler(method="split", every=100)
        model.learn(256, callback=callback)
        if reload:
            model.save(tmp_path / "model.zip")
            model = PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
            callback = recycler(method="split", every=100)
        torch.manual_seed(1)
        np.random.seed(1)
        model.get_env().seed(1)
        model.action_space.seed(1)
        model._last_obs = None
        model.learn(256, callback=callback, reset_num_timesteps=False)
        reports.append([r["policy"].to_json() for r in callback.reports[-3:]])
    assert reports[0] == reports[1]


def test_a_plain_load_needs_none_of_our_modules(tmp_path):
    model = kill(ppo())
    model.learn(128, callback=recycler(every=64))
    model.save(tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        data = json.loads(file.read("data"))
    assert "recycle_state" in data
    for entry in data.values():
        if isinstance(entry, dict) and ":serialized:" in entry:
            raw = base64.b64decode(entry[":serialized:"])
            assert b"agents" not in raw and b"recycle.recycler" not in raw and b"recycle.track" not in raw
    hidden = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition(".")[0] in ("agents", "recycle")}
    sys.modules["agents"] = sys.modules["recycle"] = None  # importing either is an error now
    try:
        loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    finally:
        del sys.modules["agents"], sys.modules["recycle"]
        sys.modules.update(hidden)
    assert torch.equal(flat(loaded), flat(model))


def test_a_state_of_other_groups_is_not_a_dead_end(tmp_path):
    """A loaded model may be watched more narrowly than before: the state of other groups is started afresh."""
    model = kill(ppo())
    model.learn(128, callback=recycler(every=64))
    callback = recycler(every=64, include=["mlp_extractor.policy_net"])
    model.learn(128, callback=callback, reset_num_timesteps=False)
    assert list(callback.reports[0]["policy"].groups) == GROUPS[:2]


def test_dummy_and_subproc_envs_tell_the_same_story(tmp_path):
    texts = []
    for kind in (DummyVecEnv, SubprocVecEnv):
        env = make_vec_env("CartPole-v1", 2, seed=0, vec_env_cls=kind)
        path = tmp_path / f"{kind.__name__}.jsonl"
        kill(ppo(env)).learn(512, callback=recycler(method="mirror", edits=path))
        env.close()
        texts.append(path.read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 4
    assert json.loads(texts[0].splitlines()[0])["groups"][GROUPS[0]]["recycled"] >= 3


# The constructor -----------------------------------------------------------------------------------------------

ZOO = """
CartPole-v1:
  n_timesteps: !!float 256
  callback:
    - agents.RecycleCallback:
        method: redo
        method_kwargs: {tau: 0.1}
        every: 128
        include: [mlp_extractor.policy_net]
"""


def test_it_can_be_built_from_an_rl_zoo_file():
    (entry,) = yaml.safe_load(ZOO)["CartPole-v1"]["callback"]
    ((path, kwargs),) = entry.items()
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules[module], name)
    callback = kind(**kwargs)
    ppo().learn(256, callback=callback)
    assert len(callback.reports) == 2 and list(callback.reports[0]["policy"].groups) == GROUPS[:2]
    parameters = list(inspect.signature(kind).parameters.values())
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    with pytest.raises(TypeError):
        kind("redo")


def test_it_copies_and_pickles_before_training():
    original = recycler(method="split", method_kwargs={"noise": 0.2}, every=64)
    results = []
    for callback in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)), original):
        kill(ppo()).learn(192, callback=callback)
        results.append([r["policy"].to_json() for r in callback.reports])
    assert results[0] == results[1] == results[2] and len(results[0]) == 3


# TensorBoard and the table on the terminal ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    model, callback = kill(ppo()), recycler(method="redo", every=64)
    model.set_logger(configure(str(folder), ["tensorboard", "csv"]))
    model.learn(256, callback=callback)
    model.logger.close()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return callback, events


def test_tensorboard_has_totals_and_layers(logged):
    callback, events = logged
    dead = events.Scalars("recycle/policy/dead")
    assert [point.step for point in dead] == [64, 128, 192, 256]
    assert [point.value for point in dead] == pytest.approx([r["policy"].fraction("dead") for r in callback.reports])
    for name in GROUPS:
        for quantity in ("dead", "dormant", "constant", "saturated", "gradient_silent", "duplicates", "effective_rank"):
            points = events.Scalars(f"recycle/policy/{name}/{quantity}")
            wanted = [getattr(r["policy"].groups[name], quantity) for r in callback.reports]
            assert [p.value for p in points] == pytest.approx(wanted, rel=1e-6)
    recycled = [point.value for point in events.Scalars("recycle/policy/recycled")]
    assert recycled == np.cumsum([r["policy"].recycled for r in callback.reports]).tolist()
    assert [p.step for p in events.Scalars("recycle/policy/re_died")] == [64, 128, 192, 256]


def test_tensorboard_has_ages_and_firing_rates(logged):
    _, events = logged
    for name in GROUPS:
        for quantity in ("age", "firing_rate"):
            points = events.Histograms(f"recycle/policy/{name}/{quantity}")
            assert [p.step for p in points] == [64, 128, 192, 256]
            assert all(p.histogram_value.num == 16 for p in points)
        first = events.Histograms(f"recycle/policy/{name}/firing_rate")[0].histogram_value
        assert first.min == 0 and first.max <= 1
    ages = events.Histograms(f"recycle/policy/{GROUPS[0]}/age")
    assert ages[0].histogram_value.min == 0  # just recycled
    assert ages[0].histogram_value.max == 4  # there since the beginning: 2 epochs of 2 minibatches


def test_tensorboard_puts_all_layers_on_one_chart(logged):
    _, events = logged
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    scalars = events.Tags()["scalars"]
    shown = {title: [t for t in scalars if any(re.match(tag, t) for tag in tags)] for title, tags in charts.items()}
    assert {"policy: dead units", "policy: dormant units"} <= set(shown)
    for title, tags in shown.items():  # a chart's tags are regular expressions: each must match its own key only
        quantity = title.split()[1]
        assert sorted(tags) == [f"recycle/policy/{name}/{quantity}" for name in GROUPS]


def test_the_table_on_the_terminal_has_totals_only(capsys, tmp_path):
    model = ppo(verbose=1, tensorboard_log=str(tmp_path))
    callback = recycler(every=64)
    model.learn(192, callback=callback)
    shown = capsys.readouterr().out
    assert "policy/dead " in shown and "policy/recycled " in shown
    assert "policy_net" not in shown and "value_net" not in shown
    assert "total_timesteps" in shown
    assert shown.count("policy/dead ") == len(callback.reports) == 3


# What might confuse it -----------------------------------------------------------------------------------------


class Poisoned(gym.Wrapper):
    """CartPole whose observation is not a number at one step of its life."""

    def __init__(self, at):
        super().__init__(gym.make("CartPole-v1"))
        self.at, self.life = at, 0

    def step(self, action):
        obs, *rest = super().step(action)
        self.life += 1
        return (np.full_like(obs, np.nan) if self.life == self.at else obs), *rest


def test_after_a_nan_nothing_is_edited_and_the_note_says_why():
    """DQN carries a NaN on without a word; its units must not be recycled by what it says."""
    callback = recycler(method="redo", every=64)
    before, after = Probe(flat), Probe(flat)
    model = kill(dqn(Poisoned(100), batch_size=64))
    model.learn(256, callback=CallbackList([before, callback, after]))
    reports = [r["q_net"] for r in callback.reports]
    assert reports[0].recycled >= 6  # before it
    poisoned = [g for r in reports for g in r.groups.values() if "NaN" in g.note]
    assert poisoned and all(g.recycled == 0 and np.isnan(g.dead) for g in poisoned)
    assert all("NaN" in g.note for g in reports[-2].groups.values())
    assert reports[-2].edits == () and json.loads(reports[-2].to_json())["groups"]["q_net.0"]["dead"] is None
    for (_, step, old), (_, _, new) in zip(before.seen, after.seen, strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)) or step == 64


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].bias[:4] = -1e3
    return net


def batches(count, size=32):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)) for _ in range(count)
    ]


def train(scaler=None, accumulate=1, method="redo", watch=True, times=1.0):
    """A plain loop of 24 updates, an event every 8; returns the network and what was reported."""
    net = network()
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    graph = recycle.trace(net, lambda: net(torch.zeros(4, 6)))
    found = recycle.Recycler(graph, recycle.find(method)(), optimizers=[adam], sample_every=1)
    reports = []
    for number, (x, y) in enumerate(batches(24 * accumulate, 32 // accumulate)):
        if watch:
            with found.listening():
                loss = nn.functional.mse_loss(net(x), y) * times / accumulate
                (scaler.scale(loss) if scaler else loss).backward()
        else:
            loss = nn.functional.mse_loss(net(x), y) * times / accumulate
            (scaler.scale(loss) if scaler else loss).backward()
        if (number + 1) % accumulate:
            continue
        if scaler:
            scaler.step(adam)
            scaler.update()
        else:
            adam.step()
        adam.zero_grad()
        if watch and (number + 1) % (8 * accumulate) == 0:
            reports.append(found.step())
    return net, reports


def test_a_gradient_scaler_does_not_confuse_it():
    """A power of two scales exactly, so the run with a scaler is the run without one, bit for bit."""
    plain, reports = train()
    scaled, same = train(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000))
    assert reports[0].groups["0"].recycled == 4 and reports[1].groups["0"].dead == 0
    assert [r.edits for r in reports] == [r.edits for r in same]
    for one, other in zip(reports, same, strict=True):
        for name in one.groups:
            for quantity in ("dead", "recycled", "samples", "gradient_silent", "re_died"):
                assert getattr(one.groups[name], quantity) == getattr(other.groups[name], quantity)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))


def test_an_overflow_under_a_gradient_scaler_does_not_confuse_it():
    """The first steps are skipped: their gradients are infinite, and must not be in any statistic."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    _, reports = train(scaler, times=16.0)
    assert 2.0**120 < scaler.get_scale() < 2.0**127
    first = reports[0].groups["0"]
    assert first.samples == 8 * 32 and first.recycled == 4 and first.gradient_silent == 0.25


def test_gradient_accumulation_does_not_confuse_it():
    watched, reports = train(accumulate=4, method="monitor")
    plain, _ = train(accumulate=4, watch=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert [r.groups["0"].samples for r in reports] == [8 * 32] * 3
    _, edited = train(accumulate=4)
    assert [r.groups["0"].recycled for r in edited] == [4, 0, 0]


def test_rows_of_the_log_stay_whole(tmp_path):
    """SB3 writes what training and the next rollout gave in one row; an event writes a row of its own."""
    rows = {}
    for name, callback in (("with", recycler(every=64)), ("without", None)):
        model = kill(ppo())
        model.set_logger(configure(str(tmp_path / name), ["csv"]))
        model.learn(320, callback=callback, log_interval=1)
        model.logger.close()
        with (tmp_path / name / "progress.csv").open(newline="") as file:
            rows[name] = list(csv.DictReader(file))
    theirs = [row for row in rows["with"] if row["time/iterations"]]
    assert len(theirs) == len(rows["without"])
    for mine, plain in zip(theirs, rows["without"], strict=True):
        filled = {key for key, value in mine.items() if value}
        assert filled == {key for key, value in plain.items() if value}
    events = [row for row in rows["with"] if not row["time/iterations"]]
    assert all(row["recycle/policy/dead"] and row["time/total_timesteps"] for row in events)
    assert len(events) == 5


def test_replay_of_another_run_network_by_network(tmp_path):
    """SAC's actor and critic are traced apart; each replays its own lines."""
    counts = {}
    for run, options in (
        ("first", {"method": "redo", "method_kwargs": {"tau": 0.3}}),
        ("second", {"method": "replay", "method_kwargs": {"path": str(tmp_path / "first.jsonl")}}),
    ):
        model = SAC(
            "MlpPolicy",
            "Pendulum-v1",
            learning_starts=20,
            tau=1.0,
            policy_kwargs={"net_arch": [16, 16]},
            seed=0,
            device="cpu",
        )
        callback = RecycleCallback(every=40, edits=tmp_path / f"{run}.jsonl", **options)
        model.learn(200, callback=callback)
        counts[run] = [
            (name, group, seen.recycled)
            for reports in callback.reports
            for name, report in reports.items()
            for group, seen in report.groups.items()
        ]
    assert counts["first"] == counts["second"]
    assert sum(n for *_, n in counts["first"]) > 0
