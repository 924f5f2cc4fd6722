import csv
import sys
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.drifting import ClearBuffer, Evaluation, restarting_exploration

torch.set_num_threads(1)


class Tasks(gym.Env):
    """Episodes of ``length`` steps that pay the task's number; a new task every ``every`` steps of all copies."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, every=100, copies=1, length=5, frozen=False):
        self.every, self.copies, self.length, self.frozen = every, copies, length, frozen
        self.clock = self.task = self.t = 0
        self.due = 0
        self.visited = []

    def set_task(self, task):
        assert self.frozen
        self.due = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.task = 0, self.due if self.frozen else self.clock // self.every
        self.visited.append(self.task)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.t, self.clock = self.t + 1, self.clock + (0 if self.frozen else self.copies)
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return obs, float(self.task), self.t == self.length, False, {"drift/task": self.task}


def copies(count=1, **kwargs):
    return DummyVecEnv([lambda: Monitor(Tasks(copies=count, **kwargs)) for _ in range(count)])


def dqn(env=None, **kwargs):
    usual = {"learning_starts": 30, "train_freq": 1, "buffer_size": 400, "batch_size": 8, "exploration_fraction": 0.5}
    kwargs = usual | kwargs
    return DQN("MlpPolicy", env or copies(), policy_kwargs={"net_arch": [8]}, device="cpu", seed=0, **kwargs)


class Probe(BaseCallback):
    """At every step, before it is stored: step, transitions held, updates so far, epsilon, learning_starts."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        m = self.model
        held = m.replay_buffer.size()
        self.seen.append((self.num_timesteps, held, m._n_updates, m.exploration_rate, m.learning_starts))
        return True


def watched(model, steps, *, clear_buffer=False, restart=()):
    """Learn, and say what there was at each step, before it was stored."""
    probe = Probe()
    if restart:
        model.exploration_schedule = restarting_exploration(model, restart, steps)
    model.learn(steps, callback=CallbackList([*([ClearBuffer()] if clear_buffer else []), probe]))
    return {step: rest for step, *rest in probe.seen}


# When the task changes -----------------------------------------------------------------------------------------


def test_the_buffer_is_emptied_at_a_change_and_training_waits_again():
    model = dqn()
    seen = watched(model, 200, clear_buffer=True)
    held = {step: row[0] for step, row in seen.items()}
    updates = {step: row[1] for step, row in seen.items()}
    assert [held[step] for step in (1, 50, 101)] == [0, 49, 100]
    assert updates[31] == 0 and updates[32] == 1  # the first one follows step 31, the first beyond learning_starts
    emptied = min(step for step in seen if step > 1 and held[step] == 0)
    assert emptied in (101, 102)  # the first step of the new task is step 101
    assert all(held[step] == step - emptied for step in seen if step >= emptied)
    resumed = min(step for step in seen if step > emptied and updates[step] > updates[emptied])
    assert held[resumed] - 1 >= 30  # what the first update after the change can draw from
    assert held[resumed] <= 32  # and it does not wait any longer
    assert updates[200] - updates[resumed] == 200 - resumed  # from then on every step trains
    assert model.learning_starts == 30


def test_with_several_copies_the_buffer_is_emptied_once():
    model = dqn(copies(4, every=200), train_freq=4)
    seen = watched(model, 480, clear_buffer=True)
    steps = sorted(seen)
    falls = [b for a, b in pairwise(steps) if seen[b][0] < seen[a][0]]
    assert len(falls) == 2 and 200 < falls[0] <= 220 and 400 < falls[1] <= 420


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_epsilon_falls_again_from_the_start(fraction):
    model = dqn(exploration_fraction=fraction)
    seen = watched(model, 200, restart=[100])
    for step in range(2, 201):
        since = (step - 1) % 100  # epsilon was set after the step before
        wanted = 1 - 0.95 * min(1, since / (100 * fraction))
        assert seen[step][2] == pytest.approx(wanted, abs=1e-3), step
    assert {row[3] for row in seen.values()} == {30}  # learning_starts is another option's business
    assert [seen[step][0] for step in (101, 200)] == [100, 199]


def test_epsilon_takes_as_long_as_the_task_lasts():
    schedule = restarting_exploration(dqn(), [100, 140], 200)  # half of 100, of 40, of 60 steps
    steps = {
        0: 1,
        25: 0.525,
        50: 0.05,
        99: 0.05,
        100: 1,
        110: 0.525,
        120: 0.05,
        139: 0.05,
        140: 1,
        170: 0.05,
        200: 0.05,
    }
    assert {s: round(float(schedule(1 - s / 200)), 6) for s in steps} == pytest.approx(steps, abs=1e-3)


def test_epsilon_falls_once_where_nothing_changes():
    model = dqn()
    schedule = restarting_exploration(model, [], 200)
    for remaining in (1.0, 0.9, 0.5, 0.3, 0.0):
        assert schedule(remaining) == pytest.approx(model.exploration_schedule(remaining), abs=1e-3)


def test_the_buffer_alone_leaves_epsilon_as_it_is():
    one, other = watched(dqn(), 200, clear_buffer=True), watched(dqn(), 200)
    assert [row[2] for row in one.values()] == [row[2] for row in other.values()]


def test_without_a_change_nothing_happens():
    plain = dqn(copies(every=10_000))
    plain.learn(150)
    other = dqn(copies(every=10_000))
    seen = watched(other, 150, clear_buffer=True)
    assert seen[150][0] == 149
    assert all(torch.equal(v, other.policy.state_dict()[k]) for k, v in plain.policy.state_dict().items())


def loads_without_us(path, kind=DQN):
    """Load a zip while our packages cannot be imported."""
    hidden = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition(".")[0] in ("agents", "recycle")}
    sys.modules["agents"] = sys.modules["recycle"] = None
    try:
        return kind.load(path, device="cpu")
    finally:
        del sys.modules["agents"], sys.modules["recycle"]
        sys.modules.update(hidden)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_saved_agent_is_a_plain_one(tmp_path):
    model = dqn()
    watched(model, 150, clear_buffer=True, restart=[100])
    model.save(tmp_path / "model.zip")
    loaded = loads_without_us(tmp_path / "model.zip")
    assert loaded.learning_starts == 30 and loaded.exploration_schedule(0.0) == pytest.approx(0.05)
    assert all(torch.equal(v, loaded.policy.state_dict()[k]) for k, v in model.policy.state_dict().items())


def test_a_checkpoint_on_the_way_is_a_plain_one_too(tmp_path):
    model = dqn()
    model.exploration_schedule = restarting_exploration(model, [100], 150)
    model.learn(150, callback=CallbackList([ClearBuffer(), CheckpointCallback(120, str(tmp_path), "model")]))
    loaded = loads_without_us(tmp_path / "model_120_steps.zip")
    assert loaded.num_timesteps == 120 and loaded.exploration_rate == pytest.approx(model.exploration_rate, abs=1)
    loaded.set_env(copies())
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 140


# Evaluation ----------------------------------------------------------------------------------------------------


def ppo(env, n_steps=25):
    kwargs = {"n_steps": n_steps, "batch_size": n_steps, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}
    return PPO("MlpPolicy", env, device="cpu", seed=0, **kwargs)


def table(path):
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["timesteps", "task", "return", "std", "episodes"]
    return [[int(a), int(b), float(c), float(d), int(e)] for a, b, c, d, e in rows]


@pytest.mark.parametrize("every_task", [False, True])
def test_evaluation_follows_the_training_task(tmp_path, every_task):
    env = DummyVecEnv([lambda: Monitor(Tasks(frozen=True))])
    check = Evaluation(env, tmp_path / "evaluations.csv", every=50, episodes=3, every_task=every_task)
    ppo(copies(every=100)).learn(250, callback=check)
    wanted = []
    for step, task in ((50, 0), (100, 0), (150, 1), (200, 1), (250, 2)):  # the task of the last step played
        wanted += [[step, t, 5.0 * t, 0.0, 3] for t in (range(task + 1) if every_task else [task])]
    assert table(tmp_path / "evaluations.csv") == wanted  # five steps an episode pay the task's number each


def test_evaluation_counts_the_steps_of_all_copies(tmp_path):
    env = DummyVecEnv([lambda: Monitor(Tasks(frozen=True))])
    check = Evaluation(env, tmp_path / "evaluations.csv", every=150, episodes=2, every_task=False)
    model = ppo(copies(4, every=200))
    model.learn(500, callback=check)
    assert [row[0] for row in table(tmp_path / "evaluations.csv")] == [200, 400, 500]
    assert model.num_timesteps == 500


def test_evaluation_does_not_disturb_training(tmp_path):
    plain = ppo(copies())
    plain.learn(200)
    env = DummyVecEnv([lambda: Monitor(Tasks(frozen=True))])
    other = ppo(copies())
    check = Evaluation(env, tmp_path / "evaluations.csv", every=25, episodes=2, every_task=True)
    other.learn(200, callback=check)
    assert len(table(tmp_path / "evaluations.csv")) > 8
    assert all(torch.equal(v, other.policy.state_dict()[k]) for k, v in plain.policy.state_dict().items())


def test_an_env_without_tasks_is_evaluated_as_it_is(tmp_path):
    env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"))])
    check = Evaluation(env, tmp_path / "evaluations.csv", every=32, episodes=2, every_task=True)
    ppo("CartPole-v1", 32).learn(64, callback=check)
    rows = table(tmp_path / "evaluations.csv")
    assert [row[:2] for row in rows] == [[32, 0], [64, 0]] and all(row[2] >= 8 for row in rows)


def test_learning_again_from_step_zero_evaluates_again(tmp_path):
    env = DummyVecEnv([lambda: Monitor(Tasks(frozen=True))])
    check = Evaluation(env, tmp_path / "evaluations.csv", every=50, episodes=1, every_task=False)
    model = ppo(copies())
    model.learn(100, callback=check)
    model.learn(100, callback=check)
    assert [row[0] for row in table(tmp_path / "evaluations.csv")] == [50, 100, 50, 100]
