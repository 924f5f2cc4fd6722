"""Turn runs into the numbers that tables and figures show."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.integrate import trapezoid

from agents.results import Episodes, Experiment, Run
from agents.statistics import Floats

By = Literal["method", "tag", "algo"]

FRAGMENT = 0.1  # a last task shorter than this share of the median task is a left-over, not a task


@dataclass(frozen=True, eq=False)
class Row:
    """One arm of an experiment in numbers: arrays hold one entry per seed, nan where nothing was measured.

    Only finished runs count. Where none has finished, all do, up to the step `until` that all have reached.
    """

    experiment: Experiment
    arm: str
    seeds: tuple[int, ...]
    unfinished: int  # runs of this arm that have not finished
    until: int | None  # None: the runs behind the numbers are complete
    first_task: Floats  # mean return of its episodes
    later_tasks: Floats  # mean over the tasks after the first of their mean returns
    last_task: Floats
    area: Floats  # under return over lifetime steps, divided by the steps: a mean return per step
    dead: Floats  # last measured fraction, averaged over layers
    recycled: Floats
    re_died: Floats
    tasks: tuple[int, ...]  # played in every run
    per_task: Floats  # (seeds, tasks) mean return


def change_points(run: Run) -> list[tuple[int, int]]:
    """Find when each new task began: [(lifetime step, task), ...], the first task left out.

    It is the start of the first episode under the new task; with several copies, others may still be
    finishing an episode of the old one.
    """
    episodes = run.episodes
    starts = episodes.timesteps - episodes.lengths * int(run.config.get("n_envs") or 1)
    order = np.lexsort((episodes.task, starts))
    steps, tasks = np.maximum(starts[order], 0), episodes.task[order]
    return [(int(steps[i]), int(tasks[i])) for i in np.flatnonzero(np.diff(tasks)) + 1]


def task_returns(run: Run) -> dict[int, float]:
    """Average the returns of each task's episodes: {task: mean return}, in order of task.

    A last task that had only just begun (less than a tenth of the median task) is left out.
    """
    episodes = run.episodes
    bounds = [0, *(step for step, _ in change_points(run)), int(max([0, *episodes.timesteps]))]
    spans = np.diff(bounds)
    tasks = set(episodes.task.tolist())
    if len(spans) > 1 and spans[-1] < FRAGMENT * np.median(spans[:-1]):
        tasks -= {change_points(run)[-1][1]}
    return {task: float(episodes.returns[episodes.task == task].mean()) for task in sorted(tasks)}


def area_under_curve(episodes: Episodes) -> float:
    """Integrate return over lifetime steps (trapezoids) and divide by the steps: a mean return per step.

    Episodes that ended at the same step are averaged first; nan without episodes.
    """
    if not len(episodes):
        return float("nan")
    steps, index = np.unique(episodes.timesteps, return_inverse=True)
    values = np.bincount(index, weights=episodes.returns) / np.bincount(index)
    return float(trapezoid(values, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else values[0])


def final_dead(run: Run) -> float:
    """Average the last measured dead fraction over the layers; nan where none was measured."""
    return float(np.mean([c.values[-1] for c in run.dead.values()])) if run.dead else float("nan")


def arms(runs: Iterable[Run], by: By | None = None) -> dict[Experiment, dict[str, list[Run]]]:
    """Sort runs into experiments (environment, drift, algorithm) and these into arms, runs by seed.

    An arm is method and tag, or what `by` names alone; with by="algo" an experiment spans the algorithms.
    "none" comes first, the others by name.
    """
    experiments: dict[Experiment, dict[str, list[Run]]] = {}
    for run in runs:
        algo, method, tag = (str(run.config.get(key) or "") for key in ("algo", "method", "tag"))
        arm = (
            {"method": method, "tag": tag or "no tag", "algo": algo}[by]
            if by
            else "-".join(filter(None, (method, tag)))
        )
        key = Experiment(str(run.config["env"]), run.drift, "" if by == "algo" else algo)
        experiments.setdefault(key, {}).setdefault(arm, []).append(run)
    return {
        key: {
            arm: sorted(found[arm], key=lambda r: (r.seed, str(r.path)))
            for arm in sorted(found, key=lambda a: (a != "none", a))
        }
        for key, found in sorted(experiments.items())
    }


def counted(runs: Sequence[Run]) -> tuple[list[Run], int | None]:
    """Choose the runs of an arm that may be averaged: the finished ones, and None.

    Where none has finished: all that have an episode, cut at the step all have reached, and that step.
    """
    if finished := [run for run in runs if run.finished and len(run.episodes)]:
        return finished, None
    begun = [run for run in runs if len(run.episodes)]
    reached = min((run.last_step for run in begun), default=0)
    return [cut for run in begun if len((cut := run.until(reached)).episodes)], reached


def summarise(runs: Iterable[Run], by: By | None = None) -> list[Row]:
    """Give every arm its row of numbers, one entry per seed, for `agents.statistics` to average."""
    return [
        _row(experiment, arm, of_arm) for experiment, found in arms(runs, by).items() for arm, of_arm in found.items()
    ]


def _row(experiment: Experiment, arm: str, runs: Sequence[Run]) -> Row:
    used, until = counted(runs)
    returns = [task_returns(run) for run in used]
    shared = sorted(set.intersection(*map(set, returns))) if returns else []
    per_task = np.array([[r[task] for task in shared] for r in returns]).reshape(len(used), len(shared))
    listed = [list(r.values()) for r in returns]

    def count(values: Iterable[int | None]) -> Floats:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    return Row(
        experiment,
        arm,
        tuple(run.seed for run in used),
        sum(not run.finished for run in runs),
        until,
        first_task=np.array([values[0] for values in listed]),
        later_tasks=np.array([np.mean(values[1:]) if values[1:] else np.nan for values in listed]),
        last_task=np.array([values[-1] if values[1:] else np.nan for values in listed]),
        area=np.array([area_under_curve(run.episodes) for run in used]),
        dead=np.array([final_dead(run) for run in used]),
        recycled=count(run.recycled for run in used),
        re_died=count(run.re_died for run in used),
        tasks=tuple(shared),
        per_task=per_task,
    )
