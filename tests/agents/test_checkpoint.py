"""A run that was stopped goes on as if it had not been."""

import pytest

from agents.train import main
from tests.agents.resuming import DIGITS, DQN, DRIFT, NET, PPO, REPLAY, ROLLOUTS, all_differences, stopped_at, train

SAVED = ["--save-freq", "48", "--keep", "9", "--eval-freq", "64", "--eval-episodes", "2"]

SHORT = [*DIGITS, *DRIFT, *NET, "-n", "128"]
RUNS = {
    "ppo": [*PPO, "--n-envs", "2"],
    "dqn": [*DQN, "--clear-buffer", "--restart-exploration"],
    "a2c": [*SHORT, "--algo", "a2c"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, name):
    whole = train(tmp_path / "whole", *RUNS[name], *SAVED)
    for steps in sorted(int(p.stem.split("_")[1]) for p in (whole / "checkpoints").glob("*.zip"))[:2]:
        again = stopped_at(whole, steps, tmp_path / f"from_{steps}")
        assert main(["--resume", str(again)]) == 0
        assert not all_differences(whole, again)
