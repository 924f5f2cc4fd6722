"""Units whose gradient is as large as it can be at once (Evci et al. 2022, "GradMax", ICLR)."""

from __future__ import annotations

import torch
from torch import Tensor

from recycle.births.newborns import Born, Elements, Newborns, Pairing
from recycle.graph import NotRecyclable
from recycle.junction import Junction

_NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are rounding."""
_STEPS = 100
"""Steps of the subspace iteration, at most; each is two backward passes."""
_SETTLED = 1e-7
"""Relative change of the singular values at which it ends."""


def gradmax(newborns: Newborns, *, lift: float = 0.1, scale: float = 1.0) -> Born:
    """Incoming weights of zero, and the outgoing ones that make the gradient of the incoming ones largest.

    With incoming weights w and outgoing ones v the loss falls first by a bilinear form in both. The outgoing weights
    are its largest singular vectors: in closed form where one Linear or convolution makes the units and such read
    them (:class:`recycle.junction.Junction`), by subspace iteration through the loss elsewhere. Each unit's are
    ``scale`` times as long as those of the units that stay are on average.

    torch's derivative of a ReLU at zero is zero, so a unit with nothing incoming would never move. The bias is
    therefore ``lift``, and what the unit gives then is taken off its consumers' biases: the output stays as it was.
    Where those cannot make up for it (no bias, padding, a factor that depends on the data) two units share a direction,
    with opposite outgoing weights: exact whatever reads them.
    Refused behind a normalisation, and where no direction is left that has a gradient.
    """
    newborns.refuse_normalised("gradmax")
    count = len(newborns.fresh[0])
    rows, rest, why = newborns.resting(lift), None, newborns.why_not_foldable
    if not why:
        try:
            rest = newborns.at_rest(lift)[1]
        except NotRecyclable as error:
            why = str(error)
    twice = rest is None
    if twice and count % 2:
        raise NotRecyclable(f"gradmax makes two units at a time here ({why}): Grow an even number, got {count}")
    newborns.refuse_deaf(rows)
    wanted = count // 2 if twice else count
    if isinstance(newborns.junction, Junction):
        values, vectors = strongest(newborns.junction)
        chosen = shaped(vectors[:wanted], newborns.sent)
    elif newborns.trial is not None:
        with newborns.trial.pairing(rows) as pairing:
            values, chosen = _iterated(pairing, newborns, wanted)
    else:
        raise NotRecyclable(f"gradmax has no closed form here ({newborns.junction}): pass loss=")
    found = directions(values)
    if found < wanted:
        raise NotRecyclable(f"only {found} directions of outgoing weights have a gradient, {wanted} were asked for")
    sent = newborns.outgoing_of_length(chosen, scale)
    return Born(rows, tuple(torch.cat([part, -part]) if twice else part for part in sent), rest)


def strongest(junction: Junction) -> tuple[Tensor, Tensor]:
    """Singular values of the bilinear form, the largest first, and a unit's outgoing elements for each.

    Returns:
        ``(n,)``: the norm of the gradient at a new unit's incoming weights and bias if its outgoing ones have norm 1
        and its activation the slope 1; and unit vectors ``(n, outgoing elements)``.
    """
    vectors, values, _ = torch.linalg.svd(junction.paired([branch.gradient for branch in junction.branches]),
                                          full_matrices=False)  # fmt: skip
    return values, vectors.T


def directions(values: Tensor) -> int:
    """How many singular values, the largest first, are more than rounding."""
    return int((values > _NEGLIGIBLE * values.max()).sum()) if bool((values > 0).any()) else 0


def shaped(vectors: Tensor, like: Elements) -> Elements:
    """``(units, outgoing elements)`` as one tensor for each consumer."""
    sizes = [part[0].numel() for part in like]
    if sum(sizes) != vectors.shape[1]:
        raise NotRecyclable("what the pass showed is of consumers of another width; look again after the next update")
    return tuple(
        block.reshape(len(vectors), *part.shape[1:]).to(part)
        for block, part in zip(torch.split(vectors, sizes, 1), like, strict=True)
    )


def _iterated(pairing: Pairing, newborns: Newborns, count: int) -> tuple[Tensor, Elements]:
    """The largest singular values and vectors, ``count`` of them or all, by orthogonal iteration.

    All newborns are alike, so each has the same bilinear form: each carries one vector, and these are kept orthogonal.
    """
    units = len(newborns.fresh[0])
    learned = [axis.role in ("weight", "bias") for axis in newborns.axes]
    start, fan_in = _flat(newborns.sent), sum(part[0].numel() for part in newborns.fresh)
    count = min(count, start.shape[1], fan_in)
    vectors, values = _orthogonal(start[:count]), torch.zeros(count, dtype=torch.double)
    for _ in range(_STEPS):
        full = torch.cat([vectors, vectors.new_zeros(units - count, vectors.shape[1])])
        into = pairing.incoming(shaped(full, newborns.sent))
        into = tuple(part if own else torch.zeros_like(part) for part, own in zip(into, learned, strict=True))
        before, (turn, values, _) = values, torch.linalg.svd(_flat(into)[:count], full_matrices=False)
        vectors = turn.T @ vectors  # the singular vectors within their span
        if float((values - before).abs().max()) <= _SETTLED * float(values.max()):
            break
        vectors = _orthogonal(_flat(pairing.outgoing(into))[:count])
    return values, shaped(vectors, newborns.sent)


def _flat(parts: Elements) -> Tensor:
    """``(units, elements over all axes)``, float64, on the CPU."""
    return torch.cat([part.detach().double().cpu().flatten(1) for part in parts], 1)


def _orthogonal(rows: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(rows.T)[0].T
    return basis
