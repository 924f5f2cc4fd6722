import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents.figure import _short, draw, shared_changes
from agents.plot import main, notes, tables
from agents.results import find_runs, read_run
from agents.summary import arms, summarise
from tests.agents.test_results import EPISODES, PROGRESS, write_run

ROOT = Path(__file__).parents[2]
pytest.importorskip("matplotlib")


@pytest.fixture
def folder(tmp_path):
    """Two arms, two seeds, two tasks."""
    for method in ("none", "split"):
        for seed in (0, 1):
            shifted = [(t, task, r + 2 * seed + (method == "split"), n) for t, task, r, n in EPISODES]
            write_run(tmp_path / f"ppo-{method}" / str(seed), method=method, seed=seed, episodes=shifted)
    return tmp_path


def read(folder):
    return [read_run(path) for path in find_runs([folder])]


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def run_plot(*arguments, **environment):
    command = [sys.executable, "-m", "agents.plot", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def png_size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def cells(heading_and_table):
    _, table = heading_and_table
    return {column.header.replace("\n", " "): list(column.cells) for column in table.columns}


def test_the_command_writes_the_figure_and_prints_both_tables(folder):
    before = files(folder)
    done = run_plot(folder)
    assert done.returncode == 0, done.stderr
    assert files(folder) - before == {folder / "curves.png"}  # and no temporary file
    width, height = png_size(folder / "curves.png")
    assert width > 1500
    assert height > 400
    assert "PPO · CartPole-v1 · permute (n = 2 seeds: intervals from fewer than 5 are rough)" in done.stdout
    assert "PPO · CartPole-v1 · permute: return by task (IQM over seeds)" in done.stdout
    assert done.stdout.rstrip().endswith("curves.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: ["nowhere"], "nowhere: no such folder"),
        (lambda f: [f / "empty"], "empty: no runs below"),
        (lambda f: (f / "ppo-none/0/config.yaml").write_text("a: [") and [f], "config.yaml: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, damage, message):
    (folder / "empty").mkdir()
    arguments = damage(folder)
    before = files(folder)
    done = run_plot(*arguments, "--out", folder / "new" / "figure.png")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert files(folder) == before
    assert not (folder / "new").exists()


def test_without_matplotlib_one_line_says_what_to_install(folder, tmp_path_factory):
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    done = run_plot(folder, PYTHONPATH=f"{hidden}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert done.stderr == "error: figures need matplotlib: pip install recycle-rl[plots]\n"
    assert not (folder / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "figure.jpeg"], "--out must be a file ending in .png"),
        (["--points", "3"], "--points must be at least 10 and at most 100000, got 3"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(folder, capsys, arguments, message):
    assert main([str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_runs_without_an_episode_give_an_error_not_an_empty_figure(tmp_path, capsys):
    write_run(tmp_path / "0", episodes=[], progress="", finished=False)
    assert main([str(tmp_path)]) == 2
    assert "no finished episode" in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_a_failing_write_leaves_nothing_and_keeps_the_old_figure(folder, capsys, monkeypatch):
    (folder / "curves.png").write_bytes(b"old")
    before = files(folder)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err == "error: disk full\n"
    assert files(folder) == before
    assert (folder / "curves.png").read_bytes() == b"old"


def test_the_summary_holds_the_iqm_over_seeds_and_its_interval(folder):
    summary, by_task = map(cells, tables(summarise(read(folder))))
    assert summary["arm"] == ["none", "split"]
    assert summary["seeds"] == ["2", "2"]
    assert summary["first task"] == ["4", "5"]  # 3 and 5, 4 and 6
    assert summary["later tasks"] == ["4", "5"]
    assert summary["95 %"] == ["3 to 5", "4 to 6"]
    assert summary["dead"] == ["0.31", "0.31"]
    assert (summary["recycled"], summary["re-died"]) == (["7", "7"], ["1", "1"])
    assert by_task == {"arm": ["none", "split"], "0": ["4", "5"], "1": ["4", "5"]}


def test_one_seed_has_no_interval(tmp_path):
    write_run(tmp_path / "0")
    [summary, _] = map(cells, tables(summarise(read(tmp_path))))
    assert summary["later tasks"] == ["3"]
    assert summary["95 %"] == ["-"]


def test_many_tasks_are_shown_in_blocks(tmp_path):
    episodes = [(10 * i + 10, i, float(i), 10) for i in range(20)]
    write_run(tmp_path / "0", episodes=episodes)
    by_task = cells(list(tables(summarise(read(tmp_path))))[1])
    assert list(by_task)[:3] == ["arm", "0-1", "2-3"]
    assert by_task["2-3"] == ["2.50"]


def test_a_panel_per_layer_with_changes_drawn_and_one_colour_per_arm(folder):
    figure = draw(read(folder))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["", "net.0", "net.2"]
    [row] = [s for s in figure.subfigs if s.get_suptitle()]
    assert row.get_suptitle() == "PPO · CartPole-v1 · drift: permute · 2 seeds"
    for axes in panels.values():
        assert [line.get_xdata()[0] for line in axes.lines if line.get_color() == "#d0d0d0"] == [30]
    dead = {line.get_color(): line.get_ydata().tolist() for line in panels["net.0"].lines[:2]}
    assert list(dead.values()) == [[0.25, 0.5], [0.25, 0.5]]
    returns = {line.get_color() for line in panels[""].lines[:2]}
    assert returns == set(dead)
    assert len(returns) == 2


def test_widths_are_drawn_where_they_change(folder):
    header, *rows = PROGRESS.splitlines()
    widths = ["8,4", ",", ",", ",", "10,4"]
    for seed in (0, 1):
        text = [f"{header},recycle/policy/net.0/width,recycle/policy/net.2/width"]
        text += [f"{row},{width}" for row, width in zip(rows, widths, strict=True)]
        write_run(folder / "grow" / str(seed), method="grow", seed=seed, progress="\n".join(text) + "\n")
    runs = read(folder)
    assert {run.config["method"]: run.resized for run in runs} == {"none": False, "split": False, "grow": True}
    figure = draw(runs)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["", "net.0", "net.2", "net.0", "net.2"]
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["dead fraction"] * 2 + ["units"] * 2
    assert [len(figure.axes[i].lines) - len(figure.axes[0].lines) for i in (1, 3)] == [0, -2]
    grown = figure.axes[3].lines[0]
    assert (grown.get_xdata().tolist(), grown.get_ydata().tolist()) == ([10, 40], [8, 10])
    low, high = figure.axes[3].get_ylim()
    assert low == 0 and high > 10 and figure.axes[1].get_ylim()[1] <= 1.02
    (run,) = [run for run in runs if run.config["method"] == "grow" and run.seed == 0]
    assert run.until(30).width["policy/net.0"].values.tolist() == [8]


def test_an_unfinished_run_is_marked_and_left_out_of_the_average(folder):
    write_run(folder / "late", method="split", seed=2, episodes=[(10, 0, 99.0, 10)], finished=False)
    runs = read(folder)
    left = draw(runs).axes[0]
    assert [text.get_text() for text in left.texts] == [" (unfinished)"]
    assert max(max(line.get_ydata()) for line in left.lines if line.get_linestyle() == "-") < 99
    assert list(notes(runs)) == [
        "CartPole-v1 · permute · ppo · split: unfinished runs (seed 2 at step 40) are dotted and left out of "
        "every average"
    ]


def test_an_arm_without_a_finished_run_stops_at_the_common_step(tmp_path):
    for seed, count in ((0, 5), (1, 4)):
        write_run(tmp_path / str(seed), seed=seed, episodes=EPISODES[:count], finished=False)
    runs = read(tmp_path)
    left = draw(runs).axes[0]
    assert max(left.lines[0].get_xdata()) <= 40
    assert [text.get_text() for text in left.texts] == [" (unfinished)"]
    assert list(notes(runs)) == [
        "CartPole-v1 · permute · ppo · split: unfinished; averaged only up to step 40, which every run has reached"
    ]


def test_notes_name_what_makes_a_comparison_unfair(tmp_path):
    later = [(t + 10 * i, task, r, 1) for i, (t, task, r, _) in enumerate(EPISODES)]
    write_run(tmp_path / "0", n_envs=1, method_kwargs={"noise": 0.1}, progress=PROGRESS)
    write_run(tmp_path / "1", episodes=later, change="every:40", progress=PROGRESS.replace("net.2", "net.4"))
    write_run(tmp_path / "2", episodes=[], finished=False)
    found = list(notes(read(tmp_path)))
    assert found[0] == f"no finished episode yet, left out: {tmp_path / '2'}"
    assert found[1] == "CartPole-v1 · permute · ppo: the arms are not alike, runs differ in change"
    assert found[2] == "CartPole-v1 · permute · ppo · split: one arm, but its runs differ in method_kwargs"
    assert "not every run measured every layer" in found[3]
    assert len(found) == 4


def test_changes_that_differ_between_runs_are_not_drawn(tmp_path):
    early = [(t, int(t > 10), r, 1) for t, _, r, _ in EPISODES]
    late = [(t, int(t > 40), r, 1) for t, _, r, _ in EPISODES]
    write_run(tmp_path / "0", episodes=early)
    write_run(tmp_path / "1", episodes=late, seed=1)
    [found] = arms(read(tmp_path)).values()
    assert shared_changes(found) is None
    assert "no change is drawn" in next(notes(read(tmp_path)))


def test_layer_names_lose_what_they_share_but_stay_readable():
    ppo = [f"policy/mlp_extractor.{net}_net.{i}" for net in ("policy", "value") for i in (0, 2)]
    assert [_short(name, ppo) for name in ppo] == [
        "policy_net.0",
        "policy_net.2",
        "value_net.0",
        "value_net.2",
    ]
    assert _short("q_net/q_net.0", ["q_net/q_net.0", "q_net/q_net.2"]) == "q_net.0"
    assert _short("actor/pi.0", ["actor/pi.0", "critic/qf0.0"]) == "actor/pi.0"
    assert _short("policy", ["policy", "value"]) == "policy"
