"""What goes wrong while a run trains, and that no run is lost to it."""

import fcntl
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from stable_baselines3 import DQN, PPO

from agents import files, logs, runs, saving
from agents.train import main
from tests.agents import faulty
from tests.agents.resuming import BARE, NET, RANDOM, ROLLOUTS, all_differences, stopped_at, train

torch.set_num_threads(1)

FAULTY = [*BARE, "--gym-packages", "tests.agents.faulty", "--env", "Faulty-v0", *RANDOM, *NET, "-n", "160"]
PPO_ARGS = [*FAULTY, *ROLLOUTS, "--save-freq", "32", "--keep", "9"]
DQN_ARGS = [*FAULTY, "--algo", "dqn", "--hyperparams", "learning_starts:20", "buffer_size:80", "batch_size:8",
            "train_freq:4", "--save-freq", "32", "--keep", "9"]  # fmt: skip


@pytest.fixture
def faults(tmp_path):
    """Arguments that name a file of faults, and the file; it is the same for the run that has none."""
    path = tmp_path / "faults"
    path.write_text("")
    yield ["--env-kwargs", f"faults:{path}"], path
    faulty.file_size(None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), *PPO_ARGS)


def steps(folder):
    return sorted(int(path.stem.split("_")[1]) for path in (folder / "checkpoints").glob("*.zip"))


def run_folder(root):
    (config,) = root.rglob("config.yaml")
    return config.parent


# Asked to end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "code"), [("sigterm", 143), ("sigint", 130)])
@pytest.mark.parametrize("argv", [PPO_ARGS, DQN_ARGS], ids=["ppo", "dqn"])
def test_a_run_that_is_asked_to_end_saves_and_says_how_to_go_on(tmp_path, capsys, faults, argv, what, code):
    given, path = faults
    whole = train(tmp_path / "whole", *argv, *given)
    path.write_text(f"{what} 73")
    assert main([*argv, *given, "--log-folder", str(tmp_path / "stopped")]) == code
    folder = run_folder(tmp_path / "stopped")
    told = capsys.readouterr().err.splitlines()
    at = 80 if argv is PPO_ARGS else 76  # where the next rollout begins
    assert told[-1] == f"{what.upper()}: stopped after {at} steps; go on with {saving.resume_command(folder)}"
    assert steps(folder)[-1] == at and not runs.finished(folder)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are those of before
    assert main(["--resume", str(folder)]) == 0
    (folder / "checkpoints" / f"model_{at}_steps.zip").unlink()
    assert not all_differences(whole, folder)


def test_a_second_signal_ends_it_at_once(tmp_path, capsys, faults):
    given, path = faults
    path.write_text("sigint 70\nsigint 71")
    assert main([*PPO_ARGS, *given, "--log-folder", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err and steps(run_folder(tmp_path)) == [32, 64]


# Killed -----------------------------------------------------------------------------------------------------------


def cpu_seconds(pid):
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return float("inf")
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def go_on(folder):
    sys.exit(main(["--resume", str(folder)]))


def kill_again_and_again(folder, times, seconds, draw):
    """Resume and kill after random amounts of work, then resume to the end. Returns how often it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agents.train", "tests.agents.faulty"])
    killed = 0
    while not runs.finished(folder):
        process = context.Process(target=go_on, args=(folder,))
        process.start()
        until = draw.uniform(0, seconds) if killed < times else float("inf")
        while process.is_alive() and cpu_seconds(process.pid) < until:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
    return killed


@pytest.mark.parametrize("times", [6, pytest.param(50, marks=pytest.mark.slow)], ids=["6_kills", "50_kills"])
@pytest.mark.parametrize("argv", [PPO_ARGS, DQN_ARGS], ids=["ppo", "dqn"])
def test_a_run_that_is_killed_ends_with_the_same_weights(tmp_path, argv, times):
    argv = [*argv, "-n", str(160 if times == 6 else 1600), "--save-freq", "16"]
    before = time.process_time()
    whole = train(tmp_path / "whole", *argv)
    seconds = time.process_time() - before
    folder = tmp_path / "killed"
    shutil.copytree(whole, folder, ignore=lambda _, names: set(names) - {"config.yaml"})  # as if at the very start
    killed = kill_again_and_again(folder, times, seconds if times == 6 else seconds / 5, random.Random(0))
    print(f"killed {killed} times")
    assert killed >= times / 2 and not all_differences(whole, folder)


def die_at(number, folder):
    """Resume, and be killed at that change of the file system."""
    count = 0

    def counted(change):
        def changed(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return changed

    for name in ("replace", "unlink", "truncate", "rename", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    go_on(folder)


def test_a_run_that_is_killed_at_any_change_of_a_file_ends_with_the_same_weights(tmp_path, finished):
    folder = stopped_at(finished, 0, tmp_path / "killed")
    context = multiprocessing.get_context("forkserver")
    killed = 0
    while not runs.finished(folder):
        process = context.Process(target=die_at, args=(2 + 3 * killed, folder))
        process.start()
        process.join()
        assert process.exitcode == (0 if runs.finished(folder) else -signal.SIGKILL)
        killed += process.exitcode != 0
    assert killed > 6 and not all_differences(finished, folder)


# A full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [PPO_ARGS, DQN_ARGS], ids=["ppo", "dqn"])
def test_a_checkpoint_that_does_not_fit_is_none_and_training_goes_on(tmp_path, faults, argv):
    given, path = faults
    argv = [*argv, *given, "--policy-kwargs", "net_arch:[192,192]", "activation_fn:relu"]  # large ones
    whole = train(tmp_path / "whole", *argv)
    path.write_text("full 50\nroom 120")
    with pytest.warns(RuntimeWarning, match=r"no checkpoint at step \d+: .*Training goes on; the ones before are kept"):
        folder = train(tmp_path / "full", *argv)
    assert steps(folder) == [32, 128] and not list((folder / "checkpoints").glob(".*"))
    assert not all_differences(whole, folder)


@pytest.mark.parametrize("name", ["edits.jsonl", "evaluations.csv"])
def test_a_log_that_does_not_fit_ends_the_run_and_it_goes_on_later(tmp_path, capsys, monkeypatch, faults, name):
    given, path = faults
    argv = [*PPO_ARGS, *given, "--eval-freq", "32"]
    whole = train(tmp_path / "whole", *argv)
    folder = tmp_path / "full" / whole.relative_to(tmp_path / "whole")
    monkeypatch.setattr(faulty, "JAMS", [folder / name])
    path.write_text("jam 70")
    assert main([*argv, "--log-folder", str(tmp_path / "full")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error:") and "No space left on device" in told and saving.resume_command(folder) in told
    assert steps(folder) == [32, 64]
    path.write_text("")
    (folder / "kept").replace(folder / name)
    assert main(["--resume", str(folder)]) == 0
    assert not all_differences(whole, folder)


def test_a_table_that_does_not_fit_ends_the_run_and_it_goes_on_later(tmp_path, capsys, monkeypatch, finished):
    def fails(table, *args):
        table._file.write("half a li")
        table._file.flush()
        raise OSError(28, "No space left on device")

    folder = stopped_at(finished, 64, tmp_path / "run")
    monkeypatch.setattr(logs.ProgressTable, "write", fails)
    assert main(["--resume", str(folder)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["--resume", str(folder)]) == 0
    assert not all_differences(finished, folder)


def test_a_disk_that_cannot_sync_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, finished):
    folder = stopped_at(finished, 64, tmp_path / "run")
    before = (folder / "checkpoints" / "model_64_steps.zip").read_bytes()

    sync = os.fsync

    def fails(number):
        if "checkpoints" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        sync(number)

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert main(["--resume", str(folder)]) == 0
    assert (folder / "checkpoints" / "model_64_steps.zip").read_bytes() == before
    assert steps(folder) == [32, 64] and not list((folder / "checkpoints").glob(".*"))
    (folder / "model.zip").unlink()
    monkeypatch.undo()
    assert main(["--resume", str(folder)]) == 0 and not all_differences(finished, folder)


# Damage, and files of others ------------------------------------------------------------------------------------


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shortened(path):
    os.truncate(path, path.stat().st_size - 1)


def unreadable(path):
    path.with_suffix(".json").write_text('{"format": 1')


@pytest.mark.parametrize("damage", [flipped, shortened, unreadable])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, finished, damage):
    folder = stopped_at(finished, 96, tmp_path / "run")
    damage(folder / "checkpoints" / "model_96_steps.zip")
    with pytest.warns(RuntimeWarning, match=r"model_96_steps.zip is damaged \(.*\); the checkpoint before it is used"):
        assert main(["--resume", str(folder)]) == 0
    assert not all_differences(finished, folder)


def test_with_no_whole_checkpoint_nothing_is_lost(tmp_path, capsys, finished):
    folder = stopped_at(finished, 64, tmp_path / "run")
    for path in (folder / "checkpoints").glob("*.zip"):
        flipped(path)
    logged = (folder / "edits.jsonl").read_bytes()
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert main(["--resume", str(folder)]) == 2
    assert "no checkpoint of" in capsys.readouterr().err and (folder / "edits.jsonl").read_bytes() == logged


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_what_the_run_did_not_write_is_not_unpickled(tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    folder = stopped_at(finished, 64, tmp_path / "run")
    foreign = folder / "checkpoints" / "model_99_steps.zip"
    shutil.copy(folder / "checkpoints" / "model_64_steps.zip", foreign)
    with zipfile.ZipFile(foreign, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice: the last one counts
        archive.writestr("environments/training_0.pkl", pickle.dumps(Evil()))
    assert main(["--resume", str(folder)]) == 2
    assert "was not written by this run" in capsys.readouterr().err
    shutil.copy(folder / "checkpoints" / "model_64_steps.json", foreign.with_suffix(".json"))
    with pytest.warns(RuntimeWarning, match="model_99_steps.zip is damaged"):
        assert main(["--resume", str(folder)]) == 0
    assert not (tmp_path / "evil").exists() and not all_differences(finished, folder)


# Not a number ---------------------------------------------------------------------------------------------------


def poisoned(kind, monkeypatch, at):
    """Its training puts a NaN into a weight once it has come to a step."""
    training = kind.train

    def train_and_poison(model, *args, **kwargs):
        training(model, *args, **kwargs)
        if model.num_timesteps >= at:
            with torch.no_grad():
                next(model.policy.parameters()).view(-1)[0] = float("nan")

    monkeypatch.setattr(kind, "train", train_and_poison)


def test_a_nan_in_a_weight_is_never_saved(tmp_path, monkeypatch):
    poisoned(DQN, monkeypatch, 70)
    with pytest.warns(RuntimeWarning, match=r"q_net.* is NaN or infinite at step 96, so no checkpoint is written"):
        folder = train(tmp_path, *DQN_ARGS)
    assert steps(folder) == [32, 64]
    told = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    late = [group for line in told if line["step"] > 72 for group in line["groups"].values()]
    assert late and all("NaN or infinite activations" in group["note"] and not group["recycled"] for group in late)


def test_a_nan_in_a_weight_may_end_the_run(tmp_path, capsys, monkeypatch):
    poisoned(DQN, monkeypatch, 70)
    assert main([*DQN_ARGS, "--stop-on-nan", "--log-folder", str(tmp_path)]) == 2
    assert "is NaN or infinite at step 96" in capsys.readouterr().err and steps(run_folder(tmp_path)) == [32, 64]


def test_a_run_goes_on_from_before_a_nan(tmp_path, capsys, monkeypatch, finished):
    poisoned(PPO, monkeypatch, 70)  # its distribution refuses NaN at the next step
    assert main([*PPO_ARGS, "--log-folder", str(tmp_path)]) == 2
    folder = run_folder(tmp_path)
    assert saving.resume_command(folder) in capsys.readouterr().err and steps(folder) == [32, 64]
    monkeypatch.undo()
    assert main(["--resume", str(folder)]) == 0 and not all_differences(finished, folder)


# Other processes ------------------------------------------------------------------------------------------------


def test_an_environments_process_that_dies_ends_the_run_and_it_goes_on_later(tmp_path, capfd, faults):
    given, path = faults
    argv = [*PPO_ARGS, *given, "--n-envs", "2", "--vec-env", "subproc"]
    whole = train(tmp_path / "whole", *argv)
    path.write_text("exit 41")
    assert main([*argv, "--log-folder", str(tmp_path / "died")]) == 2
    folder = run_folder(tmp_path / "died")
    told = capfd.readouterr().err.splitlines()[-1]
    assert "an environment's worker process has died" in told and saving.resume_command(folder) in told
    assert steps(folder) == [32, 64] and not multiprocessing.active_children()
    path.write_text("")
    assert main(["--resume", str(folder)]) == 0
    assert not all_differences(whole, folder)  # also where environments live in processes of their own


@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"]])
def test_a_second_process_is_refused(tmp_path, capsys, finished, more):
    folder = tmp_path / "Faulty-v0-stationary" / "ppo-random" / "0"
    stopped_at(finished, 64, folder)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    argv = ["--resume", str(folder)] if more == ["--resume"] else [*PPO_ARGS, *more, "--log-folder", str(tmp_path)]
    with runs.claim(folder):
        assert main(argv) == 2
    assert "another process trains this run" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert main(["--resume", str(folder)]) == 0  # the lock is gone with its holder


def hold(path, ready):
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ready.set()
        time.sleep(600)


def test_the_lock_dies_with_its_process(tmp_path, finished):
    folder = stopped_at(finished, 64, tmp_path / "run")
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=hold, args=(folder / "config.yaml", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match="in use"), runs.claim(folder):
        pass
    process.kill()
    process.join()
    with runs.claim(folder):
        pass


# The clock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, finished, jump):
    real, real_ns = time.time, time.time_ns
    folder = stopped_at(finished, 64, tmp_path / "run")
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(jump * 1e9))
    assert main(["--resume", str(folder)]) == 0
    assert not all_differences(finished, folder)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    callback = saving.Checkpoints(tmp_path, [], minutes=2.0)
    callback.num_timesteps = 7
    assert not callback._due()
    now = 121.0
    assert callback._due()
    callback._took = 10.0  # as long as this takes to write, it may not come every two minutes
    assert not callback._due()
    now = 201.0
    assert callback._due()


# Folders of others --------------------------------------------------------------------------------------------


def changed_config(folder, **change):
    config = yaml.safe_load((folder / "config.yaml").read_text()) | change
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("form", "told"), [(None, "is a run of recycle-rl 0.1"), (99, "is of format 99, this version of recycle-rl reads")]
)
def test_a_run_of_another_version_is_refused_by_name(tmp_path, capsys, finished, form, told):
    folder = stopped_at(finished, 64, tmp_path / "run")
    changed_config(folder, format=form)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    assert main(["--resume", str(folder)]) == 2
    assert told in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
