import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import ARS
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from agents.envs import make_env
from agents.inspect import Args, inspect, main
from recycle import metrics

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
RELU = {"net_arch": [16, 16], "activation_fn": nn.ReLU}
PI, VF = [f"mlp_extractor.policy_net.{i}" for i in (0, 2)], [f"mlp_extractor.value_net.{i}" for i in (0, 2)]
Q = ["q_net.0", "q_net.2"]


class Zip:
    """A file of which must be true that looking at it does not touch it."""

    def __init__(self, path):
        self.path, self.before = path, self.now(path)

    @staticmethod
    def now(path):
        return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns

    def untouched(self):
        return self.now(self.path) == self.before and list(self.path.parent.iterdir()) == [self.path]


def make(kind, path, dead):
    """Save a model of which ``dead`` says the number of dead units of each layer; the others always fire."""
    kwargs = {"n_steps": 64} if kind is PPO else {"buffer_size": 100} if kind is DQN else {}
    model = kind("MlpPolicy", "CartPole-v1", policy_kwargs=RELU, seed=0, device="cpu", **kwargs)
    net = model.q_net if kind is DQN else model.policy
    with torch.no_grad():
        for name, count in dead.items():
            layer = net.get_submodule(name)
            layer.bias.fill_(20.0 if name.endswith(".0") else 1e3)
            layer.bias[:count] = -1e6
    model.save(path)
    return Zip(path)


@pytest.mark.parametrize(("kind", "names"), [(PPO, [*PI, *VF]), (DQN, Q), (A2C, [*PI, *VF])], ids=["ppo", "dqn", "a2c"])
def test_the_counts_are_those_of_a_hand_made_model(tmp_path, kind, names):
    wanted = dict(zip(names, (3, 5, 0, 7), strict=False))
    saved = make(kind, tmp_path / "model.zip", wanted)
    (found,) = inspect(Args(model=saved.path, env="CartPole-v1", steps=300))
    assert [group.name for group in found.graph] == names
    for name, count in wanted.items():
        stats = found.stats(name)
        assert stats.samples == 300
        assert int(stats.dead.sum()) == count and bool(stats.dead[:count].all())
        assert metrics.dead(stats) == count / 16 and metrics.constant(stats) == 0
        assert torch.equal(stats.firing_rate, (torch.arange(16) >= count).double())
    assert saved.untouched()


def test_constant_and_duplicate_units_are_seen(tmp_path):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, policy_kwargs=RELU, seed=0, device="cpu")
    first, second = (model.policy.get_submodule(name) for name in PI)
    with torch.no_grad():
        first.bias.fill_(20.0)
        first.weight[:2], first.bias[:2] = 0.0, torch.tensor([1.0, 2.0])  # always 1, always 2
        for layer in (first, second):
            layer.weight[8], layer.bias[8] = 3 * layer.weight[7], 3 * layer.bias[7]  # a copy up to scale
    model.save(tmp_path / "model.zip")
    (found,) = inspect(Args(model=tmp_path / "model.zip", env="CartPole-v1", steps=64))
    stats = found.stats(PI[0])
    assert (stats.minimum == stats.maximum).nonzero().flatten().tolist() == [0, 1]
    assert metrics.constant(stats) == 2 / 16
    assert bool(metrics.duplicates(found.graph[PI[1]])[7:9].all())
    assert int(metrics.duplicates(found.graph[PI[1]]).sum()) == 2


def test_the_tables_say_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    saved = make(PPO, tmp_path / "model.zip", {PI[0]: 4, PI[1]: 8, VF[0]: 0, VF[1]: 12})
    assert main([str(saved.path), "--env", "CartPole-v1", "--steps", "128"]) == 0
    shown = capsys.readouterr().out
    assert "policy: units over 128 observations" in shown
    table = {}
    for line in shown.splitlines():
        cells = [cell.strip() for cell in re.split(r"[│┃|]", line) if cell.strip()]
        if cells and cells[0] in (*PI, *VF):
            table[cells[0]] = cells[1:]
    assert {name: cells[:2] for name, cells in table.items()} == {
        PI[0]: ["16", "25%"], PI[1]: ["16", "50%"], VF[0]: ["16", "0%"], VF[1]: ["16", "75%"]
    }  # fmt: skip
    assert "not recycled: action_net (reaches the module's output)" in shown
    assert saved.untouched()


@pytest.mark.parametrize("trained_with", [0, None])
def test_the_seed_decides_the_rollout(tmp_path, trained_with):
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=RELU, seed=trained_with, device="cpu")
    model.save(tmp_path / "model.zip")
    one, two, other = (
        inspect(Args(model=tmp_path / "model.zip", env="CartPole-v1", steps=100, seed=seed))[0].stats(PI[0]).mean_abs
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_drift_shows_the_task_that_was_asked_for(tmp_path):
    env = make_env("CartPole-v1", drift="scale")
    PPO("MlpPolicy", env, policy_kwargs=RELU, seed=0, device="cpu").save(tmp_path / "model.zip")
    look = {"model": tmp_path / "model.zip", "env": "CartPole-v1", "drift": ("scale",), "steps": 100}
    plain, same, changed = (inspect(Args(**look, task=task))[0].stats(PI[0]).mean_abs for task in (0, 0, 3))
    assert torch.equal(plain, same)
    assert not torch.equal(plain, changed)


def test_a_normalised_model_is_shown_what_it_was_trained_on(tmp_path):
    saved = make(PPO, tmp_path / "model.zip", {})
    venv = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    venv.obs_rms.mean, venv.obs_rms.var = np.full(4, 5.0), np.full(4, 1e-4)
    venv.save(str(tmp_path / "normalize.pkl"))
    statistics = (tmp_path / "normalize.pkl").read_bytes()
    (found,) = inspect(Args(model=saved.path, env="CartPole-v1", steps=50, vecnormalize=tmp_path / "normalize.pkl"))
    rows = found.network.module.get_submodule(PI[0])
    with torch.no_grad():
        wanted = torch.relu(rows(torch.full((1, 4), -10.0)))[0]  # (0 - 5) / .01, clipped to -10
    assert torch.allclose(found.stats(PI[0]).mean_abs, wanted.double(), atol=1e-5)
    assert (tmp_path / "normalize.pkl").read_bytes() == statistics


def test_dict_observations(tmp_path):
    gym.register("MultiObs-v0", entry_point=SimpleMultiObsEnv)
    model = DQN("MultiInputPolicy", SimpleMultiObsEnv(), policy_kwargs={"net_arch": [16]}, buffer_size=10, device="cpu")
    model.save(tmp_path / "model.zip")
    (found,) = inspect(Args(model=tmp_path / "model.zip", env="MultiObs-v0", steps=20))
    assert {group.name: group.width for group in found.graph}["q_net.0"] == 16
    assert found.stats("q_net.0").samples == 20
    assert found.stats("features_extractor.extractors.img.cnn.4").samples == 20 * 16  # every position of the map


# Bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(PPO, tmp_path_factory.mktemp("model") / "model.zip", {}).path


class Broken(gym.Env):
    """An environment that cannot even be built."""

    def __init__(self):
        raise gym.error.DependencyNotInstalled("box2D is not installed, you can install it by ...")


gym.register("BrokenToo-v0", entry_point=Broken)

MISTAKES = {
    "env": (["--env", "CartPoll-v1"], "(?i)did you mean"),
    "env name": (["--env", "Cart Pole!"], "Cart Pole!"),
    "env dependency": (["--env", "BrokenToo-v0"], "box2D is not installed"),
    "other observations": (["--env", "MountainCar-v0"], "(?i)observation spaces? do not match"),
    "other actions": (["--env", "Pendulum-v1"], "(?i)spaces? do not match"),
    "env kwargs": (["--env-kwargs", "wings:2"], "wings"),
    "pair": (["--env-kwargs", "wings"], "expected key:value"),
    "drift": (["--drift", "permut"], "(?i)did you mean 'permute'"),
    "drift kwargs": (["--drift", "permute", "--drift-kwargs", "strenght:1"], "strenght"),
    "task": (["--drift", "permute", "--task", "-1"], "-1"),
    "task without drift": (["--task", "2"], "drift"),
    "steps": (["--steps", "0"], "at least 1"),
    "seed": (["--seed", "-1"], "(?i)seed"),
    "package": (["--gym-packages", "no_such_package"], "no_such_package"),
    "vecnormalize": (["--vecnormalize", "nowhere.pkl"], "nowhere.pkl"),
}


def refused(capsys, argv, wanted):
    code = main(argv)
    told = capsys.readouterr().err.splitlines()
    assert code not in (0, None)
    assert len(told) == 1 and told[0].startswith("error:") and re.search(wanted, told[0]), told


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mistake_is_one_line(model, capsys, mistake):
    argv, wanted = MISTAKES[mistake]
    refused(capsys, [str(model), "--env", "CartPole-v1", "--steps", "8", *argv], wanted)


def test_files_that_are_no_models_are_one_line(tmp_path, capsys, model):
    (tmp_path / "text.zip").write_text("not a zip at all")
    refused(capsys, [str(tmp_path / "text.zip"), "--env", "CartPole-v1"], "is no stable-baselines3 model")
    refused(capsys, [str(tmp_path / "nowhere.zip"), "--env", "CartPole-v1"], "no such file")
    refused(capsys, [str(tmp_path), "--env", "CartPole-v1"], "no such file")
    (tmp_path / "half.zip").write_bytes(model.read_bytes()[:2000])
    refused(capsys, [str(tmp_path / "half.zip"), "--env", "CartPole-v1"], "is no stable-baselines3 model")
    ARS("LinearPolicy", "CartPole-v1").save(tmp_path / "ars.zip")
    refused(capsys, [str(tmp_path / "ars.zip"), "--env", "CartPole-v1"], "is not supported; known are ppo, a2c, dqn")
    (tmp_path / "junk.pkl").write_bytes(pickle.dumps({"not": "statistics"}))
    refused(capsys, [str(model), "--env", "CartPole-v1", "--vecnormalize", str(tmp_path / "junk.pkl")], "junk.pkl")


def test_as_a_user_runs_it(model, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    command = [sys.executable, "-m", "agents.inspect", str(model), "--steps", "64"]
    done = subprocess.run([*command, "--env", "CartPole-v1"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "units over 64 observations" in done.stdout
    done = subprocess.run([*command, "--env", "CartPoll-v1"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error:")
    assert list(tmp_path.iterdir()) == []
