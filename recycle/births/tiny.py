"""The units that lower the loss most where the present ones cannot (Verbockhaven et al. 2024, "TINY", TMLR)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from recycle.births.gradmax import directions, shaped
from recycle.births.newborns import Born, Elements, Newborns
from recycle.graph import NotRecyclable
from recycle.junction import Junction

_RANK = 1e-6
"""Directions in which the inputs vary less than this part of the most are left alone (of the variance)."""
_AMPLITUDES = tuple(2.0**-k for k in range(12))


def tiny(newborns: Newborns, *, amplitude: float = 0.1) -> Born:
    """Incoming and outgoing weights of the units whose joint first step lowers the loss most.

    The gradient at the consumers' outputs, less what their present weights could do about it, is paired with the
    units' inputs in units of their covariance; its singular vectors are the weights of both sides, each times the root
    of its singular value. This changes the function: the strongest unit's pre-activation has a root mean square of
    ``amplitude``, and its outgoing weights are ``amplitude`` times as long as those of the units that stay are on
    average. Where a loss was passed, the amplitude is that of 1, 1/2, 1/4, ... which lowers it most. Of both signs of
    a direction, which only matter to one-sided activations, that whose active half is worth more is taken.

    Closed form only; refused behind a normalisation.
    """
    newborns.refuse_normalised("tiny")
    if not isinstance(newborns.junction, Junction):
        raise NotRecyclable(f"tiny has no closed form here ({newborns.junction})")
    count = len(newborns.fresh[0])
    values, incoming, outgoing = best_features(newborns.junction)
    found = directions(values)
    if found < count:
        raise NotRecyclable(f"only {found} directions would lower the loss, {count} were asked for")
    sign = _better_half(newborns.junction, incoming[:count], outgoing[:count])
    size = ((values[:count] / values[0]).sqrt() * sign)[:, None]
    sent = shaped((newborns.usual_outgoing or 1.0) * size * outgoing[:count], newborns.sent)
    rows = _incoming(newborns, size * incoming[:count])
    if bool(newborns.at_rest(0.0)[1].any()):
        raise NotRecyclable("tiny needs an activation that gives zero for zero (ReLU, tanh)")
    trial = newborns.trial
    if trial is not None:
        nothing = trial.loss(newborns.fresh, tuple(torch.zeros_like(part) for part in sent))
        losses = {a: trial.loss(_times(a, rows, newborns), tuple(a * part for part in sent)) for a in _AMPLITUDES}
        amplitude = min(losses, key=losses.__getitem__)
        if losses[amplitude] >= nothing:
            raise NotRecyclable(f"no amplitude of these units lowers the loss of {nothing:.4g}")
    return Born(_times(amplitude, rows, newborns), tuple(amplitude * part for part in sent), exact=False)


def best_features(junction: Junction) -> tuple[Tensor, Tensor, Tensor]:
    """How much each of the best new units would lower the loss, the best first, and its weights.

    Returns:
        ``(n,)``: the first-order decrease of the loss for a pre-activation of mean square 1 (over rows and taps),
        outgoing weights of norm 1 and a slope of 1; the incoming weights ``(n, fan_in)`` and outgoing ``(n, outgoing
        elements)`` that have them. Weights times a root of the value each, as :func:`tiny` has them, lower it by the
        value's square.
    """
    rows = junction.branches[0].inputs.flatten(0, 1)
    variances, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    varies = variances > _RANK * variances.max()
    whiten = axes[:, varies] / variances[varies].sqrt()  # S^(-1/2), up to a rotation
    wanted = junction.paired([-branch.left_over() for branch in junction.branches])
    outgoing, values, inside = torch.linalg.svd(wanted @ whiten, full_matrices=False)
    return values, inside @ whiten.T, outgoing.T


def gain_of_present(junction: Junction) -> float:
    """How much the best step of the consumers' own weights would lower the loss, to first order, for a root mean
    square change of 1 at all outputs together.

    This is what :func:`best_features` measures, for the weights that there are.
    """
    steps = [branch.gradient - branch.left_over() for branch in junction.branches]
    change = sum(float(step.square().sum(1).mean()) for step in steps) ** 0.5
    fall = sum(float((branch.gradient * step).sum()) for branch, step in zip(junction.branches, steps, strict=True))
    return fall / change if change else 0.0


def _better_half(junction: Junction, incoming: Tensor, outgoing: Tensor) -> Tensor:
    """+1 or -1 for each direction: where a unit that is active on one side only does more."""
    gains = []
    for sign in (1.0, -1.0):
        gain = torch.zeros(len(incoming), dtype=torch.double)
        start = 0
        for branch in junction.branches:
            active = (sign * branch.inputs @ incoming.T).clamp_min(0)
            halved = replace(branch, inputs=active)
            size = branch.inputs.shape[1] * branch.gradient.shape[1]
            gain -= sign * (outgoing[:, start : start + size].T * halved.paired(branch.gradient)).sum(0)
            start += size
        gains.append(gain)
    return torch.where(gains[0] >= gains[1], 1.0, -1.0).double()


def _incoming(newborns: Newborns, weights: Tensor) -> Elements:
    """``(units, fan_in)`` as incoming elements: the layer's weight, then its own bias; other biases are zero."""
    rows = list(newborns.resting(0.0))
    (at,) = (i for i, axis in enumerate(newborns.axes) if axis.role == "weight")
    size = newborns.fresh[at][0].numel()
    rows[at] = weights[:, :size].reshape(newborns.fresh[at].shape).to(newborns.fresh[at])
    if weights.shape[1] > size:
        name = newborns.axes[at].name.removesuffix("weight") + "bias"
        (bias,) = (i for i, axis in enumerate(newborns.axes) if axis.name == name)
        rows[bias] = weights[:, size:].reshape(newborns.fresh[bias].shape).to(newborns.fresh[bias])
    return tuple(rows)


def _times(amplitude: float, rows: Elements, newborns: Newborns) -> Elements:
    """Weights and biases times ``amplitude``."""
    return tuple(
        amplitude * part if axis.role in ("weight", "bias") else part
        for axis, part in zip(newborns.axes, rows, strict=True)
    )
