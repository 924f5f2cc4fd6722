"""The whole state of an environment's copy as bytes, wherever it runs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium.utils import EzPickle

from agents.envs.drift import Drift


class Snapshot(gym.Wrapper):
    """Outermost wrapper of a copy: takes a snapshot of all below, and returns to one.

    A snapshot is a pickle: the environment in the middle of its episode, its random generator, the clocks of its
    drifts. Copies in other processes take theirs there, through a vectorised environment's ``env_method``. Return
    only to snapshots of your own: to unpickle runs what the file says.

    An environment that cannot be pickled whole is known by its random generator and the clocks of its drifts alone;
    whoever returns to such a snapshot must reset it.
    """

    def why_inexact(self) -> str:
        """Why a snapshot does not hold everything; "" if it does."""
        return self._pickled()[1]

    def take_snapshot(self) -> bytes:
        """Everything, or where :meth:`why_inexact` says why not, the generator and the clocks."""
        whole, why = self._pickled()
        if not why:
            return whole
        clocks = [layer.drift_clock for layer in _layers(self.env) if isinstance(layer, Drift)]
        partly: bytes = cloudpickle.dumps({"generator": self.env.unwrapped.np_random, "clocks": clocks})
        return partly

    def _pickled(self) -> tuple[bytes, str]:
        for layer in _layers(self.env):
            if getattr(type(layer), "__getstate__", None) is EzPickle.__getstate__:
                return b"", f"{type(layer).__name__} pickles as it was built (EzPickle), not where it stands"
        try:
            return cloudpickle.dumps({"env": self.env}), ""
        except Exception as error:  # whatever an environment's author raises
            return b"", f"{type(self.env.unwrapped).__name__} does not pickle: {' '.join(str(error).split())}"

    def return_to(self, snapshot: bytes) -> bool:
        """Go on where a snapshot was taken; False if the environment must be reset first."""
        state: dict[str, Any] = pickle.loads(snapshot)
        if "env" in state:
            self.env = state["env"]
            return True
        self.env.unwrapped.np_random = state["generator"]
        for layer, clock in zip((d for d in _layers(self.env) if isinstance(d, Drift)), state["clocks"], strict=True):
            layer.set_drift_clock(clock)
        return False


def _layers(env: gym.Env) -> Iterator[gym.Env]:
    yield env
    while isinstance(env, gym.Wrapper):
        env = env.env
        yield env
