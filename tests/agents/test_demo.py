import dataclasses
from pathlib import Path

import pytest
import tyro

from agents import demo, runs, train
from agents.demo import ARMS, TASKS, Args, main
from agents.jobs import Job, _command
from agents.options import as_config
from recycle.methods import METHODS


def jobs(arms: tuple[str, ...], **options: int) -> list[Job]:
    return list(demo._jobs(Args(log_folder="here", **options), arms))  # type: ignore[arg-type]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("algo", TASKS)
def test_every_arm_is_a_command_that_the_training_script_takes(arm: str, algo: str) -> None:
    job = next(job for job in jobs((arm,)) if f"/{algo}-" in str(job.folder))
    assert not {"{change}", "{half}", "{after}"} & set("".join(job.options).split())
    options = tyro.cli(train.Args, args=job.options)
    assert options.n == job.steps
    assert options.method.split("+")[0] in (*METHODS, "none")


def test_every_recycler_and_every_control_has_an_arm() -> None:
    growing = {"grow", "expand", "near_zero", "net2wider", "net2deeper", "gradmax", "tiny", "firefly", "folding"}
    assert {arm.method for arm in ARMS.values()} >= set(METHODS) - growing - {"senn"}


def test_folders_are_the_arms_own() -> None:
    folders = [job.folder for job in jobs(tuple(ARMS), seeds=2)]
    assert len(set(folders)) == len(folders) == 2 * 2 * len(ARMS)


def test_a_run_that_reads_another_comes_behind_it_and_names_it() -> None:
    listed = jobs(("replay", "redo"), seeds=1)
    for replay in (job for job in listed if job.after is not None):
        source = next(job for job in listed if job.folder == replay.after)
        assert listed.index(source) < listed.index(replay)
        assert f"path:{source.folder}/edits.jsonl" in replay.options
        assert source.folder.parent.name.endswith("-redo")
        assert source.folder.name == replay.folder.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "rdo"], "--arms has no 'rdo': did you mean 'redo'?"),
        (["--algos", "sac"], "--algos has no 'sac'"),
        (["--arms", "replay"], "replay reads what redo writes: name both"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main([*words, "--log-folder", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_finished_run_of_other_options_is_not_taken_for_one_of_these(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    args = Args(log_folder=str(tmp_path), seeds=1)
    job = next(demo._jobs(args, ("monitor",)))
    config = as_config(tyro.cli(train.Args, args=[*job.options, "--every", "77"]))
    runs.create(job.folder, config, overwrite=False)
    (job.folder / "model.zip").touch()
    here = sorted(tmp_path.rglob("*"))
    assert main(["--log-folder", str(tmp_path), "--seeds", "1", "--arms", "monitor"]) == 2
    told = capsys.readouterr().err
    assert f"{job.folder} holds a run of every 77, now 1024 is asked for" in told
    assert told.count("\n") == 1 and sorted(tmp_path.rglob("*")) == here


def test_a_run_that_the_same_command_began_goes_on_and_another_begins_anew(tmp_path: Path) -> None:
    job = jobs(("redo",), seeds=1)[0]
    begun = dataclasses.replace(job, folder=tmp_path)
    assert _command(begun) == job.command
    runs.create(tmp_path / "run", {}, job.options, overwrite=False)
    begun = dataclasses.replace(job, folder=tmp_path / "run")
    assert _command(begun)[1:] == ("-m", "agents.train", "--resume", str(begun.folder))
    longer = dataclasses.replace(begun, options=(*job.options, "--verbose", "1"))
    assert _command(longer) == longer.command
