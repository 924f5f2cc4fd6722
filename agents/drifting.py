"""What training does when the task changes: old replay is wrong then, and a greedy agent does not look again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv


class ClearBuffer(BaseCallback):
    """At each task change DQN forgets its transitions, and waits for ``learning_starts`` new ones."""

    def __init__(self) -> None:
        super().__init__()
        self._task = 0
        self._learning_starts: int | None = None  # the model's own

    def _init_callback(self) -> None:
        assert isinstance(self.model, DQN)
        if self._learning_starts is None:
            self._learning_starts = self.model.learning_starts

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        task = max((info.get("drift/task", 0) for info in self.locals.get("infos", ())), default=self._task)
        if task != self._task:
            self._task = task
            assert isinstance(self.model, DQN)
            assert self.model.replay_buffer is not None and self._learning_starts is not None
            self.model.replay_buffer.reset()
            self.model.learning_starts = self.num_timesteps + self._learning_starts

    def _on_training_end(self) -> None:
        assert isinstance(self.model, DQN) and self._learning_starts is not None
        self.model.learning_starts, self._learning_starts = self._learning_starts, None

    def state_dict(self) -> dict[str, Any]:
        """The task of the moment, and the model's own ``learning_starts``."""
        return {"task": self._task, "learning_starts": self._learning_starts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._task, self._learning_starts = state["task"], state["learning_starts"]


def restarting_exploration(model: DQN, changes: Sequence[int], steps: int) -> Callable[[float], float]:
    """Epsilon that falls again from its initial value at each change, as a schedule for SB3.

    It falls over ``exploration_fraction`` of the steps until the next change. Being a partial of ``numpy.interp``,
    it travels in the model's zip without this package.

    Args:
        model: gives the initial and final values and the fraction.
        changes: lifetime steps at which the task changes.
        steps: lifetime steps of the whole training.
    """
    first, last = model.exploration_initial_eps, model.exploration_final_eps
    points: list[tuple[float, float]] = []
    for start, end in pairwise([0, *changes, steps]):
        points += [(start, first), (start + model.exploration_fraction * (end - start), last), (end - 1e-3, last)]
    remaining = [1 - step / steps for step, _ in reversed(points)]  # SB3 asks by the share of training that is left
    return partial(np.interp, xp=remaining, fp=[epsilon for _, epsilon in reversed(points)])


class Evaluation(BaseCallback):
    """Evaluate the policy every ``every`` steps on copies of the environment that follow the training task.

    Appends ``timesteps,task,return,std,episodes`` to ``path`` and records ``eval/mean_reward``.

    Args:
        env: the evaluation copies, with frozen clocks.
        path: where the table goes.
        every: environment steps from evaluation to evaluation.
        episodes: episodes for each task.
        every_task: evaluate on all tasks met so far, which measures forgetting, not only on the current one.
    """

    def __init__(self, env: VecEnv, path: Path, *, every: int, episodes: int, every_task: bool) -> None:
        super().__init__()
        self.env, self.path = env, path
        self.every, self.episodes, self.every_task = every, episodes, every_task
        self._last = 0
        self._task = 0

    def _on_training_start(self) -> None:
        self._last = min(self._last, self.num_timesteps)

    def _on_step(self) -> bool:
        self._task = int(self.locals["infos"][0].get("drift/task", 0))
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps - self._last >= self.every:
            self._evaluate()

    def _on_training_end(self) -> None:
        if self.num_timesteps > self._last:
            self._evaluate()
            self.logger.dump(self.num_timesteps)

    def state_dict(self) -> dict[str, Any]:
        """The task of the moment, and when it was evaluated last."""
        return {"task": self._task, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._task, self._last = state["task"], state["last"]

    def _evaluate(self) -> None:
        self._last = self.num_timesteps
        rows: list[list[Any]] = []
        for task in range(self._task + 1) if self.every_task else [self._task]:
            if self.env.has_attr("set_task"):
                self.env.env_method("set_task", task)
            mean, std = evaluate_policy(self.model, self.env, n_eval_episodes=self.episodes)
            rows.append([self.num_timesteps, task, mean, std, self.episodes])
            if task == self._task:
                self.logger.record("eval/mean_reward", float(mean))  # type: ignore[arg-type]
        if self.every_task:
            self.logger.record("eval/mean_reward_all_tasks", float(sum(row[2] for row in rows) / len(rows)))
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if fresh:
                table.writerow(["timesteps", "task", "return", "std", "episodes"])
            table.writerows(rows)
