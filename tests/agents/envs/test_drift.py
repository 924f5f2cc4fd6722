import copy
import functools
import pickle
import random
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from agents.envs import DRIFTS, OffsetObservation, make_env
from tests.agents.envs.playing import BANDIT, HOME, assert_same, build, differ, on_task, play, tasks_of

CASES = [(name, HOME[name]) for name in DRIFTS] + [
    *((name, "Pendulum-v1") for name in ("permute", "offset", "scale", "mask", "reward_scale", "reward_flip")),
    *((name, BANDIT) for name in ("permute", "offset", "scale", "mask")),
    ("remap", "CartPole-v1"),
]
every_drift = pytest.mark.parametrize("name", DRIFTS)
every_case = pytest.mark.parametrize(("name", "env_id"), CASES)


@every_case
@pytest.mark.parametrize("task", [0, 3])
@pytest.mark.filterwarnings("ignore")
def test_both_checkers_accept_every_drift(name, env_id, task):
    for check in (functools.partial(check_env, skip_render_check=True), check_env_for_sb3):
        check(on_task(task, name, env_id))


@every_case
def test_task_0_is_the_unchanged_environment(name, env_id):
    plain, drifted = play(gym.make(env_id), 60, seed=3), play(build(name, env_id), 60, seed=3)
    assert set(tasks_of(drifted)) == {0}
    for step in drifted:
        assert step[-1].pop("drift/task") == 0
        assert step[-1].pop("drift/changed") is False
    assert_same(plain, drifted)


@every_case
def test_every_task_differs_from_the_one_before(name, env_id):
    seen = [play(on_task(task, name, env_id), 40, seed=3) for task in range(7)]
    assert [differ(before, after) for before, after in pairwise(seen)] == [True] * 6


@every_drift
def test_copies_with_one_seed_are_on_the_same_tasks_and_other_seeds_are_not(name):
    options = {"change": "random:15", "n_envs": 1}
    one, twin = build(name, seed=8, rank=0, **options), build(name, seed=8, rank=5, **options)
    random.seed(1)
    np.random.seed(1)
    first = play(one, 120, seed=4)
    random.seed(2)
    np.random.seed(2)
    assert_same(first, play(twin, 120, seed=4))
    assert max(tasks_of(first)) >= 3
    assert differ(first, play(build(name, seed=9, **options), 120, seed=4))


@every_drift
def test_the_content_of_a_task_ignores_how_it_was_reached_and_every_reset_seed(name):
    straight, detour = on_task(4, name), build(name, frozen=True, rank=3)
    for task, seed in ((1, 10), (6, 11), (2, None)):
        detour.set_task(task)
        play(detour, 5, seed=seed)
    detour.set_task(4)
    expected, seen = play(straight, 40, seed=5), play(detour, 40, seed=5)
    for record in (expected, seen):
        assert set(tasks_of(record)) == {4}
        for step in record:
            step[-1].pop("drift/changed")
    assert_same(expected, seen)


@every_drift
def test_the_clock_counts_all_copies_and_survives_resets(name):
    env = build(name, n_envs=4, change="every:40")
    for episode in range(3):
        env.reset(seed=episode)
        assert env.drift_clock == episode * 8
        for _ in range(2):
            env.step(env.action_space.sample())
    assert env.drift_clock == 24


@pytest.mark.parametrize("mid_episode", [False, True])
def test_a_change_waits_for_the_reset_unless_told_otherwise(mid_episode):
    options = {"env_kwargs": {"episode_length": 10}, "drift_kwargs": {"mid_episode": mid_episode}, "n_envs": 2}
    seen = play(build("reward_flip", BANDIT, change="at:12,30", **options), 30, seed=0)
    steps = [step[-1] for step in seen if len(step) == 5]
    resets = [reset[-1] for reset in seen if len(reset) == 2]
    # Clock 12 stands after step 6 and clock 30 after step 15; episodes end after steps 10 and 20.
    first, second = (6, 15) if mid_episode else (10, 20)
    assert [info["drift/task"] for info in steps] == [0] * first + [1] * (second - first) + [2] * (30 - second)
    assert [i for i, info in enumerate(steps) if info["drift/changed"]] == [first, second]
    assert [info["drift/task"] for info in resets] == [0, 1, 2, 2]
    assert [info["drift/changed"] for info in resets] == [False, *[not mid_episode] * 2, False]


def test_mid_episode_changes_the_observation_before_the_action_that_follows_it():
    env = build("offset", change="at:3", drift_kwargs={"mid_episode": True, "strength": 100.0})
    plain = gym.make("CartPole-v1")
    env.reset(seed=0), plain.reset(seed=0)
    shifts = []
    for action in (0, 1, 0, 1, 0):
        shifts.append(env.step(action)[0] - plain.step(action)[0])
    assert np.abs(shifts[1]).max() == 0
    assert np.abs(shifts[2]).max() > 1  # the third step moved the clock to 3
    np.testing.assert_allclose(shifts[2:], [env.offset] * 3, atol=1e-4)


def test_four_copies_change_at_the_same_lifetime_step():
    fns = [
        functools.partial(
            build, "relabel", env_kwargs={"episode_length": 5}, change="every:40", seed=1, n_envs=4, rank=rank
        )
        for rank in range(4)
    ]
    vec = DummyVecEnv([lambda fn=fn: Monitor(fn()) for fn in fns])
    first = vec.reset()
    assert len({row.tobytes() for row in first}) == 4  # the copies see different images ...
    # Due after steps 10 and 20; the reset after step 13 makes the later episodes end after steps 18 and 23.
    for step, task in enumerate([0] * 10 + [1] * 13 + [2] * 2):
        infos = vec.step(np.zeros(4, int))[3]
        assert [info["drift/task"] for info in infos] == [task] * 4
        assert [info["drift/changed"] for info in infos] == [step in (10, 23)] * 4
        if step == 12:
            vec.reset()
    assert vec.get_attr("drift_clock") == [100] * 4
    tables = [env.unwrapped.answers for env in vec.envs]
    assert all((table == tables[0]).all() for table in tables)  # ... and have the same answers
    assert (tables[0] != vec.envs[0].unwrapped.labels).mean() > 0.8


def test_copies_in_other_processes_share_the_schedule_and_follow_orders():
    fns = [
        functools.partial(make_env, "CartPole-v1", drift="remap", change="every:2", n_envs=2, frozen=True, rank=rank)
        for rank in range(2)
    ]
    vec = SubprocVecEnv(fns)
    try:
        vec.env_method("set_drift_clock", 6)
        vec.seed(0)
        vec.reset()
        assert vec.get_attr("drift_task") == [3, 3]
        assert [info["drift/task"] for info in vec.step(np.array([0, 0]))[3]] == [3, 3]
        vec.env_method("set_task", 1)
        vec.reset()
        assert [info["drift/changed"] for info in vec.step(np.array([0, 0]))[3]] == [True, True]
        assert [m.tolist() for m in vec.get_attr("mapping")] == [[1, 0], [1, 0]]
    finally:
        vec.close()


@every_drift
def test_frozen_copies_follow_the_task_they_are_given_from_the_next_reset(name):
    env = build(name, change="every:10", frozen=True, drift_kwargs={"mid_episode": True})
    assert set(tasks_of(play(env, 40))) == {0}
    env.reset()
    env.set_task(3)
    assert env.step(env.action_space.sample())[-1]["drift/task"] == 0
    assert env.reset()[1] == {"drift/task": 3, "drift/changed": True}
    assert env.step(env.action_space.sample())[-1]["drift/changed"] is True
    assert env.step(env.action_space.sample())[-1]["drift/changed"] is False
    env.set_drift_clock(57)
    assert env.drift_task == 3
    assert env.reset()[1] == {"drift/task": 5, "drift/changed": True}
    assert (env.drift_clock, env.drift_task) == (57, 5)


@every_drift
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_made_mid_run_continues_identically(name, copied):
    env = build(name, change="random:12", n_envs=2)
    play(env, 33, seed=2)
    twin = copied(env)
    assert (twin.drift_clock, twin.drift_task) == (66, env.drift_task)
    actions = np.random.default_rng(1)
    tasks = set()
    for _ in range(60):
        action = actions.integers(2)
        one, other = env.step(action), twin.step(action)
        assert_same([one], [other])
        tasks.add(one[-1]["drift/task"])
        if one[2] or one[3]:
            assert_same([env.reset()], [twin.reset()])
    assert len(tasks) >= 3


@every_drift
def test_a_new_process_resumes_at_the_clock_without_a_change_to_report(name):
    env = build(name, change="every:10", n_envs=2)
    env.set_drift_clock(25)
    assert env.reset()[1] == {"drift/task": 2, "drift/changed": False}
    env.step(env.action_space.sample())
    assert env.drift_clock == 27


@every_drift
def test_the_spec_builds_the_same_drift_again(name):
    env = build(name, change="every:10", seed=4, n_envs=3, frozen=True)
    twin = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    for copy_ in (env, twin):
        copy_.set_task(2)
    assert_same(play(env, 30, seed=6), play(twin, 30, seed=6))


def test_a_running_clock_cannot_be_pinned_and_nothing_runs_backwards():
    env = build("offset")
    with pytest.raises(ValueError, match=r"frozen=True for set_task, .* Use set_drift_clock"):
        env.set_task(1)
    with pytest.raises(ValueError, match=r"a clock of 0 or more, got -1"):
        env.set_drift_clock(-1)
    with pytest.raises(ValueError, match=r"a task of 0 or more, got -1"):
        build("offset", frozen=True).set_task(-1)
    with pytest.raises(ValueError, match=r"a seed of 0 or more, got -1"):
        OffsetObservation(gym.make("CartPole-v1"), seed=-1)
    with pytest.raises(gym.error.ResetNeeded, match=r"OffsetObservation has no task yet: call reset\(\)"):
        env.step(0)
