"""A contextual bandit on handwritten digits, and the drift that redraws its right answers."""

from functools import lru_cache
from typing import Any, Unpack

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from agents.envs.drift import Clock, Drift

CLASSES = 10


class DigitsBandit(gym.Env[NDArray[np.float32], np.int64]):
    """Name the digit on an 8x8 image: reward 1.0 if right, else 0.0.

    Observations are 64 float32 pixels from 0 to 1; the ten actions are the classes. The images of an episode are
    drawn with replacement at `reset` by the environment's own generator. The actions have no influence on what comes
    next, so a discount (gamma) of 0 is the right one; the episode terminates after `episode_length` answers.

    images: use only the first so many of scikit-learn's 1797 digits; None for all.
    `answers` holds the right action of each image and may be replaced; `labels` holds the true classes.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  gymnasium declares it so

    def __init__(self, *, episode_length: int = 20, images: int | None = None, render_mode: str | None = None) -> None:
        pixels, labels = _digits()
        if episode_length < 1:
            raise ValueError(f"DigitsBandit expects an episode_length of 1 or more, got {episode_length}. Use 20.")
        if images is not None and not 1 <= images <= len(pixels):
            raise ValueError(f"DigitsBandit expects 1 to {len(pixels)} images, got {images}. Use None for all of them.")
        if render_mode is not None:
            raise ValueError(f"DigitsBandit cannot be rendered, got render_mode={render_mode!r}. Leave it out.")
        self.render_mode = None
        self.episode_length = episode_length
        self.pixels, self.labels = pixels[:images], labels[:images]
        self.answers = self.labels
        self.observation_space = gym.spaces.Box(0.0, 1.0, (pixels.shape[1],), np.float32)
        self.action_space = gym.spaces.Discrete(CLASSES)
        self._shown: list[int] = []  # images of this episode, and one more to look at when it is over
        self._answered = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw the images of an episode and show the first."""
        super().reset(seed=seed)
        self._shown = self.np_random.integers(len(self.pixels), size=self.episode_length + 1).tolist()
        self._answered = 0
        return self.pixels[self._shown[0]].copy(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Pay for the answer and show the next image."""
        reward = float(self.answers[self._shown[self._answered]] == action)
        self._answered += 1
        over = self._answered == self.episode_length
        return self.pixels[self._shown[self._answered]].copy(), reward, over, False, {}


class Relabel(Drift):
    """Redraw the right action of every image of a `DigitsBandit`, each independently and uniformly out of ten."""

    def __init__(self, env: gym.Env, **clock: Unpack[Clock]) -> None:
        RecordConstructorArgs.__init__(self, **clock)
        super().__init__(env, **clock)
        if not isinstance(env.unwrapped, DigitsBandit):
            raise TypeError(f"Relabel expects a DigitsBandit, got {type(env.unwrapped).__name__}. Use DigitsBandit-v1.")

    def enter(self, task: int, rng: np.random.Generator) -> None:
        """Draw and set the table of right answers; task 0 has the true classes."""
        bandit: Any = self.env.unwrapped
        bandit.answers = rng.integers(CLASSES, size=len(bandit.labels)) if task else bandit.labels


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # takes a second to import, and only this environment needs it

    data = load_digits()
    pixels, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    for table in (pixels, labels):
        table.flags.writeable = False  # every environment of this process looks at the same tables
    return pixels, labels
