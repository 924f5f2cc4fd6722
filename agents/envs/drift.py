"""What a changing task is: a clock that survives episodes, and the law that every drift obeys.

Each drift is a short class that says what task `k` does to observations, actions, rewards or the environment itself;
`Drift` decides when. Laws: task 0 is the unchanged environment; the content of task `k` depends on the seed, the class
and `k` alone, so copies with one seed are always on the same tasks; the spaces never change.
"""

import zlib
from collections.abc import Iterator
from typing import Any, SupportsFloat, TypedDict

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from agents.envs.schedule import Schedule, parse


class Clock(TypedDict, total=False):
    """When a drift changes; what every drift accepts next to its own options. `Drift` gives the meaning."""

    change: str | Schedule
    seed: int
    n_envs: int
    mid_episode: bool
    frozen: bool


class Drift(gym.Wrapper, RecordConstructorArgs):
    """Change the task of an environment on a schedule of lifetime agent timesteps.

    change: a schedule ("every:10000", "at:5000,20000", "cyclic:10000,4", "random:10000") or an object like one.
    seed: decides random change points and the content of every task; never the environment's own randomness.
    n_envs: copies that train together; each step of one copy adds this many steps to the clock.
    mid_episode: True lets a change take effect with the next observation instead of the next `reset()`.
    frozen: True for evaluation copies: the clock stands still until `set_task` or `set_drift_clock` moves it, and the
        task then changes at the next `reset()`, also with `mid_episode`.

    `info["drift/task"]` tells the task: after a step the one under which it was played and paid, after a reset the one
    of the first observation. `info["drift/changed"]` is True on the reset that enters a new task and on the first
    step under it (vectorised environments hide the infos of resets).
    Stacked drifts must share one clock; different ones are refused with a ValueError.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        change: str | Schedule = "every:10000",
        seed: int = 0,
        n_envs: int = 1,
        mid_episode: bool = False,
        frozen: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(
            self, change=change, seed=seed, n_envs=n_envs, mid_episode=mid_episode, frozen=frozen
        )
        gym.Wrapper.__init__(self, env)
        if n_envs < 1:
            raise self.bad_value(f"n_envs of 1 or more, got {n_envs}. Pass the number of training copies.")
        if seed < 0:
            raise self.bad_value(f"a seed of 0 or more, got {seed}. Pass a non-negative integer.")
        self.schedule: Schedule = parse(change, seed) if isinstance(change, str) else change
        self.drift_seed = seed
        self.n_envs = n_envs
        self.mid_episode = mid_episode
        self.frozen = frozen
        self._clock = 0
        self._task: int | None = None  # nothing is entered before the first reset
        self._pinned: int | None = None
        self._fresh = False
        for inner in list(self._stack())[1:2]:
            self._share_clock_with(inner)

    # What a drift may override ------------------------------------------------------------------------------------

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Prepare `task`; `rng` is seeded by the drift's seed, its class and `task`. Task 0 must change nothing."""
        raise NotImplementedError(f"{type(self).__name__} must say what a task is: override enter(task, rng).")

    def observation(self, observation: Any) -> Any:
        """Turn the environment's observation into the one of the task in effect."""
        return observation

    def action(self, action: Any) -> Any:
        """Turn the agent's action into the one that the environment receives."""
        return action

    def reward(self, reward: float) -> float:
        """Turn the environment's reward into the one of the task in effect."""
        return reward

    # The clock ----------------------------------------------------------------------------------------------------

    @property
    def drift_clock(self) -> int:
        """Lifetime agent timesteps, summed over all copies."""
        return self._clock

    @property
    def drift_task(self) -> int:
        """The task in effect; before the first reset, the one that is due."""
        return self._due() if self._task is None else self._task

    def set_drift_clock(self, steps: int) -> None:
        """Move the clock of all stacked drifts to `steps`, to resume or to follow training; acts at the next reset."""
        if steps < 0:
            raise self.bad_value(f"a clock of 0 or more, got {steps}. Pass lifetime agent timesteps.")
        for drift in self._stack():
            drift._clock, drift._pinned = int(steps), None

    def set_task(self, task: int) -> None:
        """Put all stacked drifts of a frozen copy on `task` from the next reset, whatever the clock says."""
        if not self.frozen:
            raise self.bad_value("frozen=True for set_task, got a running clock. Use set_drift_clock(steps) instead.")
        if task < 0:
            raise self.bad_value(f"a task of 0 or more, got {task}. Pass an index that the schedule can reach.")
        for drift in self._stack():
            drift._pinned = int(task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode on the task that is due; the clock goes on."""
        changed = self._follow()
        observation, info = self.env.reset(seed=seed, options=options)
        info["drift/task"], info["drift/changed"] = self.drift_task, changed
        return self.observation(observation), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Play one step under the task in effect, then move the clock by `n_envs`."""
        if self._task is None:
            raise gym.error.ResetNeeded(f"{type(self).__name__} has no task yet: call reset() before step().")
        observation, reward, terminated, truncated, info = self.env.step(self.action(action))
        reward = self.reward(float(reward))
        info["drift/task"], info["drift/changed"] = self._task, self._fresh
        self._fresh = False
        if not self.frozen:
            self._clock += self.n_envs
            if self.mid_episode:
                self._follow()
        return self.observation(observation), reward, terminated, truncated, info

    def _due(self) -> int:
        return self.schedule.task_at(self._clock) if self._pinned is None else self._pinned

    def _follow(self) -> bool:
        due, before = self._due(), self._task
        if due == before:
            return False
        self._task = due
        self.enter(due, np.random.default_rng([self.drift_seed, zlib.crc32(type(self).__name__.encode()), due]))
        changed = before is not None
        self._fresh = changed
        return changed

    def _stack(self) -> Iterator["Drift"]:
        env: gym.Env = self
        while isinstance(env, gym.Wrapper):
            if isinstance(env, Drift):
                yield env
            env = env.env

    def _share_clock_with(self, inner: "Drift") -> None:
        for name in ("schedule", "n_envs", "mid_episode", "frozen"):
            mine, other = getattr(self, name), getattr(inner, name)
            if mine != other:
                raise self.bad_value(
                    f"the {name} of {type(inner).__name__} below it ({other}), got {mine}. "
                    "Give stacked drifts one clock."
                )
        self._clock, self._pinned = inner._clock, inner._pinned

    # Refusals -----------------------------------------------------------------------------------------------------

    def bad_value(self, message: str) -> ValueError:
        """Build the error for a bad option: "expected what, got what. What to do."."""
        return ValueError(f"{type(self).__name__} expects {message}")

    def box(self, *, floating: bool = False) -> gym.spaces.Box:
        """Return the Box observation space below, or raise TypeError saying what to do about another one."""
        space, name = self.env.observation_space, type(self).__name__
        if not isinstance(space, gym.spaces.Box):
            raise TypeError(
                f"{name} expects a Box observation space, got {space}. "
                "Apply gymnasium.wrappers.FlattenObservation first."
            )
        if floating and not np.issubdtype(space.dtype, np.floating):
            raise TypeError(
                f"{name} expects floating-point observations, got {space}. Use permute or mask, or convert them first."
            )
        return space
