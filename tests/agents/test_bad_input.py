"""Whatever is typed after any script's name: it works, or one line says why not and nothing has been written."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import shutil
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from gymnasium.error import Error as GymError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO

import agents
from agents import build, command_line, compare, jobs, plot, regression, train
from agents.bench import __main__ as bench
from agents.experiments import folding, self_expanding
from agents.sweep import __main__ as sweep

EXAMPLES = 1000
MANY = int(os.environ.get("BAD_INPUT", "10000"))


class Begun(BaseException):
    """The work itself would begin now: all that a script asks of its options has been answered."""


def begins(*_: Any, **__: Any) -> Any:
    raise Begun


def no_training(run: Any) -> None:
    """Save the model as it was built."""
    run.model.save(run.folder / "model.zip")


class NoFigure:
    """What takes the place of a drawing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def savefig(self, path: Path, **_: Any) -> None:
        path.write_text("a figure")


WORK: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "agents.train": [(train, "_learn", no_training), (build, "SubprocVecEnv", build.DummyVecEnv)],
    "agents.demo": [(jobs, "run_jobs", begins)],
    "agents.growing": [(jobs, "run_jobs", begins)],
    "agents.regression": [(regression, "processes", begins)],
    "agents.sweep": [(sweep, "connected", begins)],
    "agents.experiments": [(folding, "processes", begins), (self_expanding, "processes", begins)],
    "agents.bench": [
        (bench, "_learn", begins), (bench.costs, "cost_of", begins),
        (bench.scaling, "measured", begins), (bench.slopes, "measured", begins)],
    "agents.plot": [(plot, "draw", NoFigure)],
    "agents.compare": [(compare, "draw", NoFigure)],
    "agents.inspect": [],
    "agents.methods": [],
}  # fmt: skip
"""What takes long in each script, and what stands in its place here. All that looks at options runs as it is."""


def scripts() -> list[str]:
    """The modules that can be run."""
    names = [name for _, name, _ in pkgutil.walk_packages(agents.__path__, "agents.")]
    return sorted(name.removesuffix(".__main__") for name in names if hasattr(importlib.import_module(name), "main"))


def main_of(script: str) -> Callable[[list[str]], int]:
    found = importlib.import_module(script)
    return getattr(found, "main", None) or importlib.import_module(f"{script}.__main__").main


class Told(Exception):
    """What a script gives tyro to parse."""

    def __init__(self, commands: dict[str, Any]) -> None:
        self.commands = commands


def commands(script: str) -> dict[str, Any]:
    """A script's subcommands and their options; one without a name where it has none. Found by asking it."""

    def one(kind: Any, **_: Any) -> Any:
        raise Told({"": kind})

    def several(kinds: dict[str, Any], **_: Any) -> Any:
        raise Told(dict(kinds))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", one)
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", several)
        try:
            main_of(script)([])
        except Told as told:
            return told.commands
    raise AssertionError(f"{script} parses its options in another way")


def options(kind: Any) -> list[tuple[str, str, str]]:
    """Every option of a command as (what is typed, its name, what it takes); of a positional one "" is typed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = tyro.extras.get_parser(kind)
    found = []
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        name = (action.dest or "").replace("_", "-").lower()
        takes = "" if action.nargs == 0 else f"{action.nargs} {action.metavar} {action.choices or ''}"
        found += [(word, name, takes) for word in action.option_strings or [""]]
    return found


COMMANDS = {(script, word): options(kind) for script in scripts() for word, kind in commands(script).items()}
EVERY_OPTION = sorted({word for found in COMMANDS.values() for word, _, _ in found if word})
QUICK = {
    ("agents.train", ""): ["--hyperparams", "n_steps:8", "batch_size:8", "--policy-kwargs", "net_arch:[4]"],
    ("agents.inspect", ""): ["model.zip", "--env", "CartPole-v1", "--steps", "8"],
    ("agents.plot", ""): ["runs"],
    ("agents.compare", ""): ["runs"],
}
"""What makes a command's work short."""

NUMBERS = ["0", "1", "2", "3", "8", "-1", "-7", "0.5", "1.5", "1e-3", "1e3", "nan", "inf", "-inf", "1e400", str(2**31),
           str(2**63), str(-(2**70)), "None", "True", "1_0"]  # fmt: skip
PATHS = ["runs", "runs/a", "empty", "file", "file/below", "text.zip", "model.zip", "nowhere", "nowhere/there", "", ".",
         "/proc/nowhere", "broken/yaml", "broken/list", "broken/old", "broken/keys", "broken/values", "broken/csv",
         "x" * 300, "nul\0", "Ünïcode ☃", "..//runs/", "broken", "out.png", "out.gif", "empty/out.pdf",
         "-"]  # fmt: skip
WORDS = {
    "algo": ["ppo", "dqn", "a2c", "sac", "td3", "PPO", "pppo", "recurrent_ppo", "maskable_ppo", "trpo", "qrdqn",
             "ddpg"],
    "env": ["CartPole-v1", "Pendulum-v1", "DigitsBandit-v1", "CartPoll-v1", "CartPole", "nowhere:Env-v0", "a/b", "",
            "CartPole-v99", "MountainCarContinuous-v0", "Taxi-v3", ":"],
    "env-kwargs": ["images:20", "images:x", "images:-1", "images:1e3", "episode_length:2", "render_mode:x", "wings:2",
                   "sutton_barto_reward:3", "g:abc", "max_episode_steps:-1", "max_episode_steps:x", "id:x"],
    "drift": ["permute", "offset", "scale", "mask", "remap", "reward_scale", "reward_flip", "physics", "relabel",
              "none",
              "permut"],
    "drift-kwargs": ["strength:0.5", "strength:x", "strength:nan", "fraction:2", "fraction:[1]", "low:0", "high:x",
                     "parameters:gravity", "parameters:[1]", "parameters:3", "mid_episode:3", "change:x", "env:3"],
    "change": ["every:10", "every:0", "every:x", "every:", "at:1,2", "at:2,1", "cyclic:10,1", "random:5", "evry:5",
               "every:1e300", "cyclic:2,3", "every", "random:1"],
    "method": ["split", "redo", "none", "monitor", "redo+l2_init", "redo+split", "spilt", "", "+", "os:path",
               "os:getcwd",
               ".:x", "nowhere:M", "grow+gradmax", "grow", "a/b", "replay", "redo+none", "cbp", "plasticity_injection"],
    "method-kwargs": ["tau:0.1", "tau:x", "tau:nan", "noise:-1", "share:2", "redo.tau:0.1", "path:file", "path:nowhere",
                      "count:1e9", "when:rank:2", "when:every:x", "parent:best", "most:None", "by:3", "layers:[1]"],
    "policy": ["auto", "MlpPolicy", "CnnPolicy", "MultiInputPolicy", "MlpPolizy", "MlpLstmPolicy"],
    "hyperparams": ["n_steps:8", "n_steps:0", "n_steps:x", "batch_size:8", "batch_size:-1", "learning_rate:nan",
                    "gamma:2",
                    "learning_rate:lin_1", "ent_coef:auto", "ent_coef:x", "train_freq:(1,'step')", "train_freq:(1,'x')",
                    "train_freq:0", "buffer_size:1e15", "buffer_size:10", "action_noise:x", "n_epochs:1.5", "seed:1",
                    "replay_buffer_class:x", "clip_range:None", "target_kl:-1", "use_sde:True", "use_sde:3", "tau:inf",
                    "policy_kwargs:{}", "exploration_fraction:0", "learning_starts:x", "rollout_buffer_kwargs:3",
                    "max_grad_norm:x", "stats_window_size:0", "gradient_steps:-2", "replay_buffer_kwargs:{'a':1}",
                    "optimize_memory_usage:True", "top_quantiles_to_drop_per_net:999", "_init_setup_model:False"],
    "policy-kwargs": ["net_arch:[4]", "net_arch:[]", "net_arch:[0]", "net_arch:x", "net_arch:{'pi':[4]}",
                      "net_arch:[-1]",
                      "net_arch:{'pi':4}", "net_arch:[1e9]", "net_arch:[4.5]", "activation_fn:relu", "activation_fn:x",
                      "activation_fn:module", "activation_fn:3", "optimizer_class:x", "optimizer_kwargs:{'lr':1}",
                      "optimizer_kwargs:{'x':1}", "ortho_init:3", "n_critics:0", "log_std_init:x", "net_arch:{'x':[4]}",
                      "features_extractor_class:x", "features_extractor_kwargs:{'x':1}", "lstm_hidden_size:0",
                      "activation_fn:softmax", "activation_fn:multiheadattention", "use_expln:True"],
    "device": ["cpu", "auto", "cuda", "cuda:99", "gpu", "", "meta", "cpu:1"],
    "gym-packages": ["agents.envs", "nowhere", "", ".", "a..b", "nul\0", "os.path.nowhere"],
    "tag": ["a", "a/b", "", "..", "x" * 300, "nul\0", "☃"],
    "arms": ["none", "redo", "monitor", "split", "replay", "all", "redoo", ""],
    "algos": ["ppo", "dqn", "sac"],
    "against": ["monitor", "none", "redo", "", "rdo"],
    "names": ["redo", "redoo", "os:path", "os:getcwd", "nowhere:x", "", ":"],
    "tasks": ["sine", "period", "sinus", "stacked"],
    "examples": ["5", "10", "0", "20", "141", "100", str(2**62)],
    "steps": ["8", "0", "-1", "x"], "workers": ["1", "2", "0", "-1"], "seeds": ["1", "2", "0", "-3"],
    "n": ["16", "1", "0", "-5", "x", str(2**53), str(10**30), "1e3"],
    "n-envs": ["1", "2", "0", "-1", str(2**40)], "num-threads": ["1", "0", "-1", str(2**40), "None"],
    "points": ["20", "0", "-1", str(2**62)],
}  # fmt: skip
"""Values by the name of the option: right ones, near ones, wrong ones."""
ANYWHERE = [
    *NUMBERS,
    *PATHS,
    "x",
    "key:value",
    "key:",
    ":value",
    "a:b:c",
    "a:" + "[" * 300,
    "a:1",
    "a:{'b':[}",
    "--",
    "\0",
]


def value(draw: st.DrawFn, name: str, takes: str) -> list[str]:
    """What is typed behind an option, of the right kind more often than not."""
    if not takes:
        return []
    few = WORDS.get(name) or (NUMBERS if "INT" in takes or "FLOAT" in takes else [])
    few = few or (PATHS if "PATH" in takes or name in ("log-folder", "resume", "trained-agent", "runs") else ANYWHERE)
    if "{" in takes and "STR" not in takes:
        few = [*takes.partition("{")[2].partition("}")[0].split(","), "x"]
    one = st.sampled_from(few) if draw(st.integers(0, 5)) else st.sampled_from(ANYWHERE) | st.text(max_size=5)
    if takes.startswith(("*", "+")):
        return draw(st.lists(one, max_size=3))
    return [draw(one)] * draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 0, 2]))


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A script and what is typed behind its name."""
    script, word = draw(st.sampled_from([*sorted(COMMANDS), *[("agents.train", "")] * len(COMMANDS)]))
    known = COMMANDS[script, word]
    words = [word] * bool(word and draw(st.integers(0, 15))) + QUICK.get((script, word), []) * bool(
        draw(st.integers(0, 9))
    )
    for _ in range(draw(st.integers(0, 3)) if known else 0):
        option, name, takes = draw(st.sampled_from(known))
        words += [option] * bool(option) + value(draw, name, takes)
    if not draw(st.integers(0, 9)):
        words += [draw(st.sampled_from(EVERY_OPTION))]
    if not draw(st.integers(0, 19)):
        words += [draw(st.sampled_from(ANYWHERE))]
    return script, words


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, models, and what only looks like them."""
    here = tmp_path_factory.mktemp("bad_input") / "template"
    here.mkdir()
    quick = [
        "-n",
        "32",
        "--hyperparams",
        "n_steps:16",
        "batch_size:16",
        "n_epochs:1",
        "--policy-kwargs",
        "net_arch:[4]",
    ]
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for method in ("monitor", "redo"):
            assert train.main([*quick, "--method", method, "--save-freq", "16", "--log-folder", "runs"]) == 0
    (run,) = (here / "runs").glob("*/ppo-redo/0")
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    (here / "text.zip").write_text("this is no zip")
    PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, n_steps=8, device="cpu").save(here / "model.zip")
    config = yaml.safe_load((run / "config.yaml").read_text())
    contents = {
        "yaml": "a: [b\n c: {", "list": "- 1\n- 2", "old": "algo: ppo\nenv: x\nmethod: y\nseed: 0",
        "keys": yaml.safe_dump({"format": 1, "algo": "ppo"}),
        "values": yaml.safe_dump(config | {"n_envs": "two", "hyperparams": 3, "drift": {"a": 1}, "seed": [1]}),
        "csv": yaml.safe_dump(config),
    }  # fmt: skip
    for name, text in contents.items():
        (here / "broken" / name).mkdir(parents=True)
        (here / "broken" / name / "config.yaml").write_text(text)
    (here / "broken" / "csv" / "episodes.csv").write_text('timesteps,task,return,length\n1,2\n"')
    return here


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    """All that lies in a folder, with sizes and times."""
    found = (path for path in folder.rglob("*"))
    return {
        str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in found
        if p.is_file() or not any(p.iterdir())
    }


@contextlib.contextmanager
def quiet() -> Iterator[tuple[io.StringIO, list[Exception]]]:
    """Standard error, and the errors that were told there as one line."""
    said, errors = io.StringIO(), []
    one_line = command_line.one_line

    def noted(error: Exception) -> str:
        errors.append(error)
        return one_line(error)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(command_line, "one_line", noted)
        for places in WORK.values():
            for place, name, work in places:
                patch.setattr(place, name, work)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield said, errors


def on_purpose(error: BaseException) -> bool:
    """Whether somebody looked at what was given and said so, rather than ran into it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, (OSError, ImportError, GymError)) or (last.line or "").startswith("raise ")


def check(script: str, words: list[str], here: Path, before: dict[str, tuple[int, int]], counts: Counter[str]) -> bool:
    """Run a command line. Returns whether the folder is as it was."""
    shown = f"python -m {script} {words}"
    counts[script] += 1
    escaped = None
    with quiet() as (said, errors):
        try:
            code: Any = main_of(script)(words)
        except SystemExit as end:
            code = end.code
        except Begun:
            code = 0
        except Exception as error:
            escaped, code = error, 1
    told = said.getvalue()
    if escaped is not None:
        place = traceback.extract_tb(escaped.__traceback__)[-1]
        raise AssertionError(
            f"{shown} ends in {type(escaped).__name__}: {escaped}\n{place.filename}:{place.lineno}: {place.line}"
        )
    assert type(code) is int, f"{shown} ends with {code!r}, no exit code"
    assert "Traceback" not in told, f"{shown} says\n{told}"
    if not code:
        counts["accepted"] += 1
        return False
    counts["refused"] += 1
    if errors:
        lines = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and len(lines[0]) > 20, f"{shown} says\n{told}"
        inner = traceback.extract_tb(errors[0].__traceback__)[-1]
        assert on_purpose(errors[0]), (
            f"{shown} says {lines[0]!r}, from inside\n{inner.filename}:{inner.lineno}: {inner.line}"
        )
    else:
        assert told, f"{shown} ends with {code} and says nothing"
    assert listed(here) == before, f"{shown} has written {listed(here).keys() ^ before.keys() or 'into a file'}"
    return True


def run(examples: int, number: int, template: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    here = template.with_name("here")

    def renewed() -> dict[str, tuple[int, int]]:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(template, here)
        os.chdir(here)
        return listed(here)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(template)
        before = renewed()

        @seed(number)
        @settings(
            max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        @given(command_lines())
        def every(line: tuple[str, list[str]]) -> None:
            nonlocal before
            same = False
            try:
                same = check(*line, here, before, counts)
            finally:
                if not same and listed(here) != before:
                    before = renewed()

        every()
    return counts


def test_every_script_is_known() -> None:
    assert scripts() == sorted(WORK), "say in WORK what takes long in a new script"


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(template: Path) -> None:
    counts = run(EXAMPLES, 0, template)
    assert counts["refused"] > EXAMPLES // 4 and counts["accepted"] > EXAMPLES // 20
    assert set(WORK) <= set(counts)


@pytest.mark.slow
def test_much_bad_input_is_refused_in_one_line_and_nothing_is_written(template: Path) -> None:
    counts = run(MANY, 1, template)
    print(counts)
    assert counts["refused"] > MANY // 4
