"""New units that were tried out in the network itself (Wu et al. 2020, "Firefly Neural Architecture Descent")."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle.births.newborns import Born, Elements, Newborns, Trial
from recycle.graph import NotRecyclable


def firefly(newborns: Newborns, *, candidates: int = 4, steps: int = 5, rate: float = 0.3, size: float = 0.01) -> Born:
    """Of ``candidates`` times as many random units, each improved a little, those that would lower the loss most.

    A candidate speaks with outgoing weights of the length ``size``, relative to the units that stay. It takes ``steps``
    steps against its gradient, on the sphere: incoming weights keep their fresh length, outgoing ones theirs, and each
    step is ``rate`` times as long. Kept are those whose gradient along their own outgoing weights, |dL/d eps|, is
    largest; with weights that small candidates do not see one another. The output changes by O(size).

    The paper's splits of live units are not made here: see the methods ``s2d`` and ``split``.
    """
    if newborns.trial is None:
        raise NotRecyclable("firefly tries new units out: pass loss=, a function that returns the loss of a batch")
    if newborns.redraw is None:
        raise NotRecyclable("firefly says outgoing weights, which only Grow takes")
    count = len(newborns.fresh[0])
    found: list[tuple[Tensor, Elements, Elements]] = []
    for number in range(candidates):
        rows, draws = newborns.redraw() if number else (newborns.fresh, newborns.sent)
        sent = newborns.outgoing_of_length(draws, size)
        found.append(_improved(newborns, newborns.trial, rows, sent, steps, rate))
    scores = torch.cat([score for score, _, _ in found])
    best = scores.argsort(descending=True, stable=True)[:count]
    if not float(scores[best].min()) > 0:
        raise NotRecyclable("no candidate would lower the loss")
    rows, sent = (tuple(torch.cat(parts)[best] for parts in zip(*side, strict=True))
                  for side in ([rows for _, rows, _ in found], [sent for _, _, sent in found]))  # fmt: skip
    return Born(rows, sent, exact=False)


def _improved(
    newborns: Newborns, trial: Trial, rows: Elements, sent: Elements, steps: int, rate: float
) -> tuple[Tensor, Elements, Elements]:
    """Candidates after their steps: how much each lowers the loss for each part of its outgoing length, and both
    sides."""
    learned = [axis.role in ("weight", "bias") for axis in newborns.axes]
    for _ in range(steps):
        into, out = trial.gradients(rows, sent)
        rows = tuple(_merged(rows, _downhill(_chosen(rows, learned), _chosen(into, learned), rate), learned))
        sent = _downhill(sent, out, rate)
    _, out = trial.gradients(rows, sent)
    along = torch.stack([(v * g).double().cpu().sum((1, 2)) for v, g in zip(sent, out, strict=True)]).sum(0)
    return -along / _length(sent).clamp_min(1e-300), rows, sent


def _downhill(at: Elements, gradient: Elements, rate: float) -> Elements:
    """A step of ``rate`` lengths against the gradient, and back to the length that each unit had."""
    length, steep = _length(at), _length(gradient)
    step = torch.where(steep > 0, rate * length / steep.clamp_min(1e-300), 0.0)
    moved = tuple(a - step.to(a)[:, None, None] * g for a, g in zip(at, gradient, strict=True))
    back = torch.where(length > 0, length / _length(moved).clamp_min(1e-300), 1.0)
    return tuple(back.to(m)[:, None, None] * m for m in moved)


def _length(parts: Elements) -> Tensor:
    return torch.stack([part.double().cpu().square().sum((1, 2)) for part in parts]).sum(0).sqrt()


def _chosen(parts: Elements, learned: list[bool]) -> Elements:
    return tuple(part for part, own in zip(parts, learned, strict=True) if own)


def _merged(parts: Elements, new: Elements, learned: list[bool]) -> list[Tensor]:
    fresh = iter(new)
    return [next(fresh) if own else part for part, own in zip(parts, learned, strict=True)]
