"""The experiment on how wide a self-expanding network becomes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from agents.experiments import self_expanding
from agents.experiments.__main__ import main
from agents.experiments.self_expanding import Args, digits, run, slope

SMALL = Args(examples=(5, 20), seeds=2, every=5, patience=1, events=2, workers=1)


def test_larger_training_sets_contain_the_smaller_ones_and_no_test_image() -> None:
    small, large = digits(5, seed=3), digits(140, seed=3)
    assert len(small[0]) == 50 and len(large[0]) == 1400 and len(small[2]) == 300
    assert large[1].bincount().tolist() == [140] * 10 and small[3].bincount().tolist() == [30] * 10
    assert torch.equal(small[2], large[2]) and not torch.equal(small[2], digits(5, seed=4)[2])
    rows = {tuple(row.tolist()) for row in large[0]}
    assert all(tuple(row.tolist()) in rows for row in small[0])
    assert large[0].min() >= 0 and large[0].max() == 1
    here = {tuple(row.tolist()) for row in large[2]}
    assert len(here & rows) == 0


def test_a_run_ends_when_the_network_has_not_grown_for_a_while() -> None:
    patient = dataclasses.replace(SMALL, every=20, patience=3, events=40, relative=1e9)
    result = run(5, 0, patient)
    assert result["widths"] == [2, 2, 2] and result["updates"] == 60
    assert result["accuracy"]["grown"] == result["accuracy"]["initial width"] == result["accuracy"]["final width"]
    grown = run(20, 0, dataclasses.replace(SMALL, every=60, events=3, patience=3))
    assert 2 < grown["widths"][-1] <= 2 + 3 * 4 and grown["updates"] == 180
    assert grown["loss"]["grown"] < grown["loss"]["initial width"]
    assert all(0 <= value <= 1 for value in grown["accuracy"].values())


def test_the_slope_is_units_for_each_doubling() -> None:
    results = {n: [{"widths": [2, width + seed]} for seed in range(3)] for n, width in ((5, 3), (10, 5), (20, 7))}
    assert (slope(results).value, slope(results).low, slope(results).high) == pytest.approx((2, 2, 2))


def test_the_command_keeps_what_is_there_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["self_expanding", "--examples", "5", "20", "--seeds", "2", "--every", "5", "--patience", "1",
            "--events", "2", "--workers", "1", "--log-folder", str(tmp_path)]  # fmt: skip
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "digits, from 2 hidden units, 2 seeds" in said and "units for each doubling of the examples" in said
    files = {f"{n}-{seed}.json" for n in (5, 20) for seed in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == files | {"self_expanding.png"}
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in files}
    saved = json.loads((tmp_path / "20-1.json").read_text())
    assert saved["widths"][-1] >= 2 and set(saved["accuracy"]) == set(self_expanding.ARMS)
    (tmp_path / "5-0.json").unlink()
    assert main(argv) == 0
    now = {name: (tmp_path / name).stat().st_mtime_ns for name in files}
    assert {name for name in files if now[name] == kept[name]} == files - {"5-0.json"}
    assert main([*argv, "--learning-rate", "0.02"]) == 0
    assert all((tmp_path / name).stat().st_mtime_ns != now[name] for name in files)


@pytest.mark.parametrize(
    ("option", "values"),
    [("--examples", ["150"]), ("--examples", ["20", "5"]), ("--initial", ["1"]), ("--seeds", ["0"]),
     ("--absolute", ["1"])],
)  # fmt: skip
def test_bad_options_are_one_line(
    option: str, values: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["self_expanding", "--log-folder", str(tmp_path / "new"), option, *values]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and not (tmp_path / "new").exists()
