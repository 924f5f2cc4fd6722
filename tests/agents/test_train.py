import base64
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import DQN, PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.command_line import pairs
from agents.train import main

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
BARE = ["--num-threads", "1", "--device", "cpu"]
DIGITS = [*BARE, "--env", "DigitsBandit-v1", "--env-kwargs", "episode_length:5", "images:60"]
NET = ["--policy-kwargs", "net_arch:[16,16]", "activation_fn:relu"]
EDITS = ["--method", "random", "--method-kwargs", "count:2", "--every", "64"]
PERMUTE = ["--drift", "permute", "--change", "every:100"]
PPO_ARGS = [*DIGITS, *NET, *EDITS, "--hyperparams", "n_steps:32", "batch_size:16", "n_epochs:4", "-n", "256"]
REPLAY = ["--hyperparams", "learning_starts:30", "buffer_size:500", "batch_size:16"]
DQN_ARGS = [*DIGITS, *NET, *EDITS, "--algo", "dqn", "-n", "200", *REPLAY]


def run(tmp_path, *argv, where="runs"):
    """Train in this process and return the one run folder below ``tmp_path / where``."""
    assert main([*argv, "--log-folder", str(tmp_path / where)]) == 0
    (config,) = (tmp_path / where).rglob("config.yaml")
    return config.parent


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def spawn(*argv, cwd, path=()):
    """Train in a process of its own, as a user does."""
    place = os.pathsep.join([str(ROOT), *map(str, path)])
    env = {**os.environ, "PYTHONPATH": place, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "agents.train", *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


# What a run leaves behind --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything switched on: its folder."""
    root = tmp_path_factory.mktemp("finished")
    return run(root, *PPO_ARGS, *PERMUTE, "--eval-freq", "64", "--save-freq", "128", "--tag", "full", "--seed", "3")


def test_the_run_folder_is_named_after_the_run(finished):
    assert finished.parts[-4:] == ("runs", "DigitsBandit-v1-permute", "ppo-random-full", "3")


def test_the_run_folder_holds_what_its_readme_says(finished):
    names = sorted(p.name for p in finished.iterdir())
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names == sorted(
        ["checkpoints", "command.txt", "config.yaml", "edits.jsonl", "episodes.csv", "evaluations.csv", "model.zip",
         "progress.csv", events]
    )  # fmt: skip
    readme = (ROOT / "runs" / "README.md").read_text()
    promised = [line.split("`")[1].rstrip("/").replace(".*", "") for line in readme.splitlines() if line[:3] == "| `"]
    assert {name if name != events else "events.out.tfevents" for name in names} == set(promised)
    saved = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert saved == ["model_128_steps.json", "model_128_steps.zip"]  # the end is in model.zip


def test_the_config_says_every_option_and_what_it_came_to(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["hyperparams"] == {"n_steps": 32, "batch_size": 16, "n_epochs": 4}
    assert config["policy_kwargs"] == {"net_arch": [16, 16], "activation_fn": "relu"}
    assert config["method_kwargs"] == {"count": 2} and config["env_kwargs"] == {"episode_length": 5, "images": 60}
    wanted = {"algo": "ppo", "env": "DigitsBandit-v1", "drift": ["permute"], "change": "every:100", "seed": 3}
    wanted |= {"method": "random", "tag": "full", "total_timesteps": 256, "every": 64, "n_envs": 1}
    assert {key: config[key] for key in wanted} == wanted
    assert config["change_points"] == [100, 200]


def test_the_config_comes_first_and_the_model_last(finished):
    when = {p.name: p.stat().st_mtime_ns for p in finished.iterdir() if p.is_file()}
    assert max(when, key=lambda name: when[name]) == "model.zip"
    assert when["config.yaml"] < min(when[n] for n in when if n not in ("command.txt", "config.yaml"))


def test_the_episodes_and_evaluations_follow_the_schedule(finished):
    episodes = rows(finished / "episodes.csv")
    assert [int(e["timesteps"]) for e in episodes] == list(range(5, 256, 5))
    assert [int(e["task"]) for e in episodes] == [(step - 5) // 100 for step in range(5, 256, 5)]
    assert {e["length"] for e in episodes} == {"5"} and all(0 <= float(e["return"]) <= 5 for e in episodes)
    assert [(r["timesteps"], r["task"]) for r in rows(finished / "evaluations.csv")] == [
        ("64", "0"), ("128", "1"), ("192", "1"), ("256", "2")
    ]  # fmt: skip


def test_the_edits_are_those_of_the_schedule(finished):
    told = lines(finished / "edits.jsonl")
    assert [line["step"] for line in told] == [64, 128, 192, 256]
    assert all(group["recycled"] == 2 for line in told[:3] for group in line["groups"].values())
    progress = [r for r in rows(finished / "progress.csv") if r["recycle/policy/recycled"]]
    assert [float(r["recycle/policy/recycled"]) for r in progress] == [8, 16, 24, 24]


def test_tensorboard_knows_the_task(finished):
    events = EventAccumulator(str(finished), size_guidance={"scalars": 0})
    events.Reload()
    task = {p.step: p.value for p in events.Scalars("drift/task")}  # at every rollout, and at every event once more
    assert list(task.values()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert "eval/mean_reward" in events.Tags()["scalars"] and "recycle/policy/dead" in events.Tags()["scalars"]


def test_the_model_is_a_plain_ppo(finished):
    model = PPO.load(finished / "model.zip", device="cpu")
    assert model.num_timesteps == 256 and model.policy.net_arch == [16, 16]
    assert_plain(finished / "model.zip")
    assert_plain(finished / "checkpoints" / "model_128_steps.zip")


def assert_plain(path):
    """Nothing in the zip refers to this project's modules."""
    with zipfile.ZipFile(path) as file:
        data = json.loads(file.read("data"))
    for key, entry in data.items():
        if isinstance(entry, dict) and ":serialized:" in entry:
            raw = base64.b64decode(entry[":serialized:"])
            assert b"agents" not in raw and b"recycle." not in raw, key


# Options -------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused_overwritten_or_kept_apart(tmp_path, capsys):
    folder = run(tmp_path, *PPO_ARGS, "-n", "64")
    old = (folder / "model.zip").read_bytes()
    assert main([*PPO_ARGS, "-n", "64", "--log-folder", str(tmp_path / "runs")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error:") and "--overwrite" in told and "--tag" in told
    assert (folder / "model.zip").read_bytes() == old
    assert main([*PPO_ARGS, "-n", "96", "--overwrite", "--log-folder", str(tmp_path / "runs")]) == 0
    assert PPO.load(folder / "model.zip", device="cpu").num_timesteps == 96
    assert main([*PPO_ARGS, "-n", "64", "--tag", "two", "--log-folder", str(tmp_path / "runs")]) == 0
    assert sorted(p.name for p in folder.parent.parent.iterdir()) == ["ppo-random", "ppo-random-two"]


def test_overwrite_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    folder = tmp_path / "runs" / "DigitsBandit-v1-stationary" / "ppo-random" / "0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    assert main([*PPO_ARGS, "--overwrite", "--log-folder", str(tmp_path / "runs")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error:") and "holds no run" in told
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_a_failed_overwrite_keeps_the_old_run(tmp_path, capsys):
    folder = run(tmp_path, *PPO_ARGS, "-n", "64")
    for bad in (["--hyperparams", "n_stepz:32"], ["--method-kwargs", "county:3"], ["--drift", "permut"]):
        assert main([*PPO_ARGS, *bad, "--overwrite", "--log-folder", str(tmp_path / "runs")]) == 2
        assert (folder / "model.zip").exists()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_no_method_leaves_no_edits(tmp_path):
    folder = run(tmp_path, *PPO_ARGS, "-n", "64", "--method", "none", "--method-kwargs")
    assert folder.parts[-2] == "ppo-none" and not (folder / "edits.jsonl").exists()
    assert (folder / "model.zip").exists() and folder.parts[-3] == "DigitsBandit-v1-stationary"


@pytest.mark.parametrize("vec_env", ["dummy", "subproc"])
def test_four_copies_share_one_schedule(tmp_path, vec_env):
    folder = run(tmp_path, *PPO_ARGS, *PERMUTE, "--n-envs", "4", "-n", "512", "--vec-env", vec_env)
    episodes = rows(folder / "episodes.csv")
    steps = [int(e["timesteps"]) for e in episodes]
    assert steps == [step for step in range(20, 512, 20) for _ in range(4)]  # five steps of four copies
    assert [int(e["task"]) for e in episodes] == [(step - 20) // 100 for step in steps]
    assert len({e["return"] for e in episodes[:8]}) > 1  # the copies see images of their own


def test_subproc_and_dummy_copies_play_the_same(tmp_path):
    texts = []
    for vec_env in ("dummy", "subproc"):
        folder = run(tmp_path, *PPO_ARGS, *PERMUTE, "--n-envs", "2", "--vec-env", vec_env, where=vec_env)
        texts.append([(folder / name).read_text() for name in ("episodes.csv", "edits.jsonl")])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("args", [PPO_ARGS, DQN_ARGS], ids=["ppo", "dqn"])
def test_one_seed_gives_one_story(tmp_path, args):
    stories = []
    for where, seed in (("one", 5), ("two", 5), ("three", 6)):
        folder = run(tmp_path, *args, *PERMUTE, "--seed", str(seed), where=where)
        stories.append([(folder / name).read_bytes() for name in ("episodes.csv", "edits.jsonl")])
    assert stories[0] == stories[1]
    assert stories[0][0] != stories[2][0] and stories[0][1] != stories[2][1]


def test_watching_changes_no_episode(tmp_path):
    stories = []
    for method in ("none", "monitor"):
        folder = run(tmp_path, *PPO_ARGS, *PERMUTE, "--method", method, "--method-kwargs", where=method)
        stories.append((folder / "episodes.csv").read_bytes())
    assert stories[0] == stories[1]


def test_evaluating_changes_no_episode(tmp_path):
    stories = []
    for where, options in (("without", []), ("with", ["--eval-freq", "32", "--eval-tasks", "all"])):
        folder = run(tmp_path, *PPO_ARGS, *PERMUTE, *options, where=where)
        stories.append([(folder / name).read_bytes() for name in ("episodes.csv", "edits.jsonl")])
    assert stories[0] == stories[1]


def test_all_tasks_are_evaluated_on_request(tmp_path):
    folder = run(tmp_path, *PPO_ARGS, *PERMUTE, "--eval-freq", "96", "--eval-tasks", "all", "--eval-episodes", "2")
    table = rows(folder / "evaluations.csv")
    wanted = [(step, task) for step, last in ((96, 0), (192, 1), (256, 2)) for task in range(last + 1)]
    assert [(int(r["timesteps"]), int(r["task"])) for r in table] == wanted
    assert {r["episodes"] for r in table} == {"2"}
    logged = [r for r in rows(folder / "progress.csv") if r["eval/mean_reward_all_tasks"]]
    means = [np.mean([float(r["return"]) for r in table if r["timesteps"] == str(s)]) for s in (96, 192, 256)]
    assert [float(r["eval/mean_reward_all_tasks"]) for r in logged] == pytest.approx(means)


def test_evaluation_plays_the_task_of_training(tmp_path):
    """The sign of the reward says which task it is."""
    gym.register("OnePays-v0", entry_point=OnePays)
    argv = [*BARE, *NET, "--hyperparams", "n_steps:32", "batch_size:32", "n_epochs:1", "-n", "256"]
    argv += ["--env", "OnePays-v0", "--drift", "reward_flip", "--change", "every:64", "--eval-freq", "64"]
    folder = run(tmp_path, *argv)
    returns = [float(r["return"]) for r in rows(folder / "evaluations.csv")]
    tasks = [int(r["task"]) for r in rows(folder / "evaluations.csv")]
    assert tasks == [0, 1, 2, 3]
    trained = {int(e["task"]): float(e["return"]) for e in rows(folder / "episodes.csv")}
    assert returns == [trained[task] for task in tasks] and returns[0] == 4 and -4 in returns


class OnePays(gym.Env):
    """Four steps that pay 1 each, whatever is done."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == 4, False, {}


def test_dqn_with_a_fresh_buffer_and_fresh_exploration(tmp_path):
    folder = run(
        tmp_path, *DQN_ARGS, "--drift", "relabel", "--change", "at:100", "--clear-buffer", "--restart-exploration"
    )
    model = DQN.load(folder / "model.zip", device="cpu")
    assert model.num_timesteps == 200 and model.learning_starts == 30
    assert_plain(folder / "model.zip")
    progress = [r for r in rows(folder / "progress.csv") if r.get("rollout/exploration_rate")]
    epsilon = {int(float(r["time/total_timesteps"])): float(r["rollout/exploration_rate"]) for r in progress}
    assert [epsilon[step] for step in (80, 100, 120, 200)] == pytest.approx([0.05, 1, 0.05, 0.05])  # 10 of 100 steps
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["clear_buffer"] is True and config["change_points"] == [100]


def test_checkpoints_while_exploration_restarts(tmp_path):
    folder = run(
        tmp_path, *DQN_ARGS, *PERMUTE, "--clear-buffer", "--restart-exploration", "--every", "50",
        "--save-freq", "60", "--keep", "9",
    )  # fmt: skip
    names = sorted(p.name for p in (folder / "checkpoints").glob("model_*_steps.zip"))
    assert names == ["model_120_steps.zip", "model_180_steps.zip", "model_60_steps.zip"]
    for name in names:
        assert_plain(folder / "checkpoints" / name)


def test_weight_decay_reaches_the_optimizer_as_it_is_and_is_saved(tmp_path):
    """Through SB3's optimizer_kwargs Adam's eps of 1e-5 would have been lost on the way."""
    folder = run(tmp_path, *PPO_ARGS, "--weight-decay", "0.01")
    (group,) = PPO.load(folder / "model.zip", device="cpu").policy.optimizer.param_groups
    assert (group["weight_decay"], group["eps"]) == (0.01, 1e-5)
    assert yaml.safe_load((folder / "config.yaml").read_text())["weight_decay"] == 0.01


def test_layers_of_other_kinds_and_several_methods(tmp_path):
    words = [
        "--layer-norm",
        "--crelu",
        "--jumps",
        "--method",
        "redo+l2_init",
        "--method-kwargs",
        "l2_init.strength:1e-4",
    ]
    folder = run(tmp_path, *DQN_ARGS, *words)
    assert folder.parent.name == "dqn-redo+l2_init"
    net = DQN.load(folder / "model.zip", device="cpu").policy.q_net
    assert "CReLU" in str(net) and "LayerNorm" in str(net)
    assert any("jumps" in line for line in lines(folder / "edits.jsonl"))


def test_the_policy_follows_the_observations(tmp_path):
    gym.register("TinyImages-v0", entry_point=Images)
    folder = run(
        tmp_path, "--env", "TinyImages-v0", "--algo", "dqn", "-n", "40", "--every", "20", "--num-threads", "1",
        "--hyperparams", "learning_starts:10", "buffer_size:50", "batch_size:4", "--device", "cpu",
        "--policy-kwargs", "features_extractor_kwargs:{'features_dim':8}",
    )  # fmt: skip
    groups = lines(folder / "edits.jsonl")[0]["groups"]
    assert [g["width"] for g in groups.values()] == [32, 64, 64, 8]


class Images(gym.Env):
    """Random 36x36 pictures, five to an episode."""

    observation_space = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)
    t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.integers(0, 256, (36, 36, 3), np.uint8), {}

    def step(self, action):
        self.t += 1
        return self.np_random.integers(0, 256, (36, 36, 3), np.uint8), 1.0, self.t == 5, False, {}


def test_pairs_read_python_literals():
    words = "noise:0.01 parent:random net_arch:[64,64] lr:3e-3 flag:True none:None url:a:b empty:"
    assert pairs(words.split()) == {
        "noise": 0.01, "parent": "random", "net_arch": [64, 64], "lr": 3e-3, "flag": True, "none": None,
        "url": "a:b", "empty": "",
    }  # fmt: skip
    for bad in ("noise", ":1", ""):
        with pytest.raises(ValueError, match="expected key:value"):
            pairs([bad])


def test_an_interrupt_keeps_what_was_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PPO, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*PPO_ARGS, "--log-folder", str(tmp_path / "runs")]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    assert not (config.parent / "model.zip").exists() and (config.parent / "episodes.csv").exists()


# Bad input -----------------------------------------------------------------------------------------------------

OBSERVATION = np.zeros(3, np.float32)


class Poisoned(gym.Env):
    """Says NaN or infinity: in the first observation, or after some steps in an observation or a reward."""

    observation_space = gym.spaces.Box(-10, 10, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, where="reset", value="nan", at=100):
        self.where, self.value, self.at, self.life = where, float(value), at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.full(3, self.value if self.where == "reset" else 0, np.float32), {}

    def step(self, action):
        self.life, self.t = self.life + 1, self.t + 1
        now = self.value if self.life == self.at else 0.0
        obs = np.full(3, now if self.where == "observation" else 0, np.float32)
        return obs, now if self.where == "reward" else 1.0, self.t == 10, False, {}


class Odd(gym.Env):
    """Spaces that no agent here can use."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, kind="tuple"):
        part = gym.spaces.Box(-1, 1, (2,))
        self.observation_space = {
            "tuple": gym.spaces.Tuple([part, part]),
            "nested": gym.spaces.Dict({"a": gym.spaces.Dict({"b": part})}),
            "text": gym.spaces.Text(5),
        }[kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


class Broken(gym.Env):
    """An environment that cannot even be built."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        raise gym.error.DependencyNotInstalled("box2D is not installed, you can install it by ...")


gym.register("Poisoned-v0", entry_point=Poisoned)
gym.register("Odd-v0", entry_point=Odd)
gym.register("Broken-v0", entry_point=Broken)

SHORT = ["--hyperparams", "n_steps:32", "batch_size:32", "n_epochs:1", "-n", "256", *NET, "--device", "cpu"]
MISTAKES = {
    "algo": (["--algo", "pppo"], "did you mean 'ppo'"),
    "env": (["--env", "CartPoll-v1"], "(?i)did you mean"),
    "env version": (["--env", "CartPole-v99"], "CartPole"),
    "env name": (["--env", "Cart Pole!"], "Cart Pole!"),
    "env package": (["--env", "nowhere/Thing-v0"], "nowhere"),
    "env dependency": (["--env", "Broken-v0"], "box2D is not installed"),
    "env kwargs": (["--env-kwargs", "wings:2"], "wings"),
    "drift": (["--drift", "permut"], "(?i)did you mean 'permute'"),
    "drift kwargs": (["--drift", "permute", "--drift-kwargs", "strenght:1"], "strenght"),
    "drift kwargs without drift": (["--drift-kwargs", "strength:1"], "strength"),
    "drift that does not fit": (["--drift", "relabel"], "DigitsBandit"),
    "change": (["--drift", "permute", "--change", "evry:100"], "evry:100"),
    "change number": (["--drift", "permute", "--change", "every:-5"], "every:-5"),
    "method": (["--method", "splitt"], "did you mean 'split'"),
    "method module": (["--method", "nowhere:Thing"], "nowhere"),
    "method kwargs": (["--method-kwargs", "nois:1"], "nois"),
    "method value": (["--method", "split", "--method-kwargs", "share:2"], "share"),
    "hyperparameter": (["--hyperparams", "learning_rat:1"], "did you mean 'learning_rate'"),
    "activation": (["--policy-kwargs", "activation_fn:reluu"], "did you mean 'relu'"),
    "policy": (["--policy", "MlpPolizy"], "MlpPolizy"),
    "pair": (["--method-kwargs", "noise=0.1"], "expected key:value"),
    "hyperparams pair": (["--hyperparams", "n_steps"], "expected key:value"),
    "env pair": (["--env-kwargs", "x"], "expected key:value"),
    "drift pair": (["--drift", "permute", "--drift-kwargs", "x"], "expected key:value"),
    "steps": (["-n", "-5"], "-5"),
    "no steps": (["-n", "0"], "at least 1"),
    "every": (["--every", "0"], "every"),
    "warmup": (["--warmup", "-1"], "warmup"),
    "cap": (["--cap", "1.5"], "cap"),
    "cooldown": (["--cooldown", "-1"], "cooldown"),
    "copies": (["--n-envs", "0"], "n-envs"),
    "seed": (["--seed", "-1"], "seed"),
    "no gpu": (["--device", "cuda"], "finds no GPU"),
    "eval": (["--eval-freq", "-1"], "eval-freq"),
    "threads": (["--num-threads", "0"], "(?i)threads"),
    "device": (["--device", "gpu"], "(?i)gpu"),
    "package": (["--gym-packages", "no_such_package"], "no_such_package"),
    "tag": (["--tag", "a/b"], "tag"),
    "ppo keeps no buffer": (["--clear-buffer"], "dqn"),
    "tuple": (["--env", "Odd-v0", "--env-kwargs", "kind:tuple"], "(?i)space"),
    "nested": (["--env", "Odd-v0", "--env-kwargs", "kind:nested"], "(?i)space|nested"),
    "text": (["--env", "Odd-v0", "--env-kwargs", "kind:text"], "(?i)space"),
    "continuous": (["--algo", "dqn", "--env", "Pendulum-v1", "--hyperparams", "batch_size:8"], "(?i)action space"),
    "nan at reset": (["--env", "Poisoned-v0"], "(?i)nan"),
    "inf at reset": (["--env", "Poisoned-v0", "--env-kwargs", "value:inf"], "(?i)inf"),
    "nothing to recycle": (["--policy-kwargs", "net_arch:[]"], "nothing can be recycled"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, mistake):
    argv, wanted = MISTAKES[mistake]
    code = main([*SHORT, *argv, "--log-folder", str(tmp_path / "runs")])
    told = capsys.readouterr().err.splitlines()
    assert code not in (0, None)
    assert len(told) == 1 and told[0].startswith("error:") and len(told[0]) > 20
    assert re.search(wanted, told[0]), told[0]
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([*SHORT, "--log-folder", str(tmp_path / "file" / "runs")]) not in (0, None)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error:") and str(tmp_path / "file") in told[0]
    assert (tmp_path / "file").read_text() == "mine"
    assert main([*SHORT, "--log-folder", str(tmp_path / "file")]) not in (0, None)
    assert len(capsys.readouterr().err.splitlines()) == 1 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["reward", "observation"])
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("algo", ["ppo", "dqn"])
def test_a_nan_on_the_way_ends_the_run_in_one_line(tmp_path, capsys, where, value, algo):
    argv = ["--env", "Poisoned-v0", "--env-kwargs", f"where:{where}", f"value:{value}", "at:105"]
    hyper = ["--hyperparams", "learning_starts:20", "buffer_size:300"] if algo == "dqn" else []
    assert main([*SHORT, *argv, "--algo", algo, *hyper, "--log-folder", str(tmp_path / "runs")]) not in (0, None)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error:") and value in told[0]
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    assert not (config.parent / "model.zip").exists() and not list(config.parent.glob("*.zip"))
    assert not list(config.parent.glob(".*"))  # nothing half-written either
    kept = [r["timesteps"] for r in rows(config.parent / "episodes.csv")]
    assert kept[:9] == [str(n) for n in range(10, 100, 10)]


def test_a_run_that_broke_off_may_be_overwritten(tmp_path, capsys):
    argv = ["--env", "Poisoned-v0", "--env-kwargs", "where:reward", "at:100", "--log-folder", str(tmp_path / "runs")]
    assert main([*SHORT, *argv]) not in (0, None)
    assert main([*SHORT, *argv, "--overwrite", "--env-kwargs", "where:reward", "at:100000"]) == 0
    assert len(list((tmp_path / "runs").rglob("model.zip"))) == 1


# As a user runs it ---------------------------------------------------------------------------------------------

MODULE = """
import gymnasium as gym
import numpy as np


class Bad(gym.Env):
    observation_space = gym.spaces.Box(-10, 10, (3,))
    action_space = gym.spaces.Discrete(2)
    life = 0

    def __init__(self, at=50):
        self.at = at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.life += 1
        reward = float("nan") if self.life == self.at else 1.0
        return np.zeros(3, np.float32), reward, self.life % 10 == 0, False, {}


gym.register("Bad-v0", entry_point=Bad)
"""


def test_the_command_is_kept_so_that_it_can_be_run_again(tmp_path):
    argv = [*PPO_ARGS, "-n", "32", "--policy-kwargs", "net_arch:[16, 16]", "--log-folder", "my runs"]
    done = spawn(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.strip()
    assert folder == tmp_path / "my runs" / "DigitsBandit-v1-stationary" / "ppo-random" / "0"
    assert (folder / "model.zip").exists()
    assert shlex.split((folder / "command.txt").read_text()) == ["python", "-m", "agents.train", *argv]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--algo", "reinforce"], "for --algo: there are ppo, a2c, dqn, sac"),
        (["--env", "CartPoll-v1"], "CartPoll"),
        (["--method", "splitt"], "did you mean 'split'"),
        (["-n", "-5"], "-5"),
        (["--env", "Bad-v0", "--env-kwargs", "at:45"], "nan"),
    ],
)
def test_mistakes_are_one_line_in_a_process_of_its_own_too(tmp_path, argv, wanted):
    (tmp_path / "bad_env.py").write_text(MODULE)
    done = spawn(*SHORT, "--gym-packages", "bad_env", *argv, "--log-folder", "runs", cwd=tmp_path, path=[tmp_path])
    told = done.stderr.splitlines()
    assert done.returncode not in (0, None)
    assert len(told) == 1 and told[0].startswith("error:") and wanted in told[0]
    if "Bad-v0" in argv:
        assert not list((tmp_path / "runs").rglob("model.zip"))
    else:
        assert not (tmp_path / "runs").exists()


def test_a_nan_in_a_copy_in_another_process_is_one_line(tmp_path):
    (tmp_path / "bad_env.py").write_text(MODULE)
    done = spawn(
        *SHORT, "--gym-packages", "bad_env", "--env", "Bad-v0", "--n-envs", "2", "--vec-env", "subproc",
        "--log-folder", "runs", cwd=tmp_path, path=[tmp_path],
    )  # fmt: skip
    told = done.stderr.splitlines()
    assert done.returncode not in (0, None) and len(told) == 1 and told[0].startswith("error:")
    assert not list((tmp_path / "runs").rglob("model.zip"))
