"""What the processes of a data-parallel training saw, each on its own part of the batch, as one would have seen it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.firing import Firing
from recycle.samples import few
from recycle.stats import Gradients, Window, kept_inputs

_CPU = torch.device("cpu")


def condensed(state: dict[str, Any]) -> dict[str, Any]:
    """A :meth:`recycle.track.Tracker.state_dict` of the same meaning with one set of moments for each window."""
    return state | {
        "windows": {name: [_condensed(window) for window in windows] for name, windows in state["windows"].items()},
        "pre": {name: [_total(seen) for seen in several] for name, several in state["pre"].items()},
        "weights": {name: _total(seen) for name, seen in state["weights"].items()},
    }


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
    shares = {name: _shares([state["windows"][name] for state in states]) for name in own["windows"]}
    return own | {
        "passes": max(state["passes"] for state in states),
        "cleared_at": max(state["cleared_at"] for state in states),
        "born": {name: torch.stack([state["born"][name] for state in states]).amax(0) for name in own["born"]},
        "windows": {
            name: [_window(seen) for seen in zip(*(state["windows"][name] for state in states), strict=True)]
            for name in own["windows"]
        },
        "pre": {
            name: [_local(seen, shares[name]) for seen in zip(*(state["pre"][name] for state in states), strict=True)]
            for name in own["pre"]
        },
        "weights": {name: _reduced([state["weights"][name] for state in states]) for name in own["weights"]},
        "latest": _samples([state["latest"] for state in states]),
        "inputs": _inputs([state["inputs"] for state in states]),
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


def _shares(windows: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """Each rank's part of the values; equal parts where no hook counts them."""
    counts = [sum(several[0]["counts"]) if several else 1 for several in windows]
    return [count / sum(counts) if any(counts) else 1 / len(counts) for count in counts]


def _window(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seen = [state for state in states if state["counts"]]
    return {
        "waiting": None,
        "counts": [count for state in seen for count in state["counts"]],
        "moments": [torch.cat(parts) for parts in zip(*(state["moments"] for state in seen), strict=True)],
        "latest": _behind_one_another([(state["latest"],) for state in seen])[0] if seen else None,
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


def _samples(states: Sequence[dict[str, Sequence[Tensor]]]) -> dict[str, tuple[Tensor, ...]]:
    """Inputs, pre-activations and gradients of each group's layer."""
    found = {}
    for name in _names(states):
        inputs, outputs, gradient = _behind_one_another([state[name] for state in states if name in state])
        parts = inputs, outputs, gradient / len(states)
        step = -(-len(inputs) // len(few(inputs)))
        found[name] = tuple(part[::step] for part in parts)
    return found


def _inputs(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What layers read, by weight."""
    found = {}
    for name in _names(states):
        (rows,) = _behind_one_another([(state[name],) for state in states if name in state])
        found[name] = kept_inputs(rows, rows.dim() - 2)
    return found


def _behind_one_another(ranks: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Rows of several tensors, those of one rank behind those of another, where they have the shape of the first's."""
    shapes = [[part.shape[1:] for part in parts] for parts in ranks]
    alike = [parts for parts, shape in zip(ranks, shapes, strict=True) if shape == shapes[0]]
    return tuple(torch.cat(parts) for parts in zip(*alike, strict=True))


def _names(states: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for state in states for name in state))
