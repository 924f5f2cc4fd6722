"""Where a run lives and what lies in its folder."""

from __future__ import annotations

import csv
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.files import claimed, whole, write_text
from agents.options import FORMAT, Args, as_config, from_config


def run_folder(
    root: str | Path, *, env: str, drift: list[str], algo: str, method: str, tag: str | None, seed: int
) -> Path:
    """``<root>/<env>-<drift>/<algo>-<method>[-<tag>]/<seed>``; several drifts are joined by ``+``."""
    task = f"{env.replace('/', '_')}-{'+'.join(drift) or 'stationary'}"
    arm = "-".join([algo, method.replace(":", "."), *([tag] if tag else [])])
    return Path(root) / task / arm / str(seed)


def create(folder: Path, config: Mapping[str, Any], words: Sequence[str] = (), *, overwrite: bool) -> None:
    """Make the folder of a new run and write ``command.txt`` (from the words typed) and ``config.yaml``.

    Raises:
        FileExistsError: something is there already and ``overwrite`` is False, or it is no run's folder.
        BlockingIOError: another process trains there.
        OSError: the folder cannot be written.
    """
    check_free(folder, overwrite=overwrite)
    if folder.exists():
        _delete(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:  # some places look writable until one tries
        raise OSError(
            f"--log-folder: {folder} cannot be made ({error.strerror}). Choose a folder you may write"
        ) from error
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))  # first: it makes this a run
    write_text(folder / "command.txt", shlex.join(["python", "-m", "agents.train", *words]) + "\n")


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse to begin a run where something is already.

    Raises:
        FileExistsError: something is, and ``overwrite`` is False.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"{folder} exists already. Pass --overwrite to replace it, --tag NAME to keep both, or --resume it"
        )


def _delete(folder: Path) -> None:
    """Delete a run that nobody trains."""
    if not (folder / "config.yaml").exists():
        if any(not path.name.startswith(".config.yaml.") for path in folder.iterdir()):
            raise FileExistsError(f"{folder} holds no run (no config.yaml), so --overwrite will not delete it")
        shutil.rmtree(folder)
        return
    with claim(folder):
        shutil.rmtree(folder)


def claim(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes out of a run's folder until the block ends, or this process does.

    Raises:
        FileNotFoundError: there is no run.
        BlockingIOError: another one is training there.
    """
    if not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.yaml). Pass the folder of one")
    return claimed(folder / "config.yaml")


def finished(folder: Path) -> bool:
    """Whether the run in this folder came to its end: ``model.zip`` is written last."""
    return (folder / "model.zip").exists()


def read_args(folder: Path) -> Args:
    """The options of the run in a folder.

    Raises:
        ValueError: the folder is of another version of this project, or damaged.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: expected options with their values")
    if "format" not in config:
        raise ValueError(
            f"{folder} is a run of recycle-rl 0.1, whose checkpoints do not hold all that a run consists of. Start a "
            "new one, from the weights of a model that it saved with -i FILE.zip"
        )
    if config["format"] != FORMAT:
        raise ValueError(
            f"{folder} is of format {config['format']!r}, this version of recycle-rl reads format {FORMAT}. Go on with "
            "the version that wrote it"
        )
    return from_config(config)


HOW = ("log_folder", "overwrite", "progress", "verbose", "save_freq", "save_minutes", "keep", "device", "num_threads")
"""Options that do not say what is trained."""


def check_same(folder: Path, asked: Args) -> None:
    """Refuse to take the run in a folder, if there is one, for the one that is asked for; :data:`HOW` may differ.

    Raises:
        ValueError: it has another option, or is one that :func:`read_args` refuses.
    """
    if not (folder / "config.yaml").exists():
        return
    there = as_config(read_args(folder))
    for name, value in as_config(asked).items():
        if name not in HOW and there[name] != value:
            raise ValueError(
                f"{folder} holds a run of {name} {there[name]!r}, now {value!r} is asked for. Choose another "
                "--log-folder, tell them apart with a tag, or delete it"
            )


def save_model(model: BaseAlgorithm, path: Path) -> None:
    """``model.save``, whole or not at all."""
    with whole(path) as file:
        model.save(file.name)


class EpisodeLog(BaseCallback):
    """Writes one line for each finished training episode: ``timesteps,task,return,length``.

    Also records ``drift/task``, the task that the first copy is on, for TensorBoard.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: TextIO | None = None

    def _on_training_start(self) -> None:
        self._file = self.path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if not self.path.stat().st_size:
            self._rows.writerow(["timesteps", "task", "return", "length"])

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            episode = info.get("episode")
            if episode is not None:
                self._rows.writerow([self.num_timesteps, info.get("drift/task", 0), episode["r"], episode["l"]])
        return True

    def _on_rollout_end(self) -> None:
        infos = self.locals.get("infos")
        if infos and "drift/task" in infos[0]:
            self.logger.record("drift/task", int(infos[0]["drift/task"]), exclude=("stdout", "log"))

    def _on_rollout_start(self) -> None:
        if self._file is not None:
            self._file.flush()

    def _on_training_end(self) -> None:
        self.close()

    def close(self, *, quietly: bool = False) -> None:
        """Write what is left. ``quietly``: where training has ended in an error, a full disk say, tell of no second."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError:
            if not quietly:
                raise
