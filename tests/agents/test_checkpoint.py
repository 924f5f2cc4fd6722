"""A run that was stopped goes on as if it had not been."""

import copy
import csv
import dataclasses
import json
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from agents.algorithms import algorithm
from agents.command_line import pairs
from agents.options import Args, as_config, from_config
from agents.state import COUNTED, restore, state_of
from agents.train import main
from tests.agents.resuming import (
    BARE,
    DQN,
    NET,
    PPO,
    RANDOM,
    REPLAY,
    ROLLOUTS,
    all_differences,
    differences,
    stopped_at,
    tables,
    train,
    weights,
)

SAVED = ["--save-freq", "48", "--keep", "9", "--eval-freq", "64", "--eval-episodes", "2"]

PENDULUM = [*BARE, "--env", "Pendulum-v1", *RANDOM, "-n", "112"]
SMALL = ["--policy-kwargs", "net_arch:[12,12]"]
OFF_POLICY = [
    *PENDULUM,
    *SMALL,
    "--hyperparams",
    "learning_starts:20",
    "buffer_size:60",
    "batch_size:8",
    "train_freq:2",
]
IMAGES = [*BARE, "--gym-packages", "tests.agents.images", "--env", "Brighter-v0", *RANDOM, "-n", "96"]
CUT = ["--method", "gradient_cutoff", "--method-kwargs", "resize:True", "least:4", "remove:0.9"]
RUNS = {
    "ppo": [*PPO, "--n-envs", "2"],
    "dqn": [*DQN, "--clear-buffer", "--restart-exploration"],
    "ppo_cnn": [*IMAGES, *ROLLOUTS],
    "dqn_cnn": [*IMAGES, "--algo", "dqn", *REPLAY],
}
MORE = {
    "a2c": [*PPO, "--algo", "a2c", "--hyperparams", "n_steps:16"],
    "ppo_gsde": [*PENDULUM, *NET, "--hyperparams", "n_steps:16", "batch_size:16", "use_sde:True"],
    "sac": [*OFF_POLICY, "--algo", "sac"],
    "sac_gsde": [*OFF_POLICY, "use_sde:True", "--algo", "sac"],
    "td3": [*OFF_POLICY, "--algo", "td3"],
    "ddpg": [*OFF_POLICY, "--algo", "ddpg"],
    "dqn_nstep": [*DQN, *REPLAY, "n_steps:3"],
    "jumps": [*PPO, "--jumps", "--layer-norm"],
    "l2_init": [*PPO, "--method", "redo+l2_init", "--method-kwargs", "redo.tau:0.1"],
    "prune": [*PPO, *CUT],
    "dqn_prune": [*DQN, *CUT],
    "inject": [*PPO, "--method", "plasticity_injection", "--method-kwargs"],
    "snr": [*PPO, "--method", "snr", "--method-kwargs"],
    "folding": [*PPO, "--method", "folding", "--method-kwargs"],
    "dqn_folding": [*DQN, "--method", "grow+folding", "--method-kwargs", "grow.when:every:1"],
}
CONTRIB = {
    "recurrent_ppo": [*PPO, "--algo", "recurrent_ppo"],
    "trpo": [*PPO, "--algo", "trpo", "--hyperparams", "n_steps:16", "batch_size:16"],
    "qrdqn": [*DQN, "--algo", "qrdqn"],
    "tqc": [*OFF_POLICY, "--algo", "tqc"],
    "crossq": [*OFF_POLICY, "--algo", "crossq"],
}


@pytest.mark.parametrize("name", [*RUNS, *MORE, *CONTRIB])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, name):
    if name in CONTRIB:
        pytest.importorskip("sb3_contrib")
    whole = train(tmp_path / "whole", *(RUNS | MORE | CONTRIB)[name], *SAVED)
    for steps in sorted(int(p.stem.split("_")[1]) for p in (whole / "checkpoints").glob("*.zip"))[:2]:
        again = stopped_at(whole, steps, tmp_path / f"from_{steps}")
        assert main(["--resume", str(again)]) == 0
        assert not all_differences(whole, again)


def test_a_run_without_a_checkpoint_begins_at_zero(tmp_path):
    whole = train(tmp_path / "whole", *PPO, *SAVED)
    again = stopped_at(whole, 0, tmp_path / "again")
    assert not list((again / "checkpoints").iterdir())
    assert main(["--resume", str(again)]) == 0
    assert not all_differences(whole, again)


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    folder = train(tmp_path, *PPO)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    assert main(["--resume", str(folder)]) == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--resume", "nowhere", "--seed", "3"], "--resume takes no other option"),
        (["-i", "nowhere.zip"], "nowhere.zip"),
        (["--keep", "0"], "--keep must be at least 1"),
        (["--save-minutes", "-1"], "--save-minutes must be 0 or more"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and told in line and not list(tmp_path.iterdir())


def test_only_the_last_checkpoints_are_kept_and_sb3_loads_them(tmp_path):
    folder = train(tmp_path, *PPO, "--save-freq", "32", "--keep", "2")
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == [f"model_{steps}_steps.{end}" for steps in (128, 96) for end in ("json", "zip")]
    model = stable_baselines3.PPO.load(folder / "checkpoints" / "model_128_steps.zip", device="cpu")
    assert model.num_timesteps == 128 and model.recycle_state["last_event"] == 96


@pytest.mark.parametrize("argv", [PPO, [*PPO, *CUT]], ids=["as_built", "pruned"])
def test_a_new_run_may_begin_with_the_weights_of_another(tmp_path, argv):
    first = train(tmp_path / "first", *argv, "--save-freq", "96")
    saved = first / "checkpoints" / "model_96_steps.zip"
    second = train(tmp_path / "second", *argv, "-i", str(saved), "-n", "32", "--save-freq", "1", "--keep", "9",
                   "--hyperparams", "n_steps:16", "learning_rate:0.0")  # fmt: skip
    assert json.loads((second / "checkpoints" / "model_16_steps.json").read_text())["steps"] == 16
    one, other = weights(saved)["policy.pth"], weights(second / "checkpoints" / "model_16_steps.zip")["policy.pth"]
    assert not differences(one, other)
    assert steps_of(second) == [16]


def steps_of(folder):
    return sorted(int(path.stem.split("_")[1]) for path in (folder / "checkpoints").glob("*.zip"))


def test_weights_of_another_structure_are_refused(tmp_path, capsys):
    first = train(tmp_path / "first", *PPO, "--save-freq", "96")
    argv = [*PPO, "-i", str(first / "model.zip"), "--log-folder", str(tmp_path / "second")]
    assert main([*argv, "--policy-kwargs", "net_arch:[12]"]) == 2
    assert "Pass the options it was trained with" in capsys.readouterr().err and not (tmp_path / "second").exists()


def test_environments_that_do_not_pickle_are_said_once_and_begin_anew(tmp_path):
    argv = [*BARE, "--gym-packages", "tests.agents.faulty", "--env", "Unpicklable-v0", *RANDOM, *NET, *ROLLOUTS,
            "--drift", "permute", "--change", "every:50", "-n", "128", "--save-freq", "16", "--keep", "9"]  # fmt: skip
    with pytest.warns(RuntimeWarning) as told:
        whole = train(tmp_path / "whole", *argv)
    (line,) = [str(w.message) for w in told if "will not be bit-identical" in str(w.message)]
    assert "Unpicklable does not pickle: cannot pickle 'generator' object" in line
    again = stopped_at(whole, 80, tmp_path / "again")
    with pytest.warns(RuntimeWarning, match="will not be bit-identical"):
        assert main(["--resume", str(again)]) == 0
    episodes = list(csv.DictReader(tables(again)["episodes.csv"].splitlines()))
    ends = [(int(e["timesteps"]), int(e["task"])) for e in episodes]
    assert ends == [(step, (step - 5) // 50) for step in range(5, 129, 5)]


WORDS = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none(), st.text("ab5_'\" ()"),
    st.tuples(st.integers(), st.text("xy")), st.lists(st.integers()),
    st.dictionaries(st.text("kl", min_size=1), st.lists(st.integers(), max_size=2), max_size=2),
)  # fmt: skip


@given(st.dictionaries(st.text("abc_", min_size=1), WORDS, max_size=4))
def test_options_survive_the_config(values):
    typed = tuple(f"{key}:{value}" if isinstance(value, str) else f"{key}:{value!r}" for key, value in values.items())
    args = Args(hyperparams=typed, drift=("permute",), n=7)
    back = from_config(yaml.safe_load(yaml.safe_dump(as_config(args), sort_keys=False)))
    assert repr(pairs(back.hyperparams)) == repr(pairs(typed))
    assert dataclasses.replace(back, hyperparams=()) == dataclasses.replace(args, hyperparams=())


def test_normalisation_goes_on():
    def built():
        env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
        return stable_baselines3.PPO("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu", seed=0)

    first, second = built(), built()
    first.learn(48)
    restore(state_of(first, []), second, [])
    one, other = first.get_vec_normalize_env(), second.get_vec_normalize_env()
    for a, b in ((one.obs_rms, other.obs_rms), (one.ret_rms, other.ret_rms)):
        assert (a.mean == b.mean).all() and (a.var == b.var).all() and a.count == b.count
    assert (one.returns == other.returns).all() and (first._last_obs == second._last_obs).all()


@pytest.mark.parametrize("name", ["ppo", "dqn", "sac", "a2c", "td3"])
def test_training_changes_no_attribute_that_is_not_kept(name):
    """What another version of stable-baselines3 may begin to count."""
    small = {"learning_starts": 10, "buffer_size": 50} if name in ("dqn", "sac", "td3") else {"n_steps": 16}
    model = algorithm(name)("MlpPolicy", "CartPole-v1" if name == "dqn" else "Pendulum-v1", device="cpu", **small)

    def numbers():
        plain = (int, float, np.ndarray, str, deque)
        return {key: copy.deepcopy(value) for key, value in vars(model).items() if isinstance(value, plain)}

    before = numbers()
    model.learn(64)
    changed = {key for key, value in numbers().items() if key not in before or repr(before[key]) != repr(value)}
    assert changed - set(COUNTED) - {"start_time"} == set()
