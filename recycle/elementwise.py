"""Operations whose every result element comes from one element of each operand: what they do to unit labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.labels import NONE, UNIFORM, UnitLabels, View, arguments, tensors_in


def short(op: Any) -> str:
    """``aten.add`` for ``aten.add.Tensor``."""
    return str(op).rsplit(".", 1)[0]


def pointwise(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Any operation that torch tags as element-wise."""
    operands = list(tensors_in((args, kwargs)))
    target = next(iter(tensors_in(out)))
    if op._schema.name == "aten::clone" and labels.alias(target, operands[0]):
        return
    if len(operands) == 1 and labels.view_of(operands[0]) is None:  # a number is no operand
        known = labels.of(operands[0])
        if known is not None:
            for result in tensors_in(out):
                labels.put(result, known)
        return
    if labels.from_statistics(operands, target):
        return
    labels.settle_bias(operands, op, plain=not kwargs)
    name = op._schema.name.removeprefix("aten::").removesuffix("_")
    merge(labels, op, target, operands, role="bias" if name in ("add", "sub", "rsub") else "gain")


def merge(labels: UnitLabels, op: Any, out: Tensor, operands: Sequence[Tensor], role: str | Sequence[str]) -> None:
    """Labels of a result whose elements each come from one element of every operand (broadcast)."""
    roles = [role] * len(operands) if isinstance(role, str) else role
    marks = [spread(labels, t, out.shape) for t in operands]
    marks = _without_broadcast_units(labels, op, operands, _without_moments(labels, op, operands, marks))
    merged = torch.full(out.shape, NONE, dtype=torch.int64, device=out.device)
    for mark in marks:
        labels.join(merged, mark)
        merged = torch.where(merged > 0, merged, mark.clamp_min(NONE))
    merged = labels.root(merged)
    varying = [d for d in range(out.dim()) if bool((merged != merged.narrow(d, 0, 1)).any())] if out.numel() else []
    for tensor, mark, part in zip(operands, marks, roles, strict=True):
        view = labels.view_of(tensor)
        across = [d for d in varying if _differs_along(tensor, d - out.dim())]
        if view is not None:
            _claim(labels, op, view, tensor, merged, across, part)
        elif across:
            loose = (mark == NONE) & (merged > 0)
            labels.freeze(
                merged[loose], f"{short(op)} joins it with a value that differs from unit to unit, such as an input"
            )
    uniform = torch.stack([m == UNIFORM for m in marks]).all(0)
    labels.put(out, torch.where(uniform & (merged == NONE), UNIFORM, labels.root(merged)))


_SCALING = {"mul", "div", "add", "sub"}


def _without_moments(labels: UnitLabels, op: Any, operands: Sequence[Tensor], marks: list[Tensor]) -> list[Tensor]:
    """A mean of all units, say, that comes back to just these is one value for all of them: RMSNorm and its kin."""
    result = list(marks)
    for i, (tensor, mark) in enumerate(zip(operands, marks, strict=True)):
        found = labels.moments_in(mark)
        if not found:
            continue
        others = [m for j, m in enumerate(marks) if j != i and operands[j].numel() > 1]
        alone = bool((mark == found[0]).all())
        if alone and all(bool(((m == mark) | (m == UNIFORM)).all()) for m in others):
            continue  # still the same moment, with an epsilon or as a root
        units = labels.root(labels.moments[found[0]].units).to(mark.device)
        alone &= op._schema.name.removeprefix("aten::").removesuffix("_") in _SCALING  # a comparison chooses
        alone &= all(bool((torch.isin(m, units) | (m == mark) | (m == UNIFORM)).all()) for m in others)
        across = {d for m in others for d in range(-m.dim(), 0) if bool((m != m.narrow(d, 0, 1)).any())}
        if alone and not any(_differs_along(tensor, d) for d in across):
            labels.blend(units, f"{labels.moments[found[0]].op} mixes the units, as a normalisation does")
            result[i] = torch.full_like(mark, UNIFORM)
        else:
            labels.freeze(mark, short(op))
            result[i] = torch.where(torch.isin(mark, torch.tensor(found, device=mark.device)), NONE, mark)
    return result


def _without_broadcast_units(
    labels: UnitLabels, op: Any, operands: Sequence[Tensor], marks: list[Tensor]
) -> list[Tensor]:
    """A unit that is repeated along an axis of other units (an outer product, one gate for all) is no peer."""
    changes = [{d for d in range(-m.dim(), 0) if bool((m != m.narrow(d, 0, 1)).any())} for m in marks]
    result = list(marks)
    for i, (tensor, mark) in enumerate(zip(operands, marks, strict=True)):
        others = set().union(*(c for j, c in enumerate(changes) if j != i))
        if bool((mark > 0).any()) and any(not _differs_along(tensor, d) for d in others):
            labels.freeze(mark, f"{short(op)} spreads it over other units")
            result[i] = torch.full_like(mark, UNIFORM)
    return result


def spread(labels: UnitLabels, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The labels of ``tensor``, broadcast to ``shape``."""
    known = labels.of(tensor)
    if known is None:
        alone = tensor.numel() == 1 and labels.view_of(tensor) is None
        known = torch.full(tensor.shape, UNIFORM if alone else NONE, dtype=torch.int64, device=tensor.device)
    return known.broadcast_to(shape)


def _differs_along(tensor: Tensor, axis: int) -> bool:
    """Whether the operand takes more than one value along an axis of the result (counted from its end)."""
    return -axis <= tensor.dim() and tensor.shape[axis] > 1 and tensor.stride(axis) != 0


def _claim(
    labels: UnitLabels, op: Any, view: View, tensor: Tensor, merged: Tensor, across: list[int], role: str
) -> None:
    if not bool((merged > 0).any()) or not across:
        labels.use_whole([tensor], op)  # one value for all units, or no units at all
        return
    vector = labels.along(merged, across[0]) if len(across) == 1 else None
    if vector is None:
        labels.freeze(merged, f"{short(op)} spreads {view.name!r} over units in a way that no rule covers")
        labels.use_whole([tensor], op)
        return
    labels.own(view, across[0] - merged.dim() + tensor.dim(), vector, role, op)


def gated_linear_unit(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``glu``: each unit and its gate are one."""
    known = labels.of(args[0])
    if known is not None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
        value, gate = known.chunk(2, dim)
        labels.join(value, gate)
        labels.put(out, labels.root(value))


def fused_cell(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    """An LSTM's or GRU's step on a GPU, behind its two products: a unit's gates, its state and its output are one."""
    given = arguments(op, args, kwargs)
    sums = [(given["input_gates"], given.get("input_bias")), (given["hidden_gates"], given.get("hidden_bias"))]
    operands = []
    for product, bias in sums:
        operands += [product] if bias is None else [product, bias]
        labels.settle_bias([product, bias], torch.ops.aten.add.Tensor, plain=True)
    gates = torch.empty_like(given["input_gates"])
    merge(labels, op, gates, operands, role="bias")
    known, state = labels.of(gates), given["cx"] if "cx" in given else given["hx"]
    if known is None:
        return
    first, *others = known.chunk(known.shape[1] // state.shape[1], 1)
    for other in (*others, spread(labels, state, first.shape)):
        labels.join(first, other)
    for result in (t for t in tensors_in(out) if t.shape == state.shape):  # the last one is for the way back
        labels.put(result, labels.root(first))


def constant(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """One value for every unit. Dropout's mask counts as one: edits are exact once it is off."""
    for tensor in tensors_in((args[1:], kwargs)):
        labels.freeze(labels.of(tensor), f"no rule for {short(op)} of a tensor")
        labels.use_whole([tensor], op)
    labels.put(out, torch.tensor(UNIFORM))


def dropout(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: tuple[Tensor, Tensor]) -> None:
    """Fused dropout; edits are exact once it is off."""
    known = labels.of(args[0])
    if known is not None:
        labels.put(out[0], known)
