"""An environment in which something goes wrong at a step, as a file says: ``<what> <step>``, one a line."""

import os
import resource
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


def file_size(most):
    """Let no file of this process grow beyond so many bytes: what a full disk does, done by the kernel."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if most is not None else LIMIT[0], LIMIT[1]))


JAMS = []
"""A file to which nothing more can be written after a ``jam``."""


def jam(path):
    """Put a device in a file's place that has no room, ever."""
    if not path.is_symlink():
        path.rename(path.with_name("kept"))
        path.symlink_to("/dev/full")


HAPPENS = {
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigint": lambda: os.kill(os.getpid(), signal.SIGINT),
    "exit": lambda: os._exit(3),
    "full": lambda: file_size(300_000),  # logs still fit, a checkpoint does not
    "jam": lambda: jam(*JAMS),
    "room": lambda: file_size(None),
}


class Faulty(gym.Env):
    """Tells a number, and pays for its sign."""

    observation_space = gym.spaces.Box(-4, 4, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, faults=""):
        self.faults, self.life, self.left = faults, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self._numbers(), {}

    def step(self, action):
        self.life, self.left = self.life + 1, self.left - 1
        for line in Path(self.faults).read_text().splitlines() if self.faults else ():
            what, step = line.split()
            if self.life == int(step):
                HAPPENS[what]()
        reward = float((self.now[0] > 0) == bool(action))
        return self._numbers(), reward, self.left == 0, False, {}

    def _numbers(self):
        self.now = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.now.copy()


class Unpicklable(Faulty):
    """Holds what no pickle can."""

    def __init__(self, faults=""):
        super().__init__(faults)
        self.open = (line for line in ())


gym.register("Faulty-v0", entry_point=Faulty)
gym.register("Unpicklable-v0", entry_point=Unpicklable)


class Gated(Faulty):
    """Waits at a step until there is a file ``open`` in a folder, and leaves one there named after its process."""

    def __init__(self, gate, at=73, faults=""):
        super().__init__(faults)
        self.gate, self.at = gate, at

    def step(self, action):
        if self.life + 1 == self.at:
            Path(self.gate, str(os.getpid())).touch()
            while not Path(self.gate, "open").exists():
                time.sleep(0.02)
        return super().step(action)


gym.register("Gated-v0", entry_point=Gated)
