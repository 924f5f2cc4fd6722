"""What the processes of a data-parallel training saw, each on its own part of the batch, as one would have seen it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.firing import Firing
from recycle.rows import stride
from recycle.stats import Gradients, Window

_CPU = torch.device("cpu")


def condensed(state: dict[str, Any]) -> dict[str, Any]:
    """A :meth:`recycle.track.Tracker.state_dict` of the same meaning with one set of moments for each window."""
    seen = {
        name: {
            "windows": [_condensed(window) for window in group["windows"]],
            "gradients": [_total(gradients) for gradients in group["gradients"]],
            "weights": _total(group["weights"]),
        }
        for name, group in state["seen"].items()
    }
    return state | {"seen": seen}


def merged(states: Sequence[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """One state of all ranks' trackers, for each of them to go on from.

    Counts, moments, extrema and inter-firing times are those of all values that any rank saw. Gradients before an
    optimizer averages them are of the mean of the ranks' losses, which is what DistributedDataParallel descends: a
    rank's own counts by its part of the values, divided by the number of ranks. Rows that are kept of the latest pass
    follow one another in the order of the ranks, and are thinned to as many as one rank keeps at most; a rank whose
    rows have another shape than the first's (longer sequences) is left out.

    Args:
        states: :func:`condensed` ones, in the order of the ranks.
        own: this rank's; how often its optimizers have stepped stays its own.
    """
    return own | {
        "passes": max(state["passes"] for state in states),
        "cleared_at": max(state["cleared_at"] for state in states),
        "born": {name: torch.stack([state["born"][name] for state in states]).amax(0) for name in own["born"]},
        "seen": {name: _seen([state["seen"][name] for state in states]) for name in own["seen"]},
        "rows": {
            need: {name: _latest([state["rows"][need][name] for state in states]) for name in records}
            for need, records in own["rows"].items()
        },
    }


def _seen(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    windows = list(zip(*(state["windows"] for state in states), strict=True))
    gradients = zip(*(state["gradients"] for state in states), strict=True)
    shares = _shares(windows[0]) if windows else [1 / len(states)] * len(states)
    return {
        "windows": [_window(of_one) for of_one in windows],
        "gradients": [_local(of_one, shares) for of_one in gradients],
        "weights": _reduced([state["weights"] for state in states]),
    }


def _condensed(state: dict[str, Any]) -> dict[str, Any]:
    window = Window()
    window.load(state, _CPU)
    window.condense()
    return window.state() | {"firing": state["firing"]}


def _total(state: dict[str, Any]) -> dict[str, Any]:
    seen = Gradients()
    seen.load(state, _CPU)
    return {"passes": None, "earlier": seen.merged() if seen.passes else seen.earlier}


def _shares(windows: Sequence[dict[str, Any]]) -> list[float]:
    """Each rank's part of the values; equal parts where there are none."""
    counts = [sum(window["counts"]) for window in windows]
    return [count / sum(counts) if any(counts) else 1 / len(counts) for count in counts]


def _window(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seen = [state for state in states if state["counts"]]
    return {
        "waiting": None,
        "counts": [count for state in seen for count in state["counts"]],
        "moments": [torch.cat(parts) for parts in zip(*(state["moments"] for state in seen), strict=True)],
        "latest": _behind_one_another([state["latest"] for state in seen]),
        "firing": _firing([state["firing"] for state in states]),
    }


def _firing(states: Sequence[list[Tensor] | None]) -> list[Tensor] | None:
    """Passes that the ranks kept apart count now, for the same past on every rank: a unit fired if it did on one."""
    known = [state for state in states if state is not None]
    if not known:
        return None
    firing = Firing()
    firing.load(known[0][:3], _CPU)
    apart = [state[3] for state in known if len(state) > 3]
    fired = torch.zeros(max(map(len, apart), default=0), len(known[0][0]), dtype=torch.bool)
    for rows in apart:
        fired[: len(rows)] |= rows
    for units in fired:
        firing.count(units)
    return firing.state()


def _local(states: Sequence[dict[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """Gradients of each rank's own loss, as those of the mean of all."""
    totals = [(share, state["earlier"]) for share, state in zip(shares, states, strict=True) if share]
    seen = [(share, total) for share, total in totals if total is not None and total[0] > 0]
    if not seen:
        return {"passes": None, "earlier": None}
    mean = torch.stack([share * total[1:] / total[0] for share, total in seen]).sum(0)
    mean = mean / sum(share for share, _ in seen) / len(states)
    return {"passes": None, "earlier": torch.cat([torch.ones_like(mean[:1]), mean])}


def _reduced(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gradients that were averaged over the ranks when they were read."""
    totals = [state["earlier"] for state in states if state["earlier"] is not None]
    return {"passes": None, "earlier": torch.stack(totals).sum(0) if totals else None}


def _latest(ranks: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The latest pass that each rank kept, as one: what its layers read, said and were told."""
    passes = [kept[-1] for kept in ranks if kept]
    if not passes:
        return []
    shapes = [[_shape(part) for parts in each["readings"].values() for part in parts] for each in passes]
    alike = [each for each, shape in zip(passes, shapes, strict=True) if shape == shapes[0]]
    step = stride(torch.cat([next(iter(each["readings"].values()))[0] for each in alike]))
    readings = {}
    for name in alike[0]["readings"]:
        read, said, told = (
            _behind_one_another(parts) for parts in zip(*(e["readings"][name] for e in alike), strict=True)
        )
        told = None if told is None else told / len(ranks)
        readings[name] = [None if part is None else part[::step] for part in (read, said, told)]
    return [{"size": sum(each["size"] for each in alike), "stride": step, "examples": None, "readings": readings}]


def _shape(values: Tensor | None) -> torch.Size | None:
    return None if values is None else values.shape[1:]


def _behind_one_another(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None
