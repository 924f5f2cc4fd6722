import math
import os

import numpy as np
import pytest
import yaml

from agents.results import BadRun, Experiment, find_runs, read_run
from agents.summary import area_under_curve, arms, change_points, summarise, task_returns

# timesteps, task, return, length: two tasks, one copy of the environment
EPISODES = [(10, 0, 1.0, 10), (20, 0, 3.0, 10), (30, 0, 5.0, 10), (40, 1, 2.0, 10), (60, 1, 4.0, 20)]
PROGRESS = """\
rollout/ep_rew_mean,time/total_timesteps,recycle/policy/net.0/dead,recycle/policy/dead,recycle/policy/recycled,\
recycle/value/recycled,recycle/policy/re_died,recycle/policy/net.2/dead
1.0,10,,,,,,
1.0,20,0.25,0.3,2,1,0,
,,0.9,0.9,99,,,
1.0,30,,,,,,
1.0,40,0.5,0.4,4,3,1,0.125
"""


def write_run(folder, *, episodes=EPISODES, progress=PROGRESS, finished=True, **config):
    """Write a run folder as training does, with the given options."""
    folder.mkdir(parents=True)
    options = {"algo": "ppo", "env": "CartPole-v1", "drift": ["permute"], "method": "split", "seed": 0}
    options |= {"tag": None, "n_envs": 1, "total_timesteps": 60}
    (folder / "config.yaml").write_text(yaml.safe_dump(options | config))
    lines = ["timesteps,task,return,length", *(",".join(map(str, line)) for line in episodes)]
    (folder / "episodes.csv").write_text("\n".join(lines) + "\n")
    (folder / "progress.csv").write_text(progress)
    if finished:
        (folder / "model.zip").write_bytes(b"")
    return folder


def test_find_runs_looks_below_and_finds_each_once(tmp_path):
    runs = [write_run(tmp_path / "env-permute" / "ppo-split" / str(seed)) for seed in (0, 2, 10)]
    assert find_runs([tmp_path]) == runs  # 2 before 10
    assert find_runs([runs[1]]) == [runs[1]]
    assert find_runs([tmp_path, runs[0], str(runs[0].parent)]) == runs


def test_find_runs_names_the_folder_that_holds_none(tmp_path):
    with pytest.raises(BadRun, match="nowhere: no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(BadRun, match="no runs below"):
        find_runs([tmp_path])


def test_read_run_gives_episodes_curves_and_counts(tmp_path):
    run = read_run(write_run(tmp_path / "0", seed=3, unknown={"a": 1}))
    assert run.episodes.timesteps.tolist() == [10, 20, 30, 40, 60]
    assert run.episodes.task.tolist() == [0, 0, 0, 1, 1]
    assert run.episodes.returns.tolist() == [1, 3, 5, 2, 4]
    assert run.episodes.lengths.tolist() == [10, 10, 10, 10, 20]
    assert (run.seed, run.drift, run.finished, run.last_step) == (3, "permute", True, 60)
    assert (run.recycled, run.re_died) == (7, 1)  # last counts, over both networks


def test_dead_curves_hold_only_what_was_measured(tmp_path):
    dead = read_run(write_run(tmp_path / "0")).dead
    assert list(dead) == ["policy/net.0", "policy/net.2"]  # layers, not the total beside them
    assert dead["policy/net.0"].steps.tolist() == [20, 40]  # no row without a step, nothing filled at 30
    assert dead["policy/net.0"].values.tolist() == [0.25, 0.5]
    assert dead["policy/net.2"].steps.tolist() == [40]


def test_totals_stand_in_where_no_layer_was_logged(tmp_path):
    progress = "time/total_timesteps,recycle/q_net/dead\n5,0.5\n9,nan\n"
    run = read_run(write_run(tmp_path / "0", progress=progress))
    assert {name: (c.steps.tolist(), c.values.tolist()) for name, c in run.dead.items()} == {"q_net": ([5], [0.5])}
    assert run.recycled is None


def test_a_run_still_going_on_is_flagged_and_its_half_line_left_out(tmp_path):
    folder = write_run(tmp_path / "0", finished=False)
    with open(folder / "episodes.csv", "a") as file:
        file.write("70,1,9")
    run = read_run(folder)
    assert not run.finished
    assert run.last_step == 60
    (folder / "model.zip").touch()
    with pytest.raises(BadRun, match=r"episodes.csv: line 7 has 3 cells under a header of 4"):
        read_run(folder)


def test_a_run_that_has_just_begun_is_empty(tmp_path):
    folder = write_run(tmp_path / "0", finished=False)
    os.remove(folder / "episodes.csv")
    os.remove(folder / "progress.csv")
    run = read_run(folder)
    assert (len(run.episodes), dict(run.dead), run.last_step) == (0, {}, 0)
    [row] = summarise([run])
    assert row.seeds == ()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "algo: [ppo", "config.yaml: cannot be read"),
        ("config.yaml", "- ppo", "config.yaml: expected a mapping of options, got list"),
        ("config.yaml", "algo: ppo\nseed: 0\n", "config.yaml: lacks env, method"),
        ("config.yaml", "{algo: a, env: e, method: m, seed: x}", "seed should be a whole number, got 'x'"),
        ("episodes.csv", "steps,return\n1,2\n", "episodes.csv: expected the header timesteps,task"),
        (
            "episodes.csv",
            "timesteps,task,return,length\n1,0,oops,1\n",
            "line 2: expected a number, got 'oops'",
        ),
        ("episodes.csv", "timesteps,task,return,length\n1,0,nan,1\n", "line 2: expected a number, got 'nan'"),
        ("progress.csv", "time/total_timesteps,recycle/a/b/dead\n1\n", "line 2 has 1 cells"),
        (
            "progress.csv",
            "time/total_timesteps,recycle/a/b/dead\n1,x\n",
            "line 2: expected a number, got 'x'",
        ),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, file, text, message):
    folder = write_run(tmp_path / "0")
    (folder / file).write_text(text)
    with pytest.raises(BadRun) as error:
        read_run(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_change_points_are_where_the_first_episode_of_a_task_began(tmp_path):
    assert change_points(read_run(write_run(tmp_path / "one"))) == [(30, 1)]
    # Two copies: one still finishes its episode of task 0 when the other has begun task 1, at step 60.
    episodes = [(40, 0, 1.0, 20), (60, 0, 1.0, 30), (80, 1, 1.0, 10), (90, 0, 1.0, 25), (100, 0, 1.0, 10)]
    assert change_points(read_run(write_run(tmp_path / "two", episodes=episodes, n_envs=2))) == [
        (60, 1),
        (80, 0),
    ]


def test_task_returns_average_each_task_but_not_one_that_has_only_begun(tmp_path):
    assert task_returns(read_run(write_run(tmp_path / "0"))) == {0: 3.0, 1: 3.0}
    begun = [*((10 * i, i > 10, 1.0, 10) for i in range(1, 21)), (201, 2, 50.0, 1)]
    begun = [(t, int(task), r, n) for t, task, r, n in begun]
    assert task_returns(read_run(write_run(tmp_path / "1", episodes=begun))) == {0: 1.0, 1: 1.0}


def test_area_under_a_known_curve(tmp_path):
    # trapezoids: 10 * (2 + 4 + 3.5) + 20 * 3 = 155 over 50 steps
    assert area_under_curve(read_run(write_run(tmp_path / "0")).episodes) == pytest.approx(155 / 50)
    together = [(10, 0, 0.0, 5), (10, 0, 4.0, 5), (20, 0, 4.0, 5)]  # two copies end at step 10, on average 2
    assert area_under_curve(read_run(write_run(tmp_path / "1", episodes=together)).episodes) == 3.0


def test_arms_are_told_apart_by_method_and_tag_or_as_asked(tmp_path):
    runs = [
        read_run(write_run(tmp_path / str(i), algo=algo, method=method, tag=tag))
        for i, (algo, method, tag) in enumerate(
            [("ppo", "split", "lr3"), ("ppo", "none", None), ("dqn", "split", None), ("ppo", "split", None)]
        )
    ]

    def names(by=None):
        return {key.algo: list(found) for key, found in arms(runs, by).items()}

    assert names() == {"dqn": ["split"], "ppo": ["none", "split", "split-lr3"]}
    assert names("method") == {"dqn": ["split"], "ppo": ["none", "split"]}
    assert names("tag") == {"dqn": ["no tag"], "ppo": ["lr3", "no tag"]}
    assert names("algo") == {"": ["dqn", "ppo"]}


def test_summarise_makes_a_row_of_per_seed_numbers(tmp_path):
    better = [(t, task, r + task, n) for t, task, r, n in EPISODES]
    runs = [
        read_run(write_run(tmp_path / "b", seed=1, episodes=better)),
        read_run(write_run(tmp_path / "a", seed=0)),
    ]
    [row] = summarise(runs)
    assert (row.experiment, row.arm) == (Experiment("CartPole-v1", "permute", "ppo"), "split")
    assert (row.seeds, row.unfinished, row.until) == ((0, 1), 0, None)
    assert row.tasks == (0, 1)
    assert row.per_task.tolist() == [[3, 3], [3, 4]]
    assert row.first_task.tolist() == [3, 3]
    assert row.later_tasks.tolist() == [3, 4]
    assert row.last_task.tolist() == [3, 4]
    assert row.area.tolist() == pytest.approx([155 / 50, (155 + 5 + 20) / 50])
    assert row.dead.tolist() == [0.3125, 0.3125]  # last measured: .5 and .125
    assert (row.recycled.tolist(), row.re_died.tolist()) == ([7, 7], [1, 1])


def test_unfinished_runs_are_not_averaged_as_if_complete(tmp_path):
    whole = read_run(write_run(tmp_path / "0", seed=0))
    half = read_run(write_run(tmp_path / "1", seed=1, episodes=EPISODES[:4], finished=False))
    [row] = summarise([whole, half])
    assert (row.seeds, row.unfinished, row.until) == ((0,), 1, None)

    longer = read_run(write_run(tmp_path / "2", seed=2, finished=False))
    [row] = summarise([half, longer])  # none has finished: only the steps that both have reached
    assert (row.seeds, row.unfinished, row.until) == ((1, 2), 2, 40)
    assert row.last_task.tolist() == [2, 2]  # the return of 4 at step 60 does not count
    assert np.isnan(row.recycled).all()  # counts at step 40 are not known


def test_one_task_has_no_later_tasks(tmp_path):
    [row] = summarise([read_run(write_run(tmp_path / "0", episodes=EPISODES[:3], progress="", drift=[]))])
    assert row.experiment.drift == "no drift"
    assert row.first_task.tolist() == [3]
    assert all(math.isnan(values[0]) for values in (row.later_tasks, row.last_task, row.dead, row.recycled))
