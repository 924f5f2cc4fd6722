import csv
import os

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import runs

torch.set_num_threads(1)

NAMES = {"env": "CartPole-v1", "drift": ["permute"], "algo": "ppo", "method": "split", "tag": None, "seed": 3}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "CartPole-v1-permute/ppo-split/3"),
        ({"tag": "big"}, "CartPole-v1-permute/ppo-split-big/3"),
        ({"drift": []}, "CartPole-v1-stationary/ppo-split/3"),
        ({"drift": ["permute", "remap"]}, "CartPole-v1-permute+remap/ppo-split/3"),
        ({"env": "ALE/Pong-v5", "algo": "dqn", "seed": 0}, "ALE_Pong-v5-permute/dqn-split/0"),
        ({"method": "my_module:MyMethod"}, "CartPole-v1-permute/ppo-my_module.MyMethod/3"),
    ],
)
def test_where_a_run_lives(tmp_path, change, wanted):
    assert runs.run_folder(tmp_path, **(NAMES | change)) == tmp_path / wanted


def test_create_writes_the_options_and_the_command(tmp_path):
    config = {"env": "CartPole-v1", "hyperparams": {"n_steps": 64, "learning_rate": 3e-3}, "drift": []}
    runs.create(tmp_path / "a" / "b", config, ["--algo", "ppo", "-n", "64"], overwrite=False)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["command.txt", "config.yaml"]
    assert (tmp_path / "a" / "b" / "command.txt").read_text() == "python -m agents.train --algo ppo -n 64\n"
    text = (tmp_path / "a" / "b" / "config.yaml").read_text()
    assert yaml.safe_load(text) == config and text.startswith("env:")  # in the order given


def test_an_existing_run_is_kept_unless_told_otherwise(tmp_path):
    folder = tmp_path / "run"
    runs.create(folder, {"seed": 0}, overwrite=False)
    (folder / "model.zip").write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"--overwrite.*--tag"):
        runs.create(folder, {"seed": 1}, overwrite=False)
    assert (folder / "model.zip").read_bytes() == b"old"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 0}
    runs.create(folder, {"seed": 1}, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["command.txt", "config.yaml"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 1}


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds no run \(no config.yaml\)"):
        runs.create(tmp_path, {}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_may_be_used_with_overwrite(tmp_path):
    (tmp_path / "run").mkdir()
    runs.create(tmp_path / "run", {"seed": 0}, overwrite=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        runs.create(tmp_path / "file" / "run", {}, overwrite=False)
    with pytest.raises(OSError, match="file"):
        runs.create(tmp_path / "file", {}, overwrite=True)
    assert (tmp_path / "file").read_text() == ""


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    runs.write_text(path, "first")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        runs.write_text(path, "second")
    assert path.read_text() == "first"


class Interrupted:
    """A model whose saving breaks off in the middle."""

    def save(self, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")


def test_a_model_is_saved_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        runs.save_model(Interrupted(), tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, policy_kwargs={"net_arch": [8]}, device="cpu", seed=0)
    runs.save_model(model, tmp_path / "model.zip")
    assert list(tmp_path.glob("*.zip")) == [tmp_path / "model.zip"]
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    saved = model.policy.state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in loaded.policy.state_dict().items())


class Counted(gym.Env):
    """Episodes of 3, 4, 5, ... steps, each of which pays 1; the third step of all and what follows is task 1."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    length, life, t = 2, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = self.length + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t, self.life = self.t + 1, self.life + 1
        return np.zeros(2, np.float32), 1.0, self.t == self.length, False, {"drift/task": int(self.life > 3)}


@pytest.mark.parametrize("copies", [1, 2])
def test_every_finished_episode_is_a_line(tmp_path, copies):
    env = DummyVecEnv([lambda: Monitor(Counted())] * copies)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, policy_kwargs={"net_arch": [8]}, device="cpu", seed=0)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    log = runs.EpisodeLog(tmp_path / "episodes.csv")
    model.learn(16 * copies, callback=log)
    with (tmp_path / "episodes.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["timesteps", "task", "return", "length"]
    wanted = []
    for end, task, length in ((3, 0, 3), (7, 1, 4), (12, 1, 5)):
        wanted += [[end * copies, task, float(length), length]] * copies
    assert [[int(t), int(k), float(r), int(n)] for t, k, r, n in rows] == wanted
    with (tmp_path / "progress.csv").open(newline="") as file:
        assert [row["drift/task"] for row in csv.DictReader(file)] == ["1"]

    model.learn(16 * copies, callback=log, reset_num_timesteps=False)  # goes on in the same table, with one head
    with (tmp_path / "episodes.csv").open(newline="") as file:
        assert sum(row[0] == "timesteps" for row in csv.reader(file)) == 1
