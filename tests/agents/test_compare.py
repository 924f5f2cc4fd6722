from pathlib import Path

import pytest

from agents.compare import TERMS, compare, main
from agents.results import BadRun, find_runs, read_run
from agents.statistics import Estimate
from tests.agents.test_results import EPISODES, write_run

pytest.importorskip("matplotlib")

PROGRESS = """\
time/total_timesteps,recycle/p/recycled,recycle/p/re_died,recycle/p/a/dead,recycle/p/a/dead_after,recycle/p/a/effective_rank
20,0,0,0.9,0.9,1.0
40,4,0,0.5,0.25,3.0
50,6,1,0.5,0.25,5.0
60,8,2,,,
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plain runs with the seeds 0 to 3, and runs that return 1, 2, 3 more with the seeds 1 to 3."""
    for seed in range(4):
        write_run(tmp_path / "ppo-monitor" / str(seed), method="monitor", seed=seed)
    for seed in (1, 2, 3):
        better = [(t, task, r + seed, n) for t, task, r, n in EPISODES]
        where = tmp_path / "ppo-split" / str(seed)
        write_run(where, method="split", seed=seed, episodes=better, progress=PROGRESS)
    return tmp_path


def lines_of(folder: Path, against: str = "monitor"):  # type: ignore[no-untyped-def]
    (lines,) = compare([read_run(path) for path in find_runs([folder])], against).values()
    return lines


def test_differences_are_taken_seed_by_seed_on_the_seeds_that_both_have(folder: Path) -> None:
    split, monitor = lines_of(folder)  # the better first
    assert (split.arm, split.seeds, monitor.arm, monitor.seeds) == ("split", 3, "monitor", 4)
    assert split.difference is not None
    assert split.last is not None
    assert split.difference.value == pytest.approx(2)
    assert (split.difference.low, split.difference.high) == (1, 3)
    assert split.last.value == pytest.approx(2)
    assert monitor.difference is monitor.last is None
    assert split.returns.value == pytest.approx(monitor.returns.value + 2)


def test_levels_are_means_over_the_second_half_of_what_was_measured(folder: Path) -> None:
    split = lines_of(folder)[0]
    assert split.dead == Estimate(0.5, 0.5, 0.5, 3)
    assert split.dead_after == Estimate(0.25, 0.25, 0.25, 3)
    assert split.effective_rank == Estimate(4, 4, 4, 3)
    assert split.recycled == Estimate(8, 8, 8, 3)
    assert split.re_died == Estimate(0.25, 0.25, 0.25, 3)


def test_unfinished_runs_are_left_out_and_an_arm_that_is_not_there_is_named(folder: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadRun, match="no finished run of the arm 'none' in CartPole-v1: there are monitor, split"):
        lines_of(folder, "none")
    (folder / "ppo-split" / "3" / "model.zip").unlink()
    assert main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert TERMS[:40] in shown
    row = next(line.split() for line in shown.splitlines() if line.startswith(" split") or line.startswith("split"))
    assert row[1] == "2"
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(folder), "--against", "none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_finished_run_one_line_says_so(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    write_run(tmp_path / "ppo-monitor" / "0", method="monitor", finished=False)
    assert main([str(tmp_path)]) == 2
    assert "no finished run found" in capsys.readouterr().err
