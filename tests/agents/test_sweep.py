"""Many runs: what a grid holds, and that a sweep brings every run to its end, whatever dies."""

import contextlib
import csv
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import tyro
import yaml

from agents import runs
from agents.jobs import Job
from agents.options import Args, as_words
from agents.sweep import cluster as clusters
from agents.sweep import grid
from agents.sweep.__main__ import Args as Sweep
from agents.sweep.__main__ import main, runs_of
from agents.sweep.attempt import start_or_resume
from agents.sweep.state import State
from tests.agents import faulty  # noqa: F401, registers its environments
from tests.agents.resuming import BARE, NET, PPO, RANDOM, ROLLOUTS, all_differences, stopped_at, train

# What a grid holds ------------------------------------------------------------------------------------------------

TEXT = """
algos: [ppo, {algo: dqn, hyperparams: {buffer_size: 80}, n-timesteps: 3e+3}]
envs: CartPole-v1
drifts: [none, permute+scale, {drift: [mask], drift_kwargs: {share: 0.5}}]
methods:
  - none
  - {method: redo, method_kwargs: {tau: 0.1}, tag: tau-0.1}
seeds: 3
options: {n_timesteps: 2000, every: 100, change: "every:500", hyperparams: {learning_rate: 0.01}, jumps: true}
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return path

    return write


def test_every_combination_is_a_run_and_those_of_the_first_seed_come_first(written):
    found = grid.expand(*grid.read(written(TEXT)))
    assert len(found) == len(set(found)) == 2 * 3 * 2 * 3
    assert [run.seed for run in found] == [0] * 12 + [1] * 12 + [2] * 12
    assert {run.drift for run in found} == {(), ("permute", "scale"), ("mask",)}
    (one,) = (r for r in found if (r.algo, r.drift, r.method, r.seed) == ("dqn", ("mask",), "redo", 2))
    assert one == Args(
        algo="dqn", drift=("mask",), drift_kwargs=("share:0.5",), method="redo", method_kwargs=("tau:0.1",), seed=2,
        tag="tau-0.1", n=3000, every=100, change="every:500", jumps=True,
        hyperparams=("learning_rate:0.01", "buffer_size:80"),
    )  # fmt: skip


def test_what_is_typed_stands_above_the_file_and_the_axes_above_both(written):
    typed = Sweep(written(TEXT), methods=("split",), drifts=("none",), algos=("ppo",), seeds=1)
    (run,) = runs_of(typed, ["-n", "7", "--every=5", "--change", "every:500"])
    assert (run.method, run.drift, run.n, run.every, run.seed, run.num_threads) == ("split", (), 7, 5, 0, 1)
    (run,) = runs_of(Sweep(seeds=1, cpus_per_run=3.5), ["--drift", "scale", "--method", "redo"])
    assert (run.method, run.drift, run.num_threads) == ("redo", ("scale",), 3)


@pytest.mark.parametrize("given", [
    Args(),
    Args(tag="-x", n=5, layer_norm=True, num_threads=2, drift=("scale", "mask"), save_minutes=0.5),
    Args(env_kwargs=("a:1", "b:[1, 2]"), weight_decay=1e-4, trained_agent="a b.zip", eval_tasks="all"),
])  # fmt: skip
def test_options_are_typed_as_they_are_read(given):
    assert tyro.cli(Args, args=as_words(given)) == given


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "message"), [
    ("methds: [none]", "grid.yaml: unknown key 'methds': did you mean 'methods'?"),
    ("methods: []", "methods is empty"),
    ("seeds: 0", "seeds is empty"),
    ("[none]", "expected a mapping with algos"),
    ("methods: [none", "is no yaml"),
    ("options: [1]", "options: expected a mapping, got [1]"),
    ("seeds: 1\noptions: {evry: 5}", "no option 'evry': did you mean 'every'?"),
    ("seeds: 1\noptions: {every: five}", "every: expected a whole number, got 'five'"),
    ("seeds: 1\noptions: {jumps: 1}", "jumps: expected true or false, got 1"),
    ("seeds: 1\noptions: {n_timesteps: .inf}", "n_timesteps: expected a whole number, got inf"),
    ("seeds: 1\noptions: {vec_env: both}", "vec_env: expected one of dummy, subproc, got 'both'"),
    ("seeds: 1\noptions: {method_kwargs: 5}", "method_kwargs: expected a mapping of names to values, got 5"),
    ("seeds: 1\noptions: {log_folder: x}", "log_folder is not for a run of a grid"),
    ("seeds: [0, one]", "seed: expected a whole number, got 'one'"),
    ("seeds: [0, 0]", "two runs of the grid are kept in"),
    ("methods: [none, ~]", "methods: expected a name, got nothing"),
    ("methods: [{tag: x}]", "methods: an entry names its method"),
    ("methods: [none, rdo]", "did you mean 'redo'?"),
    ("methods: [{method: redo, method_kwargs: {tua: 1}}]", "method 'redo' has no option 'tua': did you mean 'tau'"),
    ("algos: [pp]", "did you mean 'ppo'?"),
    ("envs: [CartPol-v1]", "Did you mean: `CartPole`?"),
    ("drifts: [permut]", "did you mean 'permute'?"),
    ("seeds: 1\noptions: {hyperparams: {n_step: 1}}", "did you mean 'n_steps'?"),
    ("seeds: 1\noptions: {device: cuda}", "--device cuda: without --gpus-per-run a run sees no GPU"),
])  # fmt: skip
def test_a_bad_grid_is_one_line_and_writes_nothing(written, tmp_path, capsys, text, message):
    assert main([str(written(text)), "--log-folder", str(tmp_path / "runs")]) == 2
    assert_one_line(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(("words", "message"), [
    ([], "the grid is empty"),
    (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    (["--seeds", "1", "--", "--overwrite"], "--overwrite is not for a run of a grid"),
    (["--seeds", "1", "--", "-n", "0"], "--n-timesteps must be at least 1, got 0"),
    (["--seeds", "1", "--retries", "-1"], "--retries must be at least 0, got -1"),
    (["--seeds", "1", "--cpus-per-run", "nan"], "--cpus-per-run must be more than 0"),
    (["--seeds", "1", "--address", "nonsense"], "expected HOST:PORT of a cluster's head, or auto, got 'nonsense'"),
    (["--seeds", "1", "--address", "127.0.0.1:1"], "nobody answers at 127.0.0.1:1"),
    (["--seeds", "1", "--log-folder", "/dev/null/runs"], "cannot be written"),
    (["--seeds", "1", "--log-folder", "/proc/self/runs"], "cannot be written"),
])  # fmt: skip
def test_bad_options_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert main(words) == 2
    assert time.monotonic() - began < 30
    assert_one_line(capsys, message)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_there_with_other_options_is_not_taken_for_this_one(tmp_path, capsys):
    folder = train(tmp_path, "--env", "CartPole-v1", "--method", "none", "-n", "64", "--hyperparams", "n_steps:64")
    asked = ["--seeds", "1", "--log-folder", str(tmp_path), "--", "--method", "none", "--hyperparams", "n_steps:9"]
    capsys.readouterr()
    assert main(asked) == 2
    assert_one_line(capsys, f"{folder} holds a run of hyperparams")


def test_without_ray_one_line_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["--seeds", "1", "--log-folder", str(tmp_path / "runs")]) == 2
    assert_one_line(capsys, "error: a sweep needs Ray: pip install 'recycle-rl[sweep]'")
    assert not list(tmp_path.iterdir())


def assert_one_line(capsys, message):
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not told.out


# One run ----------------------------------------------------------------------------------------------------------


def test_steps_are_read_off_the_last_whole_line(tmp_path):
    job = Job(tmp_path / "0", (), 900)
    assert (job.done(), job.saved(), job.finished) == (0, 0, False)
    job.folder.mkdir()
    log = job.folder / "episodes.csv"
    for text, steps in {
        "": 0,
        "timesteps,task\n": 0,
        "timesteps,task\n12,0\n345,1\n67": 345,
        "1,0\n" * 9000: 1,
    }.items():
        log.write_text(text)
        assert job.done() == steps
    (job.folder / "checkpoints").mkdir()
    for name in ("model_5_steps.zip", "model_10_steps.zip", "other.zip", "model_11_steps.json"):
        (job.folder / "checkpoints" / name).touch()
    assert job.saved() == 10
    (job.folder / "model.zip").touch()
    assert job.finished and job.done() == 900


def test_only_attempts_that_bring_no_checkpoint_are_counted(tmp_path):
    state = State(Job(tmp_path / "0", (), 900))
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)
    stages = []
    for checkpoint in (None, 100, None, 200, None, None):
        if checkpoint:
            (tmp_path / "0" / "checkpoints" / f"model_{checkpoint}_steps.zip").touch()
        state.ended(1, "there", "it broke", 2)
        stages.append((state.failures, state.stage))
    assert stages == [(1, "waiting"), (1, "waiting"), (2, "waiting"), (1, "waiting"), (2, "waiting"), (3, "failed")]
    assert (state.attempts, state.host, state.error) == (6, "there", "it broke")


def test_an_attempt_waits_for_one_that_still_trains_and_then_goes_on(tmp_path):
    whole = train(tmp_path / "whole", *PPO, "--save-freq", "32", "--keep", "9")
    folder = stopped_at(whole, 64, tmp_path / "other")
    with runs.claim(folder), pytest.raises(BlockingIOError, match="in use"):
        start_or_resume(folder, [], patience=0)
    held = threading.Event()

    def hold():
        with runs.claim(folder):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert start_or_resume(folder, []) == folder
    thread.join()
    assert not all_differences(whole, folder)


def test_an_attempt_starts_a_run_whose_folder_is_half_made(tmp_path):
    options = ["--env", "CartPole-v1", "--method", "none", "-n", "64", "--hyperparams", "n_steps:64"]
    folder = tmp_path / "CartPole-v1-stationary" / "ppo-none" / "0"
    folder.mkdir(parents=True)
    (folder / ".config.yaml.part").touch()
    assert start_or_resume(folder, [*options, "--log-folder", str(tmp_path)]) == folder
    assert runs.finished(folder)


# On a cluster -----------------------------------------------------------------------------------------------------

GATED = [*BARE, "--gym-packages", "tests.agents.faulty", "--env", "Gated-v0", *RANDOM, *NET, *ROLLOUTS, "-n", "160",
         "--save-freq", "32", "--keep", "9"]  # fmt: skip
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module", autouse=True)
def _as_important_as_other_tests():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one core each, played by processes."""
    pytest.importorskip("ray")
    clusters.load_ray()
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=SMALL | {"include_dashboard": False})
    try:
        made.add_node(**SMALL)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def gate(tmp_path):
    """Arguments of a run that waits in the middle, and the folder that lets it go on."""
    folder = tmp_path / "gate"
    folder.mkdir()
    yield [*GATED, "--env-kwargs", f"gate:{folder}"], folder
    (folder / "open").touch()


def waiting(gate, count):
    """The processes that wait at the gate, by the seed of their runs, once there are so many."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        found = {}
        for path in gate.iterdir():
            if path.name.isdigit() and Path("/proc", path.name).exists():
                words = Path("/proc", path.name, "cmdline").read_text().split("\0")
                found[next(Path(word).name for word in words if Path(word).name in ("0", "1"))] = int(path.name)
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{count} runs should wait at the gate, there are {found}")


def meanwhile(gate, count, act):
    """Wait in a thread until so many runs are at the gate, act on them, and open it."""

    def run():
        try:
            act(waiting(gate, count))
        finally:
            (gate / "open").touch()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gathered(root):
    with (root / "sweep.csv").open(newline="") as file:
        return {Path(line["folder"]).name: line for line in csv.DictReader(file)}


def assert_as_if_nothing_had_happened(tmp_path, given, root, seeds="01"):
    for seed in seeds:
        whole = train(tmp_path / f"whole{seed}", *given, "--seed", seed)
        (config,) = root.rglob(f"{seed}/config.yaml")
        for extra in {p.name for p in (config.parent / "checkpoints").iterdir()} - {
            p.name for p in (whole / "checkpoints").iterdir()
        }:
            (config.parent / "checkpoints" / extra).unlink()
        assert not all_differences(whole, config.parent)


def test_runs_whose_process_or_worker_is_killed_go_on_from_their_checkpoints(cluster, tmp_path, gate, capfd):
    given, folder = gate
    root = tmp_path / "runs"

    def kill(pids):
        os.kill(pids["0"], signal.SIGKILL)  # the training process
        os.kill(parent(pids["1"]), signal.SIGKILL)  # the worker of Ray that watches over it
        time.sleep(2)  # the run looks twice a second whether that one is still there

    thread = meanwhile(folder, 2, kill)
    words = ["--seeds", "2", "--address", cluster.address, "--log-folder", str(root), "--", *given]
    assert main(words) == 0
    thread.join()
    told = capfd.readouterr()
    found = gathered(root)
    assert {line["attempts"] for line in found.values()} == {"2"}
    assert "ppo-random/0 on" in told.out and "killed by SIGKILL (failure 1, --retries 2)" in told.out
    assert "its worker or machine was lost" in told.out
    assert not told.err
    first, second = ((root / "Gated-v0-stationary" / "ppo-random" / f"{seed}.log").read_text() for seed in "01")
    assert first.count("--- attempt on") == second.count("--- attempt on") == 2
    assert "SIGTERM: stopped after 80 steps" in second  # nobody watched over it any more
    assert_as_if_nothing_had_happened(tmp_path, given, root)

    assert main(words) == 0  # and now there is nothing left to do
    told = capfd.readouterr()
    assert "attempts" not in told.out and "2 of 2 runs finished" in told.out


def test_the_runs_of_a_machine_that_is_gone_end_on_another(cluster, tmp_path, gate):
    given, folder = gate
    root = tmp_path / "runs"
    (other,) = cluster.worker_nodes
    thread = meanwhile(folder, 2, lambda pids: cluster.remove_node(other, allow_graceful=False))
    try:
        assert main(["--seeds", "2", "--address", cluster.address, "--log-folder", str(root), "--", *given]) == 0
    finally:
        thread.join()
        cluster.add_node(**SMALL)
    assert sorted(line["attempts"] for line in gathered(root).values()) == ["1", "2"]
    assert_as_if_nothing_had_happened(tmp_path, given, root)


def test_a_run_that_always_fails_is_tried_so_often_and_named(cluster, tmp_path, capfd):
    faults = tmp_path / "faults"
    faults.write_text("exit 3")
    text = {
        "envs": [{"env": "Faulty-v0", "gym_packages": ["tests.agents.faulty"], "env_kwargs": {"faults": str(faults)}}],
        "methods": ["none"],
        "options": {"n_timesteps": 32, "hyperparams": {"n_steps": 16, "batch_size": 16}},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(text))
    assert main([str(path), "--address", cluster.address, "--retries", "1", "--log-folder", str(tmp_path / "r")]) == 1
    told = capfd.readouterr()
    assert "0 of 1 runs finished" in told.out
    assert "it said nothing (exit code 3)" in told.err and told.err.startswith("failed: ")
    assert gathered(tmp_path / "r")["0"]["attempts"] == "2"


def test_what_no_machine_has_room_for_is_refused(cluster, tmp_path, capfd):
    words = ["--seeds", "1", "--address", cluster.address, "--cpus-per-run", "64"]
    assert main([*words, "--log-folder", str(tmp_path / "runs")]) == 2
    assert_one_line(capfd, "no machine has room for a run of --cpus-per-run 64 --gpus-per-run 0; there are machines of")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "code"), [("running", 130), ("failed", 1)])
def test_a_signal_that_comes_with_the_last_runs_end_changes_nothing(tmp_path, monkeypatch, capsys, stage, code):
    def trains(cluster, missing, board, retries, interruption):
        interruption.asked = signal.SIGINT
        for state in missing:
            state.stage, state.error = stage, "as it is"

    monkeypatch.setattr("agents.sweep.__main__.connected", lambda *_, **__: contextlib.nullcontext(Mock()))
    monkeypatch.setattr("agents.sweep.__main__._train", trains)
    assert main(["--seeds", "1", "--log-folder", str(tmp_path), "--", "-n", "10"]) == code
    assert ("Go on with" in capsys.readouterr().err) == (code == 130)


def ignoring_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("asked", "begin"), [(signal.SIGINT, None), (signal.SIGTERM, ignoring_ctrl_c)], ids=["typed", "in the background"]
)
def test_an_interrupted_sweep_ends_in_order_and_goes_on(tmp_path, gate, asked, begin):
    """On this machine alone. What a script starts with ``&`` has SIGINT ignored, and so have all its children."""
    pytest.importorskip("ray")
    given, folder = gate
    root = tmp_path / "runs"
    command = [sys.executable, "-m", "agents.sweep", "--seeds", "1", "--log-folder", str(root), "--", *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=begin, **pipes)
    try:
        waiting(folder, 1)
        if begin is None:
            os.killpg(process.pid, asked)  # as a terminal does
        else:
            process.send_signal(asked)
        assert any("stopping" in line for line in process.stdout)
        (log,) = root.rglob("0.log")
        until = time.monotonic() + 100
        while "asked to end" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        (folder / "open").touch()
        err = process.communicate(timeout=200)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + asked
    again = shlex.join(["python", "-m", "agents.sweep", *command[3:]])
    assert err == f"{asked.name}: the runs have written checkpoints. Go on with: {again}\n"
    assert list(root.rglob("checkpoints/model_80_steps.zip"))
    assert gathered(root)["0"]["stage"] == "running"
    assert main(command[3:]) == 0
    assert_as_if_nothing_had_happened(tmp_path, given, root, "0")
