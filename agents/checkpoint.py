"""Checkpoints of a training run, from which it goes on exactly as if it had never stopped.

A checkpoint is one file, ``checkpoints/model_<steps>_steps.zip``, with its manifest beside it (``.json``: format,
steps, size and SHA-256). The zip is what stable-baselines3's own ``save`` writes, so ``PPO.load`` opens it, and more:

- ``state.pt``: counters, books, statistics and random generators (:mod:`agents.state`), plain tensors and numbers;
- ``replay/*.npy``: the filled part of an off-policy algorithm's buffer;
- ``environments/*.pkl``: each copy of the environment in the middle of its episode.

Both files are written beside, synced, and renamed; the manifest comes first, so a zip without one is not ours.

**Which files to trust.** Resuming reads the weights, ``state.pt`` and the replay without unpickling. Environments are
pickles, and a pickle can run any code: they are read only from a zip whose size and checksum are those of its manifest.
That finds damage, and files that somebody put there; it is no defence against one who can write both files, or
``config.yaml``, which names modules to import. Resume only runs whose folder nobody else can write to. ``PPO.load`` of
a checkpoint or of ``model.zip`` unpickles always: open only files that you trust.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from agents import logs
from agents.command_line import say
from agents.files import checksum, whole, write_text
from agents.options import FORMAT
from agents.state import rebuild, restore, state_of


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole."""

    path: Path
    steps: int
    state: dict[str, Any]

    def rebuild(self, model: BaseAlgorithm) -> None:
        """Give a fresh model the structure that recycling had made.

        Raises:
            ValueError: the checkpoint is another algorithm's.
        """
        if self.state["algorithm"] != type(model).__name__:
            raise ValueError(f"{self.path} is of {self.state['algorithm']}, this run is of {type(model).__name__}")
        rebuild(model, self.state["architecture"])

    def restore(self, model: BaseAlgorithm, callbacks: Sequence[BaseCallback], evaluation: VecEnv | None) -> None:
        """Put everything where it was, but for the random generators: those come when the first rollout begins."""
        with zipfile.ZipFile(self.path) as archive:
            names = archive.namelist()
            weights = {name[:-4]: _tensors(archive, name) for name in names if name.endswith(".pth")}
            extra = weights.pop("pytorch_variables", None) or {}
            model.set_parameters(weights, exact_match=True, device=model.device)
            for name, tensor in extra.items():
                getattr(model, name).data.copy_(tensor)
            restore(self.state, model, callbacks)
            _read_replay(model, archive)
            for kind, env in (("training", model.get_env()), ("evaluation", evaluation)):
                if env is None:
                    continue
                snapshots = [archive.read(f"environments/{kind}_{copy}.pkl") for copy in range(env.num_envs)]
                exact = [env.env_method("return_to", it, indices=copy)[0] for copy, it in enumerate(snapshots)]
                if kind == "training" and not all(exact):
                    model._last_obs = env.reset()  # type: ignore[assignment]
                    model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
                    if model._vec_normalize_env is not None:
                        model._last_original_obs = model._vec_normalize_env.get_original_obs()


def write(folder: Path, model: BaseAlgorithm, callbacks: Sequence[BaseCallback], evaluation: VecEnv | None) -> Path:
    """Write a checkpoint of the run in ``folder``; call it where a rollout begins.

    Raises:
        OSError: the disk is full, or the like; then nothing new is there.
    """
    place = folder / "checkpoints"
    place.mkdir(exist_ok=True)
    steps = model.num_timesteps
    path = place / f"model_{steps}_steps.zip"
    logs.flush(model.logger)
    state = state_of(model, callbacks) | {"logs": logs.lengths(folder), "columns": logs.columns(model.logger)}
    with whole(path) as file:
        model.save(file.name)
        with zipfile.ZipFile(file.name, "a") as archive:
            with archive.open("state.pt", "w", force_zip64=True) as entry:
                torch.save(state, entry)
            _write_replay(model, archive)
            for kind, env in (("training", model.get_env()), ("evaluation", evaluation)):
                for copy, snapshot in enumerate(env.env_method("take_snapshot") if env is not None else ()):
                    archive.writestr(f"environments/{kind}_{copy}.pkl", snapshot)
        made = Path(file.name)
        manifest = {"format": FORMAT, "steps": steps, "bytes": made.stat().st_size, "sha256": checksum(made)}
        write_text(path.with_suffix(".json"), json.dumps(manifest) + "\n")
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The latest checkpoint of a run that is whole, or None where there is none yet.

    A damaged one is passed over with a warning.

    Raises:
        ValueError: all are damaged, or ``checkpoints/`` holds a zip that this run did not write.
    """
    place = folder / "checkpoints"
    for path in sorted(place.glob("*.zip")):
        if not path.with_suffix(".json").exists():
            raise ValueError(f"{path} was not written by this run (it has no manifest): move it out of checkpoints/")
    damaged = []
    for path in _by_age(place):
        why = _damage(path)
        if not why:
            with zipfile.ZipFile(path) as archive:
                state = _tensors(archive, "state.pt")
            return Checkpoint(path, int(state["model"]["num_timesteps"]), state)
        damaged.append(f"{path.name} {why}")
        say(f"{path} is damaged ({why}); the checkpoint before it is used")
    if damaged:
        raise ValueError(f"no checkpoint of {folder} is whole: {'; '.join(damaged)}. --overwrite starts the run anew")
    return None


def policy_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The policy's tensors in a checkpoint or ``model.zip``, read without unpickling.

    Raises:
        ValueError: the file holds none.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}. Pass a model.zip or a checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            found: dict[str, torch.Tensor] = _tensors(archive, "policy.pth")
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no stable-baselines3 model: {error}. Pass a model.zip or a checkpoint") from error
    return found


def prune(place: Path, keep: int, newest: int) -> None:
    """Delete all but the last checkpoints, damaged ones that are ahead of the run, and what a killed process left."""
    ahead = [path for path in _by_age(place) if _steps(path) > newest]
    for path in (*ahead, *_by_age(place)[len(ahead) + keep :]):
        path.unlink()
    for path in place.glob("*.json"):
        if not path.with_suffix(".zip").exists():
            path.unlink()
    for path in place.glob(".model_*"):
        path.unlink()


# Files -----------------------------------------------------------------------------------------------------------


def _by_age(place: Path) -> list[Path]:
    """Checkpoints with a manifest, the latest first."""
    return sorted((p for p in place.glob("*.zip") if _NAME.fullmatch(p.stem)), key=_steps, reverse=True)


_NAME = re.compile(r"model_(\d+)_steps")


def _steps(path: Path) -> int:
    return int(path.stem.split("_")[1])


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's file; "" if nothing is."""
    try:
        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        wanted = manifest["format"], manifest["bytes"], manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        return "has an unreadable manifest"
    if wanted[0] != FORMAT:
        return f"has format {wanted[0]}, this version reads {FORMAT}"
    if path.stat().st_size != wanted[1]:
        return f"has {path.stat().st_size} bytes of {wanted[1]}"
    return "" if checksum(path) == wanted[2] else "has another checksum than its manifest"


def _tensors(archive: zipfile.ZipFile, name: str) -> Any:
    return torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)


def _arrays(buffer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a replay buffer by name, as it holds them; of a dictionary's parts ``<name>/<key>``."""
    for name, value in vars(buffer).items():
        if isinstance(value, np.ndarray):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}/{key}", part) for key, part in value.items() if isinstance(part, np.ndarray))


def _write_replay(model: Any, archive: zipfile.ZipFile) -> None:
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None:
        return
    archive.writestr("replay.json", json.dumps({"pos": int(buffer.pos), "full": bool(buffer.full)}))
    for name, array in _arrays(buffer):
        with archive.open(f"replay/{name}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, array[: buffer.size()], allow_pickle=False)


def _read_replay(model: Any, archive: zipfile.ZipFile) -> None:
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None:
        return
    place = json.loads(archive.read("replay.json"))
    buffer.pos, buffer.full = place["pos"], place["full"]
    for name, array in _arrays(buffer):
        with archive.open(f"replay/{name}.npy") as entry:
            array[: buffer.size()] = np.lib.format.read_array(entry, allow_pickle=False)
