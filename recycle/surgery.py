"""Make edits: :func:`apply` changes weights, optimizer state and target networks together, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle import optimizers as optimizer_state
from recycle.edits import Edit, Fold, Grow, Merge, Prune, Reset, Split, born, resizes
from recycle.fresh import Init
from recycle.graph import Axis, NotRecyclable, UnitGroup, tensor_at
from recycle.junction import Junction
from recycle.kinds import check_arguments
from recycle.nursery import Evidence, add_constant, overwrite, raise_units
from recycle.resize import FEWEST, resized, with_more, without

MOST_NEWBORNS = 2**20
"""More would be a slip of the hand, and fill the memory before anything could be said about it."""


@torch.no_grad()
def apply(
    edit: Edit,
    group: UnitGroup,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[tuple[nn.Module, float]] = (),
    generator: torch.Generator | None = None,
    init: Init | None = None,
    inputs: dict[str, Tensor] | None = None,
    junction: Junction | str = "no pass was sampled",
    loss: Callable[[], Tensor] | None = None,
) -> None:
    """Make one edit: weights, optimizer state and target networks together, or nothing at all.

    Args:
        edit: a :class:`Split`, :class:`Reset`, :class:`Fold`, :class:`Prune`, :class:`Grow` or :class:`Merge`.
        group: an editable group of :func:`recycle.trace`.
        optimizers: every optimizer that holds the parameters. Only the state of the units named changes; the
            ``step`` count, one for a whole tensor, never does.
        targets: ``(target network, tau)``. A hard target (``tau`` = 1) is left alone until its next copy; a
            Polyak average gets the same edit of its *own* weights, with the same random numbers. An edit that
            changes how many units there are resizes every target.
        generator: source of randomness; None: torch's global one.
        init: how this model initialises, for fresh units; None: each layer's ``reset_parameters``.
        inputs: what the layers read lately, see :attr:`recycle.stats.Stats.inputs`, for births that look at data.
        junction: what a pass showed on both sides of the units, see :attr:`recycle.stats.Stats.junction`, for births
            that look at gradients.
        loss: the loss of a batch, a scalar, for births that try themselves out. It should be the same batch whenever
            it is called within one edit.

    An edit that resizes puts new parameters in the place of the old ones (``.grad`` is None), in the module, its
    targets and the optimizers; the graph and its groups stay valid.

    Raises:
        NotRecyclable: the edit cannot be made as asked; nothing has changed.
    """
    check_arguments(apply, "apply", generator=generator, init=init, inputs=inputs, junction=junction, loss=loss)
    check(edit, group, optimizers=optimizers, targets=targets)
    soft = [module for module, tau in targets if tau < 1]
    every = [module for module, _ in targets]
    if isinstance(edit, (Prune, Merge)):
        if edit.slots:
            with all_or_none(group, optimizers, targets):
                if isinstance(edit, Merge):
                    _merge(edit, group, soft)
                with resized(group, without(group, edit.slots), optimizers, every):
                    pass
        return
    fixed = edit
    layout = None
    if isinstance(edit, Grow):
        layout = with_more(group, edit.count)
    elif isinstance(edit, Split) and edit.into is None:
        layout = with_more(group, len(edit.parents))
        fixed = replace(edit, into=range(group.width, layout.width))
    if not fixed.slots and not (isinstance(edit, Grow) and edit.count):
        return
    evidence = Evidence(inputs or {}, junction, loss)
    how: dict[str, Any] = {"soft": soft, "init": init, "generator": generator, "evidence": evidence}
    first = group.width
    with (
        nullcontext() if layout is None else resized(group, layout, optimizers, every),
        all_or_none(group, optimizers, targets),
    ):
        if isinstance(fixed, Split):
            _split(fixed, group, optimizers, soft, generator)
        elif isinstance(fixed, Reset):
            _reset(fixed, group, optimizers, how)
        elif isinstance(fixed, Grow):
            newborns = torch.arange(first, group.width)
            raise_units(group, newborns, fixed.birth, parents=fixed.parents, **how)
        elif isinstance(fixed, Fold):
            _fold(fixed, group, optimizers, soft)


@contextmanager
def all_or_none(
    group: UnitGroup, optimizers: Sequence[Optimizer] = (), targets: Sequence[tuple[nn.Module, float]] = ()
) -> Iterator[None]:
    """Put back everything that edits of ``group`` can change if the block raises, a birth of one's own perhaps."""
    names = {axis.name for axis in (*group.incoming, *group.outgoing)}
    names |= {axis.bias for axis in group.outgoing if axis.bias is not None}
    touched = [tensor_at(module, n) for module in (group.module, *(m for m, tau in targets if tau < 1)) for n in names]
    touched += [state for n in names for state, _, _ in optimizer_state.states(optimizers, group.tensor(n))]
    saved = [tensor.detach().clone() for tensor in touched]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(touched, saved, strict=True):
                tensor.copy_(value)
        raise


# -- refusing ----------------------------------------------------------------------------------------------


def check(
    edit: Edit,
    group: UnitGroup,
    *,
    optimizers: Sequence[Optimizer] = (),
    targets: Sequence[tuple[nn.Module, float]] = (),
) -> None:
    """Raise what :func:`apply` would raise, and change nothing."""
    if not isinstance(group, UnitGroup) or not isinstance(edit, (Split, Reset, Fold, Prune, Grow, Merge)):
        raise TypeError(
            "an edit is a Split, Reset, Fold, Prune, Grow or Merge of a traced graph's group: "
            f"got {type(edit).__name__} of {type(group).__name__}. Pass graph['name']"
        )
    check_holders(optimizers, targets)
    if torch._C._current_graph_task_id() != -1:
        raise NotRecyclable("an edit inside a backward pass would corrupt its gradients; edit after optimizer.step()")
    if isinstance(edit, Split):
        _refuse_split(edit, group)
    elif isinstance(edit, Fold):
        _refuse_fold(edit, group)
    elif isinstance(edit, Grow):
        if edit.count < 0:
            raise NotRecyclable(f"Grow needs count >= 0, got {edit.count}")
        if edit.parents is not None:
            _refuse_parents(edit.parents, range(group.width, group.width + edit.count), group)
    elif isinstance(edit, Merge):
        _refuse_parents([edit.parent], [edit.child], group)
    elif isinstance(edit, Reset):
        _refuse_reset(edit, group)
    _refuse_units(edit.slots, group, "unit")
    if resizes(edit):
        _refuse_size(edit, group)
    _refuse_tensors(group, targets)
    optimizer_state.check(optimizers, (group.tensor(a.name) for a in (*group.incoming, *group.outgoing)))


def check_holders(optimizers: Sequence[Optimizer], targets: Sequence[tuple[nn.Module, float]]) -> None:
    """Raise unless these are what :func:`apply` takes.

    Raises:
        TypeError: something else was given.
        ValueError: a ``tau`` is out of range.
    """
    check_arguments(apply, "recycle", optimizers=optimizers, targets=targets)
    for _, tau in targets:
        if not 0 <= tau <= 1:
            raise ValueError(f"a target's tau is the part of the network that it takes at an update, in [0, 1]: {tau}")


def _refuse_size(edit: Edit, group: UnitGroup) -> None:
    if group.why_fixed:
        raise NotRecyclable(f"group {group.name!r} cannot change its width: {group.why_fixed}")
    if born(edit) > MOST_NEWBORNS:
        raise NotRecyclable(f"{type(edit).__name__} adds at most {MOST_NEWBORNS:,} units at once, got {born(edit):,}")
    if group.width - len(edit.slots) < FEWEST:
        raise NotRecyclable(
            f"{type(edit).__name__} would leave {group.width - len(edit.slots)} of the {group.width} units of "
            f"{group.name!r}; a group has at least {FEWEST}. Name fewer units"
        )


def _refuse_tensors(group: UnitGroup, targets: Sequence[tuple[nn.Module, float]]) -> None:
    for axis in (*group.incoming, *group.outgoing):
        tensor = group.tensor(axis.name)
        if axis.role != "buffer" and not tensor.requires_grad:
            raise NotRecyclable(f"group {group.name!r} is frozen: {axis.name!r} has requires_grad=False")
        for module, _ in targets:
            if tensor_at(module, axis.name).shape != tensor.shape:
                raise NotRecyclable(f"{axis.name!r} has another shape in the target network")


def _refuse_split(edit: Split, group: UnitGroup) -> None:
    if edit.share is not None and not 0 <= edit.share < 1:
        raise NotRecyclable(f"Split needs 0 <= share < 1, got share={edit.share}")
    if edit.balanced and edit.share == 0:
        raise NotRecyclable("a balanced Split needs share > 0: at 0 the newborn is all zeros and can never learn")
    if not 0 <= edit.noise < float("inf"):
        raise NotRecyclable(f"Split needs a finite noise >= 0, got noise={edit.noise}")
    if edit.along is not None:
        _refuse_along(edit, edit.along, group)
    slots = edit.slots if edit.into is not None else range(group.width, group.width + len(edit.parents))
    _refuse_parents(edit.parents, slots, group)
    if (edit.balanced or edit.rescale) and not group.homogeneous:
        asked = "balanced" if edit.balanced else "rescale"
        raise NotRecyclable(
            f"{asked}=True needs units whose output scales with their weights (ReLU, leaky ReLU); those of "
            f"{group.name!r} do not. Pass {asked}=False"
        )


def _refuse_along(edit: Split, along: Sequence[Sequence[float]], group: UnitGroup) -> None:
    roles = [axis.role for axis in group.incoming]
    if roles.count("weight") != 1 or roles.count("bias") > 1 or set(roles) - {"weight", "bias"}:
        raise NotRecyclable(f"Split(along=...) needs units with one weight and at most a bias; {group.name!r} has more")
    size = _numbers(group, "weight") + _numbers(group, "bias")
    if len(along) != len(edit.parents) or any(len(row) != size for row in along):
        raise NotRecyclable(
            f"Split(along=...) needs {len(edit.parents)} directions of {size} numbers for {group.name!r}, got "
            f"{[len(row) for row in along]}"
        )
    if not all(0 < sum(x * x for x in row) < math.inf for row in along):
        raise NotRecyclable("Split(along=...) needs finite directions that are not zero")


def _refuse_reset(edit: Reset, group: UnitGroup) -> None:
    if not 0 <= edit.warm <= 1:
        raise NotRecyclable(f"Reset needs 0 <= warm <= 1 (a part of the usual second moment), got warm={edit.warm}")
    if edit.parents is not None:
        _refuse_parents(edit.parents, edit.units, group)


def _refuse_fold(edit: Fold, group: UnitGroup) -> None:
    if len(edit.means) != len(edit.units):
        raise NotRecyclable(f"Fold needs a mean for each unit: got {len(edit.means)} for {len(edit.units)} units")
    if not all(map(math.isfinite, edit.means)):
        raise NotRecyclable(f"Fold needs finite means, got {edit.means}")
    if group.why_not_foldable:
        raise NotRecyclable(f"units of {group.name!r} cannot be folded: {group.why_not_foldable}")


def _refuse_parents(parents: Sequence[int], slots: Sequence[int], group: UnitGroup) -> None:
    if len(parents) != len(slots):
        raise NotRecyclable(f"each slot needs a parent: got {len(parents)} parents and {len(slots)} slots")
    _refuse_units(dict.fromkeys(parents), group, "parent")
    both = sorted(set(parents) & set(slots))
    if both:
        raise NotRecyclable(f"a parent cannot be a slot of the same edit: units {both} of {group.name!r} are both")


def _refuse_units(units: Iterable[int], group: UnitGroup, what: str) -> None:
    units = list(units)
    if units and (min(units) < 0 or max(units) >= group.width):
        outside = sorted(u for u in units if not 0 <= u < group.width)
        raise NotRecyclable(f"{what}s {outside} are out of range: {group.name!r} has units 0 to {group.width - 1}")
    if len(set(units)) < len(units):
        twice = sorted({u for u in units if units.count(u) > 1})
        raise NotRecyclable(f"{what}s {twice} of {group.name!r} are named more than once")


# -- editing -----------------------------------------------------------------------------------------------


def _split(
    edit: Split,
    group: UnitGroup,
    optimizers: Sequence[Optimizer],
    soft: Sequence[nn.Module],
    generator: torch.Generator | None,
) -> None:
    """Copy the incoming elements, then divide the outgoing ones: recurrent weights are both."""
    slots = torch.tensor(edit.slots)
    parents, which, count = torch.unique(torch.tensor(edit.parents), return_inverse=True, return_counts=True)
    order = torch.argsort(which, stable=True)
    rank = torch.empty_like(which)
    rank[order] = torch.arange(len(which)) - (count.cumsum(0) - count)[which[order]]
    if edit.share is None:
        parent = 1 / (count + 1).double()
        child = parent[which]
    else:
        child = edit.share * (1 - edit.share) ** rank.double()  # what each newborn takes of the parent's output
        parent = (1 - edit.share) ** count.double()  # what the parent keeps
    draws = {axis.name: _noise(edit, group, axis, len(slots), generator) for axis in group.incoming}
    for module in (group.module, *soft):
        length = _length(group, module, parents) if edit.along is not None else None
        scale = _balance(group, module, parents) if edit.rescale else torch.ones(len(parents), dtype=torch.double)
        keep_in, keep_out = scale.clone(), parent / scale
        born_in, born_out = scale[which].clone(), child / scale[which]
        if edit.balanced:
            keep_in, keep_out = keep_in * parent.sqrt(), parent.sqrt() / scale
            born_in, born_out = born_in * child.sqrt(), child.sqrt() / scale[which]
        for axis in group.incoming:
            tensor = tensor_at(module, axis.name)
            scaled = axis.role in ("weight", "bias")
            rows = axis.read(tensor, parents)
            born, kept = _part(rows, which, draws[axis.name], child, parent, length)
            axis.write(tensor, slots, _times(born, born_in) if scaled else born)
            if scaled and (edit.noise or edit.balanced or edit.rescale):
                axis.write(tensor, parents, _times(kept, keep_in))
        for axis in group.outgoing:
            tensor = tensor_at(module, axis.name)
            columns = axis.read(tensor, parents)
            axis.write(tensor, slots, _times(columns[which], born_out))
            axis.write(tensor, parents, _times(columns, keep_out))
        if module is group.module:
            _split_state(edit, group, optimizers, (parents, which, slots), (parent, child, scale))


def _split_state(
    edit: Split,
    group: UnitGroup,
    optimizers: Sequence[Optimizer],
    units: tuple[Tensor, Tensor, Tensor],
    shares: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients scale inversely to the weights that a rescale multiplies, and with the share on the incoming side."""
    parents, which, slots = units
    parent, child, scale = shares
    for incoming, axes in ((True, group.incoming), (False, group.outgoing)):
        for axis in axes:
            rescaled = (1 / scale if incoming else scale) if axis.role != "gain" else torch.ones_like(scale)
            for state, power, fresh in optimizer_state.states(optimizers, group.tensor(axis.name)):
                held = axis.read(state, parents)
                born, kept = held[which], _times(held, rescaled**power)
                if edit.moments == "fresh":
                    born = torch.full_like(born, fresh)
                else:
                    exponent = power * (1.0 if axis.role == "gain" else 0.5 if edit.balanced else float(incoming))
                    born = _times(born, rescaled[which] ** power * child**exponent)
                    kept = _times(kept, parent**exponent)
                axis.write(state, slots, born)
                if edit.rescale or edit.moments == "transform":
                    axis.write(state, parents, kept)


def _reset(edit: Reset, group: UnitGroup, optimizers: Sequence[Optimizer], how: dict[str, Any]) -> None:
    units = torch.tensor(edit.units)
    if not edit.weights:
        _freshen(group, (*group.incoming, *group.outgoing), units, optimizers)
        return
    overwrite(group, units, edit.birth, parents=edit.parents, **how)
    _freshen(group, group.incoming, units, optimizers)
    stay = torch.tensor(sorted(set(range(group.width)) - set(edit.units)), dtype=torch.long)
    if edit.warm and len(stay):
        _warm(group, units, stay, edit.warm, optimizers)
    _freshen(group, group.outgoing, units, optimizers)  # recurrent weights are both


def _warm(group: UnitGroup, units: Tensor, stay: Tensor, part: float, optimizers: Sequence[Optimizer]) -> None:
    """Second moments of incoming weights begin at a part of the median of the units that stay, input by input."""
    for axis in group.incoming:
        for state, power, _ in optimizer_state.states(optimizers, group.tensor(axis.name)):
            if power == 2:
                usual = axis.read(state, stay).median(0, keepdim=True).values
                axis.write(state, units, (part * usual).expand(len(units), -1, -1))


def _fold(edit: Fold, group: UnitGroup, optimizers: Sequence[Optimizer], soft: Sequence[nn.Module]) -> None:
    units, means = torch.tensor(edit.units), torch.tensor(edit.means, dtype=torch.double)
    for module in (group.module, *soft):
        add_constant(group, module, units, means)
        for axis in group.outgoing:
            axis.fill(tensor_at(module, axis.name), units, 0.0)
    _freshen(group, group.outgoing, units, optimizers)


def _merge(edit: Merge, group: UnitGroup, soft: Sequence[nn.Module]) -> None:
    """Give the parent the child's outgoing weights, times how many times the child is the parent."""
    pair = torch.tensor([edit.parent, edit.child])
    for module in (group.module, *soft):
        factor = _multiple(group, module, pair) if group.homogeneous else 1.0
        for axis in group.outgoing:
            tensor = tensor_at(module, axis.name)
            columns = axis.read(tensor, pair)
            axis.write(tensor, pair[:1], columns[:1] + factor * columns[1:])


def _multiple(group: UnitGroup, module: nn.Module, pair: Tensor) -> float:
    own = [axis for axis in group.incoming if axis.role in ("weight", "bias")]
    parent, child = torch.cat([a.read(tensor_at(module, a.name), pair).double().flatten(1).cpu() for a in own], 1)
    along = float(parent @ child / (parent @ parent).clamp_min(torch.finfo(torch.double).tiny))
    return along if along > 0 else 1.0


def _freshen(group: UnitGroup, axes: Iterable[Axis], units: Tensor, optimizers: Sequence[Optimizer]) -> None:
    for axis in axes:
        for state, _, fresh in optimizer_state.states(optimizers, group.tensor(axis.name)):
            axis.fill(state, units, fresh)


def _times(values: Tensor, factors: Tensor) -> Tensor:
    return values * factors.to(values)[:, None, None]


def _noise(edit: Split, group: UnitGroup, axis: Axis, count: int, generator: torch.Generator | None) -> Tensor | None:
    """A random direction of unit length for each newborn's row, or None."""
    if not edit.noise or axis.role not in ("weight", "bias"):
        return None
    if edit.along is not None:
        given = torch.tensor(edit.along, dtype=torch.double)
        given = given / given.norm(dim=1, keepdim=True)
        weights = _numbers(group, "weight")
        part: Tensor = given[:, :weights] if axis.role == "weight" else given[:, weights:]
        part = edit.noise * part[:, None]
        return part
    if axis.role != "weight":
        return None
    like = axis.read(group.tensor(axis.name), torch.zeros(count, dtype=torch.long))
    draw = torch.randn(like.shape, generator=generator, dtype=torch.double)
    return edit.noise * draw / draw.square().sum((1, 2), keepdim=True).sqrt()


def _part(
    rows: Tensor, which: Tensor, noise: Tensor | None, child: Tensor, parent: Tensor, length: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of newborns and parents, moved apart so that their weighted sum stays; norms as before.

    Noise is relative to the rows' own norms, or to ``length``, ``(parents,)``; then norms are not kept.
    """
    if noise is None:
        return rows[which], rows
    norm = rows.square().sum((1, 2), keepdim=True).sqrt() if length is None else length.to(rows)[:, None, None]
    step = noise.to(rows) * norm[which] * 2 * (parent / (parent + child.new_zeros(len(parent)).index_add(
        0, which, child))).to(rows)[which, None, None]  # fmt: skip
    back = torch.zeros_like(rows).index_add(0, which, _times(step, child)) / parent.to(rows)[:, None, None]
    if length is not None:
        return rows[which] + step, rows - back
    return _with_norm(rows[which] + step, norm[which]), _with_norm(rows - back, norm)


def _length(group: UnitGroup, module: nn.Module, units: Tensor) -> Tensor:
    """Norm of the incoming weights, ``(units,)``."""
    rows = [a.read(tensor_at(module, a.name), units).double() for a in group.incoming if a.role == "weight"]
    length: Tensor = torch.linalg.vector_norm(torch.cat([part.flatten(1) for part in rows], 1), dim=1)
    return length.cpu()


def _numbers(group: UnitGroup, role: str) -> int:
    """Incoming numbers of one unit in that role."""
    own = [axis.read(group.tensor(axis.name), torch.zeros(1).long()) for axis in group.incoming if axis.role == role]
    return sum(part.numel() for part in own)


def _with_norm(rows: Tensor, norm: Tensor) -> Tensor:
    now = rows.square().sum((1, 2), keepdim=True).sqrt()
    return rows * torch.where(now > 0, norm / now, 1.0)


def _balance(group: UnitGroup, module: nn.Module, units: Tensor) -> Tensor:
    """The factor for each unit that makes its incoming and outgoing norms equal, ``(units,)``."""

    def norm(axes: Iterable[Axis]) -> Tensor:
        parts = [a.read(tensor_at(module, a.name), units).double().square().sum((1, 2)).cpu() for a in axes]
        return torch.stack(parts).sum(0).sqrt()

    into, out = norm(a for a in group.incoming if a.role in ("weight", "bias")), norm(group.outgoing)
    return torch.where((into > 0) & (out > 0), (out / into).sqrt(), 1.0)
