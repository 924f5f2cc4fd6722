"""Read run folders into plain data."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from agents.statistics import Floats

Ints = NDArray[np.int64]

EPISODE_COLUMNS = ("timesteps", "task", "return", "length")
STEPS = "time/total_timesteps"
LOGGED = ("dead", "dead_after", "effective_rank", "recycled", "re_died", "width")


class BadRun(ValueError):
    """A folder that holds no run, or a run with a damaged file; the message is one line."""


class Curve(NamedTuple):
    """Values over lifetime steps, exactly as measured: nothing is filled in between."""

    steps: Ints
    values: Floats


@dataclass(frozen=True, eq=False)
class Episodes:
    """The finished training episodes of a run, one entry each, in the order in which they ended."""

    timesteps: Ints  # lifetime agent steps, summed over the copies, when the episode ended
    task: Ints
    returns: Floats
    lengths: Ints  # agent steps of this episode

    def __len__(self) -> int:
        return len(self.timesteps)

    def where(self, chosen: NDArray[np.bool_]) -> "Episodes":
        """Keep only the chosen episodes."""
        return Episodes(self.timesteps[chosen], self.task[chosen], self.returns[chosen], self.lengths[chosen])


@dataclass(frozen=True, eq=False)
class Run:
    """One training run as it lies on disk.

    `dead` maps "<network>/<group>" (or "<network>" where no layer was logged) to its fraction of dead units before
    each event, `dead_after` to that after it, `effective_rank` to that of its activations, `width` to its number of
    units after each event; `recycled` and `re_died` count units over the whole run, None where nobody counted.
    """

    path: Path
    config: Mapping[str, Any]
    episodes: Episodes
    dead: Mapping[str, Curve]
    dead_after: Mapping[str, Curve]
    effective_rank: Mapping[str, Curve]
    recycled: int | None
    re_died: int | None
    finished: bool
    width: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed it was started with."""
        return int(self.config["seed"])

    @property
    def drift(self) -> str:
        """The names of its drifts, joined: "permute+scale", or "no drift"."""
        names = self.config.get("drift") or []
        return "+".join([names] if isinstance(names, str) else map(str, names)) or "no drift"

    @cached_property
    def last_step(self) -> int:
        """The lifetime step up to which something is known of it; for a finished run, at least its length."""
        seen = [curve.steps[-1] for curve in self.dead.values()] + list(self.episodes.timesteps[-1:])
        return int(max([*seen, self.config.get("total_timesteps") or 0 if self.finished else 0]))

    def until(self, step: int) -> "Run":
        """The same run as it stood at that lifetime step; its counts are not known there: None."""
        episodes = self.episodes.where(self.episodes.timesteps <= step)
        dead, dead_after, rank = (_cut(curves, step) for curves in (self.dead, self.dead_after, self.effective_rank))
        run = replace(self, dead=dead, dead_after=dead_after, effective_rank=rank, width=_cut(self.width, step))
        return replace(run, episodes=episodes, recycled=None, re_died=None)

    @property
    def resized(self) -> bool:
        """Whether a layer's number of units changed."""
        return any(len(np.unique(curve.values)) > 1 for curve in self.width.values())


def _cut(curves: Mapping[str, Curve], step: int) -> dict[str, Curve]:
    cut = {name: Curve(c.steps[c.steps <= step], c.values[c.steps <= step]) for name, c in curves.items()}
    return {name: curve for name, curve in cut.items() if len(curve.steps)}


class Experiment(NamedTuple):
    """What the arms of one comparison share; `algo` is empty where the algorithms are the arms."""

    env: str
    drift: str
    algo: str


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """Find every run at or below the given folders: the folders that hold a config.yaml, each once, sorted.

    BadRun if a folder does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise BadRun(f"{path}: no such folder. Pass run folders, or a folder above them such as runs/.")
        below = [config.parent for config in path.rglob("config.yaml")]
        if not below:
            raise BadRun(f"{path}: no runs below. A run is a folder with the config.yaml that agents.train writes.")
        found.update((run.resolve(), run) for run in below)
    return sorted(found.values(), key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(p))])


def read_run(path: Path | str) -> Run:
    """Read one run folder. Files that training has not written yet are empty; BadRun on damaged ones.

    In a run that is still going on, a last line without its end is left out.
    """
    path = Path(path)
    config = _read_config(path / "config.yaml")
    finished = (path / "model.zip").is_file()
    episodes = _read_episodes(path / "episodes.csv", finished)
    columns = _read_progress(path / "progress.csv", finished)
    dead, dead_after, rank = (_per_layer(columns, what) for what in ("dead", "dead_after", "effective_rank"))
    counts = (_count(columns, "recycled"), _count(columns, "re_died"))
    return Run(path, config, episodes, dead, dead_after, rank, *counts, finished, _per_layer(columns, "width"))


def _per_layer(columns: Mapping[str, Curve], what: str) -> dict[str, Curve]:
    """The curve of every layer, or of every network where no layer was logged."""
    found = {key: curve for key, curve in columns.items() if key.endswith(f"/{what}")}
    per_layer = {key: curve for key, curve in found.items() if key.count("/") > 2}
    kept = sorted((per_layer or found).items(), key=lambda item: _natural(item[0]))
    return {key[len("recycle/") : -len(f"/{what}")]: curve for key, curve in kept}


def _natural(key: str) -> list[str]:
    """Layers in the order of their numbers: 2 before 10."""
    return [part.zfill(8) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRun(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BadRun(f"{file}: expected a mapping of options, got {type(config).__name__}.")
    if missing := [key for key in ("algo", "env", "method", "seed") if config.get(key) is None]:
        raise BadRun(f"{file}: lacks {', '.join(missing)}. It should be the file that agents.train writes.")
    for key in ("seed", "n_envs", "total_timesteps"):
        if not isinstance(config.get(key) or 0, int):
            raise BadRun(f"{file}: {key} should be a whole number, got {config[key]!r}.")
    return config


def _read_table(file: Path, finished: bool) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of a CSV file; both empty where there is no file yet."""
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if not finished and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]  # training is writing this line right now
        header, *lines = list(csv.reader(io.StringIO(text), strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadRun(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise BadRun(f"{file}: line {number} has {len(line)} cells under a header of {len(header)}.")
    return header, lines


def _read_episodes(file: Path, finished: bool) -> Episodes:
    header, lines = _read_table(file, finished)
    if header and tuple(header) != EPISODE_COLUMNS:
        raise BadRun(f"{file}: expected the header {','.join(EPISODE_COLUMNS)}, got {','.join(header)}.")
    rows = [[_number(file, n, cell) for cell in line] for n, line in enumerate(lines, start=2)]
    table = np.array(rows, dtype=np.float64).reshape(-1, len(EPISODE_COLUMNS))
    steps, task, returns, lengths = table[np.argsort(table[:, 0], kind="stable")].T
    return Episodes(steps.astype(np.int64), task.astype(np.int64), returns, lengths.astype(np.int64))


def _read_progress(file: Path, finished: bool) -> dict[str, Curve]:
    """Return every recycle/ column as a curve of its own: only the rows in which it holds a value."""
    header, lines = _read_table(file, finished)
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=2):
        cells = {key: cell for key, cell in zip(header, line, strict=True) if cell}
        if STEPS not in cells:
            continue
        step = int(_number(file, number, cells[STEPS]))
        for key in cells:
            if key.startswith("recycle/") and key.rsplit("/", 1)[-1] in LOGGED:
                value = _number(file, number, cells[key], finite=False)
                if np.isfinite(value):  # nan: the layer was not observed
                    points.setdefault(key, {})[step] = value  # a step logged twice: the later line counts
    return {
        key: Curve(np.array(sorted(curve), dtype=np.int64), np.array([curve[s] for s in sorted(curve)]))
        for key, curve in points.items()
    }


def _number(file: Path, line: int, cell: str, finite: bool = True) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = None
    if value is None or (finite and not np.isfinite(value)):
        raise BadRun(f"{file}: line {line}: expected a number, got {cell!r}.")
    return value


def _count(columns: Mapping[str, Curve], what: str) -> int | None:
    """Sum the last value of a cumulative count over the networks."""
    last = [c.values[-1] for key, c in columns.items() if key.endswith(f"/{what}") and key.count("/") == 2]
    return int(sum(last)) if last else None
