"""Drifts of the laws of motion: another gravity, other masses, lengths and forces for each task."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.utils import RecordConstructorArgs

from agents.envs.drift import Clock, Drift


class Physics(Drift):
    """Draw named attributes of the unwrapped environment anew for each task, and recompute what depends on them.

    A subclass names the environment it knows, the range of each attribute and, in `derive`, the quantities that the
    environment computed from them when it was built. Values are drawn log-uniformly; task 0 has the values that the
    environment came with.
    parameters: the attributes that change, as a sequence or as one string with commas; None for all that have a range.
    """

    simulator: ClassVar[type[gym.Env]]
    ranges: ClassVar[Mapping[str, tuple[float, float]]]

    def __init__(self, env: gym.Env, *, parameters: str | Sequence[str] | None = None, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, parameters=parameters, **clock)
        super().__init__(env, **clock)
        name = type(self).__name__
        if not isinstance(env.unwrapped, self.simulator):
            raise TypeError(
                f"{name} expects a {self.simulator.__name__}, got {type(env.unwrapped).__name__}. "
                "Choose a drift of observations, actions or rewards."
            )
        if isinstance(parameters, str):
            parameters = [part.strip() for part in parameters.split(",")]
        chosen = set(self.ranges if parameters is None else parameters)
        if not chosen or chosen - set(self.ranges):
            raise self.bad_value(f"parameters out of {', '.join(self.ranges)}; got {parameters}. Name one or more.")
        self._nominal = {key: getattr(env.unwrapped, key) for key in self.ranges if key in chosen}

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw and set the chosen attributes."""
        simulator: Any = self.env.unwrapped
        for name, (low, high) in self.ranges.items():
            drawn = low * (high / low) ** rng.uniform()  # also if not chosen: choosing fewer does not move the rest
            if name in self._nominal:
                setattr(simulator, name, drawn if task else self._nominal[name])
        self.derive(simulator)

    def derive(self, simulator: Any) -> None:
        """Recompute the quantities that the simulator derived from its attributes when it was built."""


class CartPolePhysics(Physics):
    """Change gravity, masses, pole length and motor force of CartPole.

    SI units; `length` is half the pole's length, as in gymnasium. Gymnasium's own values: gravity 9.8, masscart 1,
    masspole 0.1, length 0.5, force_mag 10. No task is out of reach: at every corner of the ranges
    the sign of a linear feedback, tuned for that corner, keeps the pole up for more than 400 of 500 steps.
    """

    simulator = CartPoleEnv
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "gravity": (5.0, 20.0),
        "masscart": (0.3, 3.0),
        "masspole": (0.03, 0.6),
        "length": (0.25, 1.5),
        "force_mag": (5.0, 20.0),
    }

    def derive(self, simulator: Any) -> None:
        """Recompute the total mass and the pole's mass times length, which CartPole stores once."""
        simulator.total_mass = simulator.masspole + simulator.masscart
        simulator.polemass_length = simulator.masspole * simulator.length
