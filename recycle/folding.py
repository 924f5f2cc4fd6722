"""Grow by folding: where the output is wrong, and the new unit whose hinge folds it there (Kang 2024).

Everything is done for many networks at once: ``nets`` is the first axis of every tensor. One traced network is a batch
of one, see :mod:`recycle.mistakes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from recycle.clusters import weighted_kmeans

Examples: TypeAlias = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Runs the network on some examples, the same ones whenever it is called at one event, and returns its outputs
``(examples, outputs)``, the loss of each ``(examples,)``, and the targets: integers ``(examples,)`` for classes, or
numbers shaped like the outputs."""
Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Of units whose hinge goes through a point, see :attr:`Mistakes.score`."""
Direction: TypeAlias = Literal["gradient", "toward", "tangent", "origin"]
"""How the hinge of a new unit lies, see :func:`fold`."""

_ANGLES = 128
"""Directions that are scanned in the plane."""
_STARTS = 32
"""Random directions from which the ascent begins in more dimensions."""
_ASCENT = 30
"""Steps of that ascent."""
_GRID = 32
"""Points of the way to the fold point at which the sign of the boundary functional is looked at."""
_NARROWINGS = 40
"""Steps that narrow a change of sign down, at most; within one linear piece the first one is exact."""
_LEAST = 1e-3
"""Cosine with the side on which an instance must be active, that the ascent keeps at least."""
_FLAT = 1e-12
"""Squared slope of the functional below which a segment is dead."""


@dataclass(frozen=True, eq=False)
class Mistakes:
    """Where networks are wrong, and what it takes to fold them there.

    A *row* is what the layer to be widened reads of one example: its features, or the patch under a kernel.
    """

    inputs: Tensor
    """The rows, ``(nets, rows, features)``."""
    losses: Tensor
    """Loss of the example of each row, not negative, ``(nets, rows)``."""
    wrong: Tensor
    """Whether that example is mispredicted, ``(nets, rows)``, bool."""
    margin: Callable[[Tensor, Tensor], Tensor]
    """Boundary functional of a row ``(nets,)``, were its features the point ``(nets, features)``: ``(nets,)``. Zero on
    the decision boundary, or where a regression is right. Differentiable by the point."""
    score: Score
    """Squared gradient of the mean loss in the outgoing weights, which are zero, of units that point in the directions
    ``(nets, units, features)`` and whose hinge goes through the point ``(nets, features)``: ``(nets, units)``.
    Differentiable by the directions."""
    beside: Callable[[Tensor], Score]
    """The :attr:`score` of one unit more, beside new ones with these incoming weights, the bias last: ``(nets, units,
    features + 1)``, zeros where there is none. Of the gradient counts what their outgoing weights cannot take: the rest
    of the least squares over the rows, as in SENN."""
    length: Tensor
    """Mean norm of the incoming weights of the layer's units, ``(nets,)``."""
    bias: bool = True
    """Whether the units have a bias, without which every hinge goes through the origin."""


@dataclass(frozen=True, eq=False)
class Creases:
    """New units that fold networks at typical mispredicted instances: ``(nets, units, ...)``."""

    mispredicted: Tensor
    """Whether there is a mispredicted row among those that were looked at, ``(nets,)``, bool."""
    found: Tensor
    """Whether there is such a unit, bool; the other fields say nothing where there is none."""
    typical: Tensor
    """Row of the typical mispredicted instance."""
    instance: Tensor
    """That instance, ``(nets, units, features)``."""
    point: Tensor
    """The fold point, ``(nets, units, features)``."""
    reached: Tensor
    """Whether the fold point is a zero of the true functional; or else only of the segment continued, bool."""
    weight: Tensor
    """Incoming weights, ``(nets, units, features)``."""
    bias: Tensor


def boundary(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The boundary functional of each example, ``coefficients . outputs + offset``, and whether it is mispredicted.

    Of classes (integer targets) it is the predicted class's output less that of the true class, or of the runner-up
    where the prediction is right. Of one output with integer targets (0 or 1) it is that logit. Of a regression or a
    critic it is the output less the target; of several outputs the one that is furthest off.

    Args:
        outputs: ``(..., outputs)``.
        targets: ``(...)`` of integers for classes; else shaped like the outputs.

    Returns:
        Coefficients ``(..., outputs)``, offsets ``(...)`` and bools ``(...)``.
    """
    kinds = outputs.shape[-1]
    if targets.is_floating_point():
        error = outputs - targets
        worst = error.abs().argmax(-1)
        picked = torch.nn.functional.one_hot(worst, kinds).to(outputs)
        return picked, -(picked * targets).sum(-1), (picked * error).sum(-1) != 0
    if kinds == 1:
        return torch.ones_like(outputs), torch.zeros_like(outputs[..., 0]), (outputs[..., 0] > 0) != (targets > 0)
    best, second = outputs.topk(2, -1).indices.unbind(-1)
    wrong = best != targets
    other = torch.where(wrong, targets, second)
    one_hot = torch.nn.functional.one_hot
    return (one_hot(best, kinds) - one_hot(other, kinds)).to(outputs), torch.zeros_like(outputs[..., 0]), wrong


def segment(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """The activated linear segment at each point, whatever the depth: ``function(x) = weight x + bias`` near it.

    Args:
        function: points ``(nets, features)`` to outputs ``(nets, outputs)``, each of its own point alone.
        points: ``(nets, features)``.

    Returns:
        ``(nets, outputs, features)`` and ``(nets, outputs)``.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        outputs = function(points)
        rows = [_gradient(outputs[:, i].sum(), points) for i in range(outputs.shape[1])]
    weight = torch.stack(rows, 1)
    return weight, (outputs - (weight * points[:, None]).sum(2)).detach()


def _gradient(value: Tensor, by: Tensor) -> Tensor:
    """Zeros where the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(by)
    (found,) = torch.autograd.grad(value, by, retain_graph=True, allow_unused=True)
    return torch.zeros_like(by) if found is None else found


def typical(
    inputs: Tensor,
    losses: Tensor,
    wrong: Tensor,
    *,
    clusters: int = 5,
    sample: int = 256,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The typical mispredicted instance of each cluster, those of the largest mean loss first.

    Some of the rows are clustered by k-means weighted with their losses, on features of unit variance. A cluster's
    instance is the mispredicted row nearest to its centroid.

    Args:
        inputs: ``(nets, rows, features)``.
        losses: ``(nets, rows)``.
        wrong: bool, ``(nets, rows)``.
        clusters: at most.
        sample: rows that are looked at, at most; drawn at random.
        generator: source of randomness; None: torch's global one.

    Returns:
        Rows, and whether the cluster has one that is mispredicted, ``(nets, clusters)`` both.
    """
    rows = torch.randperm(inputs.shape[1], generator=generator)[:sample].sort().values
    x, weights, wrong = inputs[:, rows].cpu().double(), losses[:, rows].cpu().double(), wrong[:, rows].cpu()
    spread = x.std(1, keepdim=True, correction=0)
    x = x / torch.where(spread > 0, spread, 1.0)
    clusters = min(clusters, len(rows))
    members, centroids = weighted_kmeans(x, weights, clusters, generator=generator)
    chosen, means = [], []
    for cluster in range(clusters):
        inside = members == cluster
        means.append((weights * inside).sum(1) / inside.sum(1).clamp_min(1))
        gap = (x - centroids[:, cluster, None]).square().sum(2)
        chosen.append(torch.where(inside & wrong, gap, torch.inf).min(1))
    there = torch.stack([gap.isfinite() for gap, _ in chosen], 1)
    order = torch.where(there, torch.stack(means, 1), -torch.inf).argsort(dim=1, descending=True, stable=True)
    found = rows[torch.stack([row for _, row in chosen], 1)].gather(1, order)
    return found.to(inputs.device), there.gather(1, order).to(inputs.device)


def fold_point(margin: Callable[[Tensor], Tensor], instance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the boundary is nearest to each instance, along its activated linear segment.

    On the way there the functional may leave the segment. The fold point is then its first zero on that way, looked
    for on a grid; if there is none it is the zero of the segment continued.

    Args:
        margin: the boundary functional, points ``(nets, features)`` to ``(nets,)``.
        instance: ``(nets, features)``.

    Returns:
        Points ``(nets, features)``; whether the true functional is zero there; and whether the segment is alive at
        all: where the functional is constant there is no fold point. Bools ``(nets,)``.
    """
    slope, offset = segment(lambda points: margin(points)[:, None], instance)
    slope, offset = slope[:, 0], offset[:, 0]
    size = slope.square().sum(1)
    start = (slope * instance).sum(1) + offset
    alive = (size >= _FLAT) & start.isfinite() & (start != 0)
    way = -(start / torch.where(alive, size, 1.0))[:, None] * slope

    def at(part: Tensor) -> Tensor:
        return margin(instance + part[:, None] * way)

    with torch.no_grad():
        part, reached = _first_zero(at, start)
    part = torch.where(reached, part, 1.0)
    return instance + part[:, None] * way, reached & alive, alive


def _first_zero(value_at: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Where in (0, 1] functions that begin at ``start``, not zero, are zero first, and whether they are anywhere."""
    near = torch.finfo(start.dtype).eps ** 0.5 * start.abs()  # what rounding leaves of a zero
    low, high = torch.zeros_like(start), torch.ones_like(start)
    low_value, high_value = start, start
    zero, settled, found = low, low < 0, low < 0
    for step in range(1, _GRID + 1):
        part = torch.full_like(start, step / _GRID)
        value = value_at(part)
        here = ~found & (value.abs() <= near)
        zero, settled = torch.where(here, part, zero), settled | here
        crossed = ~found & ((value * start <= 0) | here)
        high, high_value = torch.where(crossed, part, high), torch.where(crossed, value, high_value)
        found = found | crossed
        low, low_value = torch.where(found, low, part), torch.where(found, low_value, value)
        if bool(found.all()):
            break
    for step in range(_NARROWINGS):
        if bool((settled | ~found).all()):
            break
        fall = low_value - high_value
        secant = torch.where(fall == 0, 0.5, low_value / torch.where(fall == 0, 1.0, fall))
        part = low + (high - low) * (0.5 if step % 2 else secant)
        value = value_at(part)
        here = found & ~settled & (value.abs() <= near)
        zero, settled = torch.where(here, part, zero), settled | here
        beyond = value * start <= 0
        high, high_value = torch.where(beyond, part, high), torch.where(beyond, value, high_value)
        low, low_value = torch.where(beyond, low, part), torch.where(beyond, low_value, value)
    return torch.where(settled, zero, high), found


def steepest(
    score: Callable[[Tensor], Tensor],
    toward: Tensor,
    *,
    within: Tensor | None = None,
    active: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Unit vectors ``u`` of the largest score with ``u . toward > 0``: ``(nets, features)``.

    In the plane 128 angles are scanned. In more dimensions (or ``within`` a hyperplane) projected gradient ascent goes
    30 steps from 32 random directions and from ``toward``.

    Args:
        score: directions ``(nets, candidates, features)`` to scores ``(nets, candidates)``; differentiable.
        toward: the side on which the unit is to be active, ``(nets, features)``.
        within: normal of a hyperplane in which the directions must lie, ``(nets, features)``.
        active: False drops the constraint ``u . toward > 0``.
        generator: source of randomness; None: torch's global one.
    """
    nets, size = toward.shape
    side = _within(_unit(toward)[:, None], within) if active else torch.zeros_like(toward)[:, None]
    side = _unit(torch.where(side.norm(dim=2, keepdim=True) > _LEAST, side, 0.0))
    if size == 2 and within is None:
        angle = torch.arange(_ANGLES, dtype=toward.dtype, device=toward.device) * (2 * torch.pi / _ANGLES)
        tried = torch.stack([angle.cos(), angle.sin()], 1).expand(nets, -1, -1)
        return _best(tried, score(tried).detach(), side)
    draws = torch.randn(nets, _STARTS, size, generator=generator, dtype=torch.double).to(toward)
    if active:
        draws = torch.cat([side, draws], 1)
    away = (draws * side).sum(2, keepdim=True) < 0
    tried = _feasible(torch.where(away, -draws, draws), within, side)
    kept, worth = tried, torch.full(tried.shape[:2], -torch.inf, dtype=tried.dtype, device=tried.device)
    for step in range(_ASCENT + 1):
        with torch.enable_grad():
            tried = tried.detach().requires_grad_()
            values = score(tried)
            slope = _gradient(values.sum(), tried)
        values, tried = values.detach(), tried.detach()
        better = values > worth
        kept, worth = torch.where(better[:, :, None], tried, kept), torch.where(better, values, worth)
        along = slope - (slope * tried).sum(2, keepdim=True) * tried
        tried = _feasible(tried + 0.5 * 0.85**step * _unit(along), within, side)
    return _best(kept, worth, side)


def unexplained(slopes: Tensor, activations: Tensor) -> Tensor:
    """What is left of slopes ``(nets, rows, outputs)`` of their least squares by ``(nets, rows, units)``."""
    gram = activations.mT @ activations
    share: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-6) @ (activations.mT @ slopes)
    return slopes - activations @ share


def _unit(vectors: Tensor) -> Tensor:
    size = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(size > 0, size, 1.0)


def _feasible(tried: Tensor, within: Tensor | None, side: Tensor) -> Tensor:
    """The nearest unit vectors in the hyperplane that look to the side."""
    tried = _unit(_within(tried, within))
    facing = (tried * side).sum(2, keepdim=True)
    return _unit(tried + (_LEAST - facing).clamp_min(0) * side)


def _within(vectors: Tensor, normal: Tensor | None) -> Tensor:
    """Projected into the hyperplane with that normal."""
    if normal is None:
        return vectors
    normal = _unit(normal)[:, None]
    return vectors - (vectors * normal).sum(2, keepdim=True) * normal


def _best(tried: Tensor, values: Tensor, side: Tensor) -> Tensor:
    """The allowed direction of the largest value; of a plane that has none, the one nearest to the side."""
    facing = (tried * side).sum(2)
    allowed = torch.where((facing > 0) | (side == 0).all(2), values, -torch.inf)
    nothing = ~(allowed > -torch.inf).any(1, keepdim=True)
    chosen = torch.where(nothing, facing, allowed).argmax(1)
    return tried[torch.arange(len(tried), device=tried.device), chosen]


def fold(
    mistakes: Mistakes,
    count: int = 1,
    *,
    direction: Direction = "gradient",
    clusters: int = 5,
    sample: int = 256,
    generator: torch.Generator | None = None,
) -> Creases:
    """New units, each with its hinge through the fold point of another typical mispredicted instance.

    Their weights are as long as the layer's usual ones, their outgoing weights are meant to be zero: then the output
    stays as it was, and only the gradient of the outgoing weights says what the unit is worth.

    Args:
        mistakes: where the networks are wrong.
        count: units to add, each for a cluster of its own, those of the largest mean loss first. The direction of one
            is that of the largest gradient which those before it leave, so that no two do the same.
        direction: ``"gradient"``: the one of the largest gradient of which the instance is on the active side.
            The document's own: ``"toward"`` the instance, whose hinge is parallel to the boundary; ``"origin"``, with
            a bias of zero (the hinge goes through the origin too). ``"tangent"``: across the boundary, the instance
            on the hinge itself. The last two take the largest gradient that their constraint leaves.
        clusters: of mispredicted instances.
        sample: rows that are clustered, at most.
        generator: source of randomness; None: torch's global one.

    Clusters without a mispredicted instance, and instances on a dead segment, on which the functional is constant, are
    passed over.
    """
    rows, there = typical(mistakes.inputs, mistakes.losses, mistakes.wrong, clusters=max(clusters, count),
                          sample=sample, generator=generator)  # fmt: skip
    nets, size = len(rows), mistakes.inputs.shape[2]
    all_nets = torch.arange(nets, device=rows.device)
    made: dict[str, Tensor] = {
        "found": torch.zeros(nets, count, dtype=torch.bool, device=rows.device),
        "typical": torch.full((nets, count), -1, device=rows.device),
        "instance": mistakes.inputs.new_zeros(nets, count, size),
        "point": mistakes.inputs.new_zeros(nets, count, size),
        "reached": torch.zeros(nets, count, dtype=torch.bool, device=rows.device),
        "weight": mistakes.inputs.new_zeros(nets, count, size),
        "bias": mistakes.inputs.new_zeros(nets, count),
    }
    filled = torch.zeros(nets, dtype=torch.long, device=rows.device)
    score = mistakes.score
    for row, usable in zip(rows.unbind(1), there.unbind(1), strict=True):
        if bool(((filled == count) | ~usable).all()):
            continue
        instance = mistakes.inputs[all_nets, row].detach()
        point, reached, alive = fold_point(lambda x, row=row: mistakes.margin(row, x), instance)  # type: ignore[misc]
        now = usable & alive & (filled < count)
        if not bool(now.any()):
            continue
        weight = mistakes.length[:, None] * _direction(score, direction, instance, point, generator)
        bias = torch.zeros_like(weight[:, 0]) if direction == "origin" else -(weight * point).sum(1)
        new = {"found": now, "typical": row, "instance": instance, "point": point, "reached": reached,
               "weight": weight, "bias": bias}  # fmt: skip
        for name, values in new.items():
            made[name][all_nets[now], filled[now]] = values[now]
        filled = filled + now
        if bool((filled < count).any()):
            score = mistakes.beside(torch.cat([made["weight"], made["bias"][:, :, None]], 2))
    return Creases(mispredicted=there.any(1), **made)


def _direction(
    score_at: Score, direction: Direction, instance: Tensor, point: Tensor, generator: torch.Generator | None
) -> Tensor:
    toward, score = instance - point, partial(score_at, point)
    if direction == "toward":
        return _unit(toward)
    if direction == "tangent":
        return steepest(score, toward, within=toward, active=False, generator=generator)
    if direction == "origin":
        return steepest(score, instance, within=point, generator=generator)
    return steepest(score, toward, generator=generator)
