"""What a run writes line by line, and how it is cut back to where a checkpoint stands."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat, filter_excluded_keys
from stable_baselines3.common.logger import make_output_format as output_format

from agents.command_line import say
from agents.files import write_text

GROWING = ("episodes.csv", "edits.jsonl", "evaluations.csv")
"""Tables to which lines are only added."""
PROGRESS = "progress.csv"
EVENTS = "events.out.tfevents."
"""TensorBoard reads a folder's event files in the order of their names, which begin with a time. Those of earlier
processes get a number before it, that no clock has told since 1970: so they stay first, whatever the clock does."""


class ProgressTable(KVWriter):
    """``progress.csv``: one line for each dump of the logger.

    A new quantity widens the table. Unlike stable-baselines3's writer this one then replaces the file in one step,
    so that no crash can tear it, orders columns the same way in every process, and goes on in an existing table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.columns = next(csv.reader(file), [])
        self._file = path.open("a", newline="", encoding="utf-8")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Add a line."""
        row = filter_excluded_keys(key_values, key_excluded, "csv")
        new = sorted(row.keys() - set(self.columns))
        if new:
            self.columns += new
            self._file.close()
            write_table(self.path, self.columns, _rows(self.path))
            self._file = self.path.open("a", newline="", encoding="utf-8")
        csv.DictWriter(self._file, self.columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunLogger(Logger):
    """stable-baselines3's logger, that counts iterations from the beginning of the run, not of this process's part."""

    before = 0
    """Iterations of earlier processes."""
    iterations = 0
    """Of all, as logged last."""

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        """Log a value at the next dump."""
        if key == "time/iterations":
            value = self.iterations = self.before + value
        super().record(key, value, exclude)


def logger(folder: Path, *, tables: bool) -> RunLogger:
    """The logger of a run: ``progress.csv`` and TensorBoard, and tables on stdout if asked for."""
    formats = [ProgressTable(folder / PROGRESS), output_format("tensorboard", str(folder))]
    return RunLogger(str(folder), [*formats, *([output_format("stdout", str(folder))] if tables else [])])


def columns(outputs: Logger) -> list[str]:
    """Those that ``progress.csv`` has by now."""
    return next((list(each.columns) for each in outputs.output_formats if isinstance(each, ProgressTable)), [])


def flush(outputs: Logger) -> None:
    """Have the operating system know what was logged so far."""
    for each in outputs.output_formats:
        if isinstance(each, TensorBoardOutputFormat):
            each.writer.flush()


def lengths(folder: Path) -> dict[str, int]:
    """How long each log is, once on the disk: bytes, and lines of ``progress.csv``, whose old lines may grow wider."""
    found = {}
    for path in (*(folder / name for name in GROWING), *sorted(folder.glob(EVENTS + "*"))):
        if path.exists():
            _sync(path)
            found[_name(path)] = path.stat().st_size
    if (folder / PROGRESS).exists():
        _sync(folder / PROGRESS)
        with (folder / PROGRESS).open(newline="", encoding="utf-8") as file:
            found[PROGRESS] = sum(1 for _ in csv.DictReader(file))  # one by one: a long run has many
    return found


def cut(folder: Path, wanted: Mapping[str, int], columns: Sequence[str]) -> None:
    """Cut every log back to a length that :func:`lengths` gave; a log that is not among them is deleted.

    Args:
        folder: of the run.
        wanted: the lengths.
        columns: that ``progress.csv`` had then.
    """
    order = {name: number for number, name in enumerate(wanted, 1)}
    for path in (*(folder / name for name in GROWING), *folder.glob(EVENTS + "*")):
        length = wanted.get(_name(path))
        if length is None:
            path.unlink(missing_ok=True)
            continue
        there = path.stat().st_size if path.exists() else 0
        if there < length:
            say(f"{path} is shorter than when the checkpoint was written: {length - there} bytes are lost")
        else:
            os.truncate(path, length)
        if path.name.startswith(EVENTS) and there:
            path.rename(folder / f"{EVENTS}{order[_name(path)]:010d}.{_name(path)}")
    path = folder / PROGRESS
    if PROGRESS not in wanted:
        path.unlink(missing_ok=True)
        return
    rows = _rows(path)[: wanted[PROGRESS]] if path.exists() else []
    if len(rows) < wanted[PROGRESS]:
        say(f"{path} is shorter than when the checkpoint was written: {wanted[PROGRESS] - len(rows)} lines are lost")
    write_table(path, columns, rows)


def write_table(path: Path, columns: Sequence[str], rows: list[dict[str, str]]) -> None:
    """Write a table whole or not at all; what is in none of the columns is left out."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _name(path: Path) -> str:
    """A log's name without the number that it may have got."""
    return re.sub(r"^0{6}\d{4}\.", "", path.name.removeprefix(EVENTS))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
