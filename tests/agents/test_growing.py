"""The demonstration of growth: what it runs, and what its table says."""

import numpy as np
import pytest
import tyro

from agents import growing
from agents.results import read_run
from agents.train import Args as TrainArgs
from tests.agents.test_results import EPISODES, write_run

HEAD = "time/total_timesteps,recycle/policy/net.0/dead,recycle/policy/net.0/width,recycle/policy/net.2/width"


def arm(folder, bonus, widths):
    """Three seeds whose returns are higher by ``bonus`` than the last arm's, the more the later the seed."""
    runs = []
    for seed in range(3):
        episodes = [(t, task, r + bonus * (1 + seed), n) for t, task, r, n in EPISODES]
        progress = f"{HEAD}\n20,0.5,8,8\n40,0.25,{widths[seed][0]},{widths[seed][1]}\n"
        runs.append(read_run(write_run(folder / str(seed), seed=seed, episodes=episodes, progress=progress)))
    return runs


def test_the_table_pairs_the_arms_seed_by_seed(tmp_path):
    table = growing.table(
        {
            growing.GROWN: arm(tmp_path / "grown", 1.0, [(10, 12), (9, 9), (8, 20)]),
            growing.NARROW: arm(tmp_path / "narrow", 0.0, [(8, 8)] * 3),
            growing.WIDE: arm(tmp_path / "wide", 2.0, [(10, 12), (9, 9), (8, 20)]),
        }
    )
    _, seeds, units, later, over, last, over_last, dead = [list(column.cells) for column in table.columns]
    assert seeds == ["3"] * 3 and units == ["22 18 28", "16 16 16", "22 18 28"]
    assert [told.split()[0] for told in later] == ["5.00", "3.00", "7.00"] == [told.split()[0] for told in last]
    assert over == over_last == ["", "2.00 [1.00, 3.00]", "-2.00 [-3.00, -1.00]"]
    assert dead == ["0.25 [0.25, 0.25]"] * 3


def test_what_is_not_known_of_every_seed_is_a_dash():
    assert growing._told(np.array([1.0, np.nan])) == "-"
    assert growing._told(np.array([1.5])) == "1.50"


def test_every_run_is_one_that_training_understands(tmp_path):
    args = growing.Args(log_folder=str(tmp_path), steps=500)
    jobs = {
        "grow": growing.grown(args, 2),
        "narrow": growing.fixed(args, 2, growing.NARROW, [8, 8]),
        "wide": growing.fixed(args, 2, growing.WIDE, {"pi": [9, 8], "vf": [12, 10]}),
    }
    parsed = {name: tyro.cli(TrainArgs, args=list(job.command[3:])) for name, job in jobs.items()}
    assert {name: (one.method, one.tag) for name, one in parsed.items()} == {
        "grow": ("grow+senn", None),
        "narrow": ("monitor", "narrow"),
        "wide": ("monitor", "wide"),
    }
    assert parsed["wide"].policy_kwargs == ("net_arch:{'pi':[9,8],'vf':[12,10]}", "activation_fn:relu")
    assert parsed["grow"].policy_kwargs == parsed["narrow"].policy_kwargs == ("net_arch:[8,8]", "activation_fn:relu")
    assert all((one.n, one.seed, one.drift, one.every) == (500, 2, ("permute",), args.every) for one in parsed.values())
    assert len({job.folder for job in jobs.values()}) == 3


@pytest.mark.slow
def test_it_runs_from_end_to_end_and_keeps_what_is_there(tmp_path, capsys):
    words = ["--log-folder", str(tmp_path), "--seeds", "1", "--steps", "3072"]
    words += ["--method-kwargs", "when:every:1", "count:0.25", "most:64"]
    assert growing.main(words) == 0
    said = capsys.readouterr().out
    assert "fixed, as wide as the grown one" in said and (tmp_path / "curves.png").exists()
    models = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.zip")}
    assert len(models) == 3
    assert growing.main(words) == 0
    assert models == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.zip")}
    assert said.splitlines()[-8:] == capsys.readouterr().out.splitlines()[-8:]
