"""Drifts of what passes between agent and environment: observations, actions and rewards."""

from typing import Any, Unpack

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from agents.envs.drift import Clock, Drift


class PermuteObservation(Drift):
    """Reorder the elements of the observation; each task has an order of its own, never that of the task before.

    Works on every Box of two elements or more, images included. Its bounds become the widest of all elements, since
    any element may come to any place; bounds that are the same everywhere stay as they are.
    """

    def __init__(self, env: gym.Env, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, **clock)
        super().__init__(env, **clock)
        space = self.box()
        if np.prod(space.shape) < 2:
            raise self.bad_value(f"two observed elements or more, got shape {space.shape}. Use offset or mask.")
        if (space.low != space.low.min()).any() or (space.high != space.high.max()).any():
            self.observation_space = _box_like(space, space.low.min(), space.high.max())
        self._shape = space.shape

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw an order of all elements."""
        self.order = shuffled(int(np.prod(self._shape)), task, rng).reshape(self._shape)

    def observation(self, observation: Any) -> Any:
        """Reorder; dtype and shape stay."""
        return np.take(observation, self.order)


class OffsetObservation(Drift):
    """Add a constant to each observed element, drawn for each task uniformly from -strength to strength.

    strength: in the observation's own units. The bounds widen by it on both sides. Integer observations are refused.
    """

    def __init__(self, env: gym.Env, *, strength: float = 1.0, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, strength=strength, **clock)
        super().__init__(env, **clock)
        space = self.box(floating=True)
        if not 0 < strength < np.inf:
            raise self.bad_value(f"a strength above 0, got {strength}. Pass the largest offset to add.")
        self.strength = strength
        with np.errstate(over="ignore"):  # bounds at the largest float become infinite
            self.observation_space = _box_like(space, space.low - strength, space.high + strength)

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw one offset for each element."""
        space = self.box()
        width = self.strength if task else 0.0
        self.offset = rng.uniform(-width, width, space.shape).astype(space.dtype)

    def observation(self, observation: Any) -> Any:
        """Add the offset."""
        return observation + self.offset


class ScaleObservation(Drift):
    """Multiply each observed element by a factor, drawn for each task log-uniformly from 1/strength to strength.

    strength: above 1. The bounds widen to the widest that any factor gives. Integer observations are refused.
    """

    def __init__(self, env: gym.Env, *, strength: float = 2.0, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, strength=strength, **clock)
        super().__init__(env, **clock)
        space = self.box(floating=True)
        if not 1 < strength < np.inf:
            raise self.bad_value(f"a strength above 1, got {strength}. Pass the largest factor to multiply with.")
        largest = space.dtype.type(strength)
        self._range = 1 / largest, largest
        with np.errstate(over="ignore"):
            low = np.minimum(space.low * self._range[0], space.low * largest)
            high = np.maximum(space.high * self._range[0], space.high * largest)
        self.observation_space = _box_like(space, low, high)

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw one factor for each element."""
        space = self.box()
        width = np.log(float(self._range[1])) if task else 0.0
        self.factor = np.exp(rng.uniform(-width, width, space.shape)).astype(space.dtype).clip(*self._range)

    def observation(self, observation: Any) -> Any:
        """Multiply by the factor."""
        return observation * self.factor


class MaskObservation(Drift):
    """Blank a share of the observed elements with zeros; each task blanks others, task 0 none.

    fraction: share of the elements, above 0 and below 1; at least one is blanked and one is kept. Works on every Box
    of two elements or more; its bounds widen where they leave out zero.
    """

    def __init__(self, env: gym.Env, *, fraction: float = 0.25, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, fraction=fraction, **clock)
        super().__init__(env, **clock)
        space = self.box()
        size = int(np.prod(space.shape))
        if size < 2:
            raise self.bad_value(f"two observed elements or more, got shape {space.shape}. Use offset instead.")
        if not 0 < fraction < 1:
            raise self.bad_value(f"a fraction between 0 and 1, got {fraction}. Pass the share of elements to blank.")
        self._count = min(max(round(fraction * size), 1), size - 1)
        self._turns = np.random.default_rng(self.drift_seed).permutation(size)
        if (space.low > 0).any() or (space.high < 0).any():
            self.observation_space = _box_like(space, np.minimum(space.low, 0), np.maximum(space.high, 0))

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw the elements to blank."""
        shape = self.box().shape
        self.masked = np.zeros(shape, bool)
        if task:
            # Elements take turns: one is surely blanked now and surely kept in the next task, so that masks differ.
            blanked, kept = self._turns[task % self.masked.size], self._turns[(task - 1) % self.masked.size]
            others = np.setdiff1d(np.arange(self.masked.size), [blanked, kept])
            self.masked.flat[[blanked, *rng.permutation(others)[: self._count - 1]]] = True

    def observation(self, observation: Any) -> Any:
        """Blank a copy."""
        observation = np.array(observation)
        observation[self.masked] = 0
        return observation


class RemapAction(Drift):
    """Shuffle what the actions of a Discrete space do; each task has its own mapping, never that of the task before.

    With two actions the mapping swaps at every change.
    """

    def __init__(self, env: gym.Env, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, **clock)
        super().__init__(env, **clock)
        space = env.action_space
        if not isinstance(space, gym.spaces.Discrete):
            raise TypeError(
                f"RemapAction expects a Discrete action space, got {space}. Change observations or rewards instead."
            )
        if space.n < 2:
            raise self.bad_value(f"two actions or more, got {space}. Change observations or rewards instead.")
        self._count, self._start = int(space.n), int(space.start)

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw a mapping of all actions."""
        self.mapping = shuffled(self._count, task, rng) + self._start

    def action(self, action: Any) -> Any:
        """Look the action up."""
        index = int(action) - self._start
        if not 0 <= index < self._count:
            raise gym.error.InvalidAction(f"RemapAction expects an action of {self.action_space}, got {action!r}.")
        return self.mapping[index]


class ScaleReward(Drift):
    """Multiply the reward by a factor, drawn for each task log-uniformly from `low` to `high`; 1 for task 0."""

    def __init__(self, env: gym.Env, *, low: float = 0.1, high: float = 10.0, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, low=low, high=high, **clock)
        super().__init__(env, **clock)
        if not 0 < low < high < np.inf:
            raise self.bad_value(
                f"0 < low < high, got low={low} and high={high}. Use reward_flip for a change of sign."
            )
        self._range = low, high

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw the factor."""
        low, high = self._range
        self.factor = low * (high / low) ** rng.uniform() if task else 1.0

    def reward(self, reward: float) -> float:
        """Multiply by the factor."""
        return self.factor * reward


class FlipReward(Drift):
    """Change the sign of the reward in every odd task."""

    def __init__(self, env: gym.Env, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, **clock)
        super().__init__(env, **clock)

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Take the sign of the task; nothing is drawn."""
        self.sign = -1.0 if task % 2 else 1.0

    def reward(self, reward: float) -> float:
        """Multiply by the sign."""
        return self.sign * reward


def _box_like(space: gym.spaces.Box, low: Any, high: Any) -> gym.spaces.Box:
    low, high = np.broadcast_to(low, space.shape), np.broadcast_to(high, space.shape)
    return gym.spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype.type)


def shuffled(count: int, task: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw the order of `count` elements for a task: the identity for task 0, never the order of the task before.

    Odd tasks get odd permutations and even tasks even ones. Independent draws would often repeat where there are few
    elements: two actions would stay as they were at every second change. Only task 0 is the identity (except for two
    elements, where all even tasks are).
    """
    identity = np.arange(count)
    if task == 0:
        return identity
    while True:
        order = rng.permutation(count)
        if _parity(order) != task % 2:
            order[:2] = order[1::-1]
        if count == 2 or (order != identity).any():
            return order


def _parity(order: NDArray[np.intp]) -> int:
    following, seen, cycles = order.tolist(), [False] * len(order), 0
    for start in range(len(following)):
        cycles += not seen[start]
        while not seen[start]:
            seen[start] = True
            start = following[start]
    return (len(following) - cycles) % 2
