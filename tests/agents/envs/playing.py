"""Ways to build drifts, play them and compare what was seen; shared by the tests beside this file."""

import gymnasium as gym
import numpy as np

from agents.envs import DRIFTS, make_env

BANDIT = "DigitsBandit-v1"
HOME = {name: "CartPole-v1" for name in DRIFTS} | dict.fromkeys(
    ("remap", "relabel", "reward_scale", "reward_flip"), BANDIT
)


def build(name, env_id=None, **options):
    return make_env(env_id or HOME[name], drift=name, **options)


def play(env, steps, seed=None):
    """Everything that an agent sees of `steps` steps of fixed actions, resets included."""
    actions = np.random.default_rng(0)
    seen = [env.reset(seed=seed)]
    for _ in range(steps):
        action = actions.integers(2) if isinstance(env.action_space, gym.spaces.Discrete) else [actions.uniform(-2, 2)]
        seen.append(env.step(action))
        if seen[-1][2] or seen[-1][3]:
            seen.append(env.reset())
    return seen


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:] == b[1:]


def differ(one, other):
    return any(not np.array_equal(a[0], b[0]) or a[1:-1] != b[1:-1] for a, b in zip(one, other, strict=False))


def on_task(task, name, env_id=None, **options):
    env = build(name, env_id, frozen=True, **options)
    env.set_task(task)
    return env


def tasks_of(seen):
    return [step[-1]["drift/task"] for step in seen]


def content(name, attribute, tasks, env_id=None, **options):
    env, values = build(name, env_id, frozen=True, **options), []
    for task in tasks:
        env.set_task(task)
        env.reset()
        values.append(getattr(env, attribute))
    return values


class Fixed(gym.Env):
    """Shows whatever lies in its space."""

    def __init__(self, space, actions=None):
        self.observation_space, self.action_space = space, actions or gym.spaces.Discrete(3, start=2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.received = action
        return self.observation_space.sample(), 1.0, False, False, {}


BOXES = {
    "symmetric": gym.spaces.Box(-1, 1, (6,)),
    "uneven": gym.spaces.Box(np.float32([-3, 0.5, -7, -np.inf]), np.float32([-1, 2.5, 1, 9])),
    "double": gym.spaces.Box(-0.1, 0.3, (2, 3), np.float64),
    "huge": gym.spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (4,)),
    "pixels": gym.spaces.Box(0, 255, (6, 5, 3), np.uint8),
    "bits": gym.spaces.Box(0, 1, (4, 4), np.bool_),
}
