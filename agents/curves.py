"""What events leave behind: scalars, histograms and a chart for TensorBoard, and lines of ``edits.jsonl``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

from recycle import Recycler, Report

TOTALS = ("dead", "dormant", "constant", "saturated", "gradient_silent", "duplicates", "certified")
"""Fractions that are logged for each network (weighted by width) and for each group."""

_OF_LAYERS = (
    *TOTALS, "dead_after", "effective_rank", "recycled", "unparted", "resemblance", "re_died", "re_death_age", "width",
)  # fmt: skip
"""What is logged for each group."""

QUIET = ("stdout", "log")
"""Of the logger's outputs, those that are not to be filled with a line for each layer."""

_BINS = 30
"""Of a histogram, evenly spaced: TensorBoard's own are hundreds, and were three quarters of an event's bytes."""

_CHARTS = {"dead": "dead units", "dormant": "dormant units", "duplicates": "duplicates", "width": "width"}


def record(logger: Logger, network: str, report: Report, totals: Mapping[str, int]) -> None:
    """Record what an event saw and did in one network, and the totals of all events so far."""
    for quantity in TOTALS:
        value = report.fraction(quantity)
        if not math.isnan(value):
            shown = () if quantity in ("dead", "dormant") else QUIET
            logger.record(f"recycle/{network}/{quantity}", value, exclude=shown)
    for quantity, count in totals.items():
        logger.record(f"recycle/{network}/{quantity}", count)
    if totals["recycled"]:
        logger.record(f"recycle/{network}/re_death_rate", totals["re_died"] / totals["recycled"], exclude=QUIET)
    for updates, jump in report.jumps.items():
        logger.record(f"recycle/{network}/jump_{updates}", jump, exclude=QUIET)
    logger.record(f"recycle/{network}/units", report.units, exclude=QUIET)
    for name, group in report.groups.items():
        for quantity in _OF_LAYERS:
            value = float(group.width_after if quantity == "width" else getattr(group, quantity))
            if not math.isnan(value):
                logger.record(f"recycle/{network}/{name}/{quantity}", value, exclude=QUIET)


def draw_histograms(logger: Logger, network: str, recycler: Recycler, step: int) -> None:
    """Ages and firing rates of all units, on TensorBoard alone."""
    for board in _boards(logger):
        for name, values in recycler.histograms().items():
            board.writer.add_histogram(f"recycle/{network}/{name}", values, step, bins=_BINS)


def lay_out(logger: Logger, recyclers: Mapping[str, Recycler]) -> None:
    """One TensorBoard chart on which all layers' dead-unit curves stand together."""
    charts = {
        f"{network}: {title}": [
            "Multiline",
            [f"^{re.escape(f'recycle/{network}/{group.name}/{quantity}')}$" for group in recycler.graph],
        ]
        for network, recycler in recyclers.items()
        for quantity, title in _CHARTS.items()
    }
    for board in _boards(logger):
        board.writer.add_custom_scalars({"recycle": charts})


def write_edits(path: Path, step: int, reports: Mapping[str, Report]) -> None:
    """Append a line for each network."""
    with path.open("a", encoding="utf-8") as file:
        for name, report in reports.items():
            file.write(json.dumps({"step": step, "network": name, **report.to_dict()}) + "\n")


def _boards(logger: Logger) -> list[TensorBoardOutputFormat]:
    return [output for output in logger.output_formats if isinstance(output, TensorBoardOutputFormat)]
