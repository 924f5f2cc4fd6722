"""Training for long: memory, speed and the rate at which files grow stay as they are.

``pytest -m slow tests/agents/test_soak.py -s`` trains PPO and DQN for an hour each, or ``SOAK_SECONDS``, and prints
figures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import theilslopes

from agents.train import main
from tests.agents.resuming import PPO

ROOT = Path(__file__).parents[2]
HOUR = float(os.environ.get("SOAK_SECONDS", "3600"))


def soak(algorithm, seconds, steps, folder):
    """Samples of a run that takes so many seconds, and at least so many steps."""
    command = [sys.executable, "-m", "tests.agents.soaking", algorithm, str(seconds), str(steps), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr  # it was asked to end, and ended in order
    return read(folder)


def read(folder):
    """One array for each quantity."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {name: np.array([line[name] for line in lines], dtype=float) for name in lines[0]}


def figures(samples):
    """What a run's samples come to. The first fifth of its steps is warm-up: buffers fill, arenas and caches grow.

    ``speed``: updates a second of processor time in the last tenth over those in the first, both in the time that the
    same training without us took then, for other programs slow down a second of processor time too. ``growth``:
    kilobytes of resident memory a minute of processor time, the Theil-Sen slope with its 95 % interval, and ``heap``
    of what malloc has given out: what grows in the one alone are gaps. ``events``, ``edits``: bytes a step in the last
    third after warm-up over those in the first.
    """
    found = {name: samples[name][-1] for name in ("wall", "cpu", "steps", "updates")}
    end = samples["steps"][-1]
    late = samples["steps"] >= end / 5
    minutes, memory = samples["cpu"][late] / 60, samples["kilobytes"][late]
    slope, _, low, high = theilslopes(memory, minutes, 0.95)
    found |= {"megabytes": memory[-1] / 1024, "growth": slope, "growth_low": low, "growth_high": high}
    found["heap"] = theilslopes(samples["heap"][late], minutes)[0]
    rates, works = paces(samples)
    found |= {"first": rates[0], "last": rates[-1], "speed": works[-1] / works[0]}
    for name in ("events", "edits"):
        grown = np.diff(np.interp(np.linspace(end / 5, end, 4), samples["steps"], samples[name]))
        found |= {f"{name}_a_step": grown[-1] / (end * 4 / 15), name: grown[-1] / grown[0]}
    return {name: round(float(value), 3) for name, value in found.items()}


def paces(samples):
    """Updates a second of processor time, and updates in the time of the fixed work: medians of each tenth."""
    learning = samples["updates"] > 0  # DQN looks before it learns
    updates, cpu, yardstick = (samples[name][learning] for name in ("updates", "cpu", "yardstick"))
    rate = np.diff(updates) / np.diff(cpu)
    work = rate * (yardstick[1:] + yardstick[:-1]) / 2
    parts = np.minimum(10 * (updates[1:] - updates[0]) / (updates[-1] - updates[0]), 9).astype(int)
    return [[np.median(values[parts == part]) for part in range(10)] for values in (rate, work)]


def check(found, growth, speed, files):
    print(found)
    assert found["growth_low"] < growth
    assert found["speed"] > speed
    assert abs(found["events"] - 1) < files and abs(found["edits"] - 1) < files


@pytest.mark.parametrize(("algorithm", "steps"), [("ppo", 20_000), ("dqn", 8_000)])
def test_a_short_run_does_not_grow(tmp_path, algorithm, steps):
    """The bounds are wide, for all of it is warm-up, with few events; 50 bytes kept of each step are found."""
    check(figures(soak(algorithm, 8, steps, tmp_path)), growth=6000, speed=0.5, files=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_an_hour_does_not_grow(tmp_path, algorithm):
    """2 kB a minute are 3 MB a day: a dozen bytes an event, which no object of Python's fits into."""
    check(figures(soak(algorithm, HOUR, 20_000, tmp_path)), **LONG)


LONG = {"growth": 2, "speed": 0.95, "files": 0.02}


def test_a_run_that_grows_or_slows_down_is_found():
    """Samples made up: a kilobyte a second, updates that take twice as long in the end, files that grow faster."""
    time = np.linspace(0, 1000, 500)
    steady = {"wall": time, "cpu": time, "steps": 1000 * time, "updates": 4 * time, "yardstick": np.ones(500)}
    noise = np.random.default_rng(0).normal(0, 100, 500)
    steady |= {"kilobytes": 4e5 + noise, "heap": 2e5 + noise, "events": 90_000 * time, "edits": 4000 * time}
    check(figures(steady), **LONG)
    grows = {"kilobytes": 4e5 + noise + time, "cpu": time + time**2 / 2000, "events": time**2, "edits": time**1.5}
    for name, values in grows.items():
        with pytest.raises(AssertionError):
            check(figures(steady | {name: values}), **LONG)
    found = figures(steady | {"kilobytes": 4e5 + noise + time})
    assert found["growth_low"] < 60 < found["growth_high"]
    slow = {"cpu": 2 * time, "yardstick": np.where(time > 500, 2.0, 1.0)}  # the machine's own slowness does not count
    assert figures(steady | slow)["speed"] == pytest.approx(2)


def test_what_was_is_not_kept_in_memory(tmp_path, monkeypatch):
    """Neither what events saw, nor the returns of episodes: they would be in every checkpoint too."""
    seen = []

    class Looking(main.__globals__["Checkpoints"]):
        def _on_rollout_start(self):
            super()._on_rollout_start()
            monitor = self.model.get_env().get_attr("episode_returns")[0]
            seen.append([len(monitor), *(len(each.reports) for each in self.others if hasattr(each, "reports"))])

    monkeypatch.setitem(main.__globals__, "Checkpoints", Looking)
    assert main([*PPO, "--log-folder", str(tmp_path)]) == 0
    assert len(seen) == 10 and seen[-1] == [1, 1]
