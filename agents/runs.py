"""Where a run lives and what lies in its folder."""

from __future__ import annotations

import csv
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback


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
        OSError: the folder cannot be written.
    """
    if folder.exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists already. Pass --overwrite to replace it, or --tag NAME to keep both"
            )
        if any(folder.iterdir()) and not (folder / "config.yaml").exists():
            raise FileExistsError(f"{folder} holds no run (no config.yaml), so --overwrite will not delete it")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"--log-folder: {folder} cannot be made ({error.strerror}). Choose a folder you may write"
        ) from error
    write_text(folder / "command.txt", shlex.join(["python", "-m", "agents.train", *words]) + "\n")
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def save_model(model: BaseAlgorithm, path: Path) -> None:
    """``model.save``, whole or not at all."""
    part = path.with_name(f".{path.stem}.part.zip")
    model.save(part)
    os.replace(part, path)


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

    def close(self) -> None:
        """Write what is left; training may have ended in an error."""
        if self._file is not None:
            self._file.close()
