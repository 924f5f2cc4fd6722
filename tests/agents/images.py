"""A task that is seen: which half of a small picture is brighter."""

import gymnasium as gym
import numpy as np


class Brighter(gym.Env):
    """Four pictures an episode, each 36 pixels high and wide; 1 for the right half."""

    observation_space = gym.spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 4
        return self._picture(), {}

    def step(self, action):
        reward, self.left = float(action == self.side), self.left - 1
        return self._picture(), reward, self.left == 0, False, {}

    def _picture(self):
        self.side = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 128, (1, 36, 36), dtype=np.uint8)
        picture[:, :, 18 * self.side : 18 * self.side + 18] += 100
        return picture


gym.register("Brighter-v0", entry_point=Brighter)
