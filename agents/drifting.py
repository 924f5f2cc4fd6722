"""What training does when the task changes: old replay is wrong then, and a greedy agent does not look again."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv


class OnChange(BaseCallback):
    """At each task change: empty DQN's replay buffer, begin its exploration again, or both.

    Args:
        clear_buffer: forget the transitions of the tasks before, and wait for ``learning_starts`` new ones.
        restart_exploration: let epsilon fall again from its initial value, over ``exploration_fraction`` of the
            steps until the next change.
        changes: lifetime steps at which the task changes; the end of training is the last entry.
    """

    def __init__(self, *, clear_buffer: bool, restart_exploration: bool, changes: Sequence[int]) -> None:
        super().__init__()
        self.clear_buffer, self.restart_exploration = clear_buffer, restart_exploration
        self.changes = list(changes)
        self._task = 0

    def _init_callback(self) -> None:
        assert isinstance(self.model, DQN)
        self._learning_starts = self.model.learning_starts
        self._schedule = self.model.exploration_schedule

    def _on_training_start(self) -> None:
        if self.restart_exploration:
            self._explore()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        task = max((info.get("drift/task", 0) for info in self.locals.get("infos", ())), default=self._task)
        if task == self._task:
            return
        self._task = task
        assert isinstance(self.model, DQN)
        if self.clear_buffer:
            assert self.model.replay_buffer is not None
            self.model.replay_buffer.reset()
            self.model.learning_starts = self.num_timesteps + self._learning_starts
        if self.restart_exploration:
            self._explore()

    def _explore(self) -> None:
        assert isinstance(self.model, DQN)
        end = next((c for c in self.changes if c > self.num_timesteps), self.changes[-1])
        span = max(1.0, self.model.exploration_fraction * (end - self.num_timesteps))
        self.model.exploration_schedule = _Falling(self.model, self.num_timesteps, span)

    def _on_training_end(self) -> None:
        assert isinstance(self.model, DQN)
        self.model.exploration_schedule = self._schedule  # so that a plain DQN.load needs nothing of ours
        self.model.learning_starts = self._learning_starts


class _Falling:
    """Epsilon from its initial to its final value over ``span`` steps from ``start`` on."""

    def __init__(self, model: DQN, start: int, span: float) -> None:
        self.model, self.start, self.span = model, start, span

    def __call__(self, progress_remaining: float) -> float:
        done = min(1.0, (self.model.num_timesteps - self.start) / self.span)
        first, last = self.model.exploration_initial_eps, self.model.exploration_final_eps
        return float(first + done * (last - first))


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
