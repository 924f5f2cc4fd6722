"""Linear maps: a parameter's rows make units, its columns consume them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.elementwise import merge, short
from recycle.labels import NONE, UNIFORM, UnitLabels, View


def matrix_product(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """``mm``, ``addmm`` and their kin: a contraction, then perhaps a bias."""
    bias, (left, right) = (args[0], args[1:3]) if len(args) > 2 else (None, args)
    columns = contract(labels, op, left, right, out)
    if bias is None:
        if columns is not None:
            labels.await_bias(out, columns)
        return
    view = labels.view_of(bias)
    if columns is not None and not kwargs and view is not None:  # unscaled: no alpha, no beta
        columns.biases.append(view.name)
    known = labels.of(out)
    if columns is not None and known is not None and view is not None:
        row = 1 if _in_blocks(labels, left, 1) else 2
        if bias.dim() == 1 and out.dim() == 2 and labels.view_of(right) is not None:
            labels.own(view, 0, known[0], "bias", short(op))
            return
        if columns.groups > 1 and _in_blocks(labels, bias, row):
            labels.own(View(view.name, (_WHOLE,)), 0, known.movedim(row, 1)[:, :, 0].flatten(), "bias", short(op))
            return
    if known is None:
        labels.put(out, torch.tensor(NONE))
    merge(labels, op, out, (out, bias), "bias")


def contract(labels: UnitLabels, op: Any, left: Tensor, right: Tensor, out: Tensor) -> Any:
    """``left @ right``: a parameter on one side makes the other side's units its columns."""
    views = labels.view_of(left), labels.view_of(right)
    inner = (left.dim() - 1, max(right.dim() - 2, 0))  # the contracted axis on either side
    if (views[0] is None) == (views[1] is None):
        labels.use_whole((left, right), op)
        if views[0] is None:
            _free_product(labels, op, left, right, inner, out)
        return None
    weight_left = views[0] is not None
    if _in_blocks(labels, left, 1) if weight_left else _in_blocks(labels, right, 2):
        return _product_of_blocks(labels, op, left, right, out)
    weight, view, data = (left, views[0], right) if weight_left else (right, views[1], left)
    assert view is not None
    w_in, x_in = (inner[0], inner[1]) if weight_left else (inner[1], inner[0])
    w_out = None if weight.dim() == 1 else (weight.dim() - 2 if weight_left else weight.dim() - 1)
    batched = weight.dim() == 3 and weight.shape[0] > 1 and weight.stride(0) != 0  # a unit is one in each matrix
    known = labels.of(data)
    vector = torch.zeros(data.shape[x_in], dtype=torch.int64) if known is None else labels.along(known, x_in)
    if known is not None and vector is None and _mixes_along(labels, op, weight, view, known, x_in, out):
        return None
    if view.dims[w_in] is None:
        labels.use_whole([weight], op)
        labels.freeze(known, f"{short(op)} reads {view.name!r} through a view that no rule covers")
        return None
    if vector is None:
        labels.freeze(known, f"{short(op)} with {view.name!r} meets units laid out differently from row to row")
        labels.use_whole([weight], op)
        return None
    columns = labels.consume(view, w_in, vector, data, padded=False, op=short(op))
    if columns is not None:
        columns.batched |= batched
    if w_out is not None:
        units = labels.produce(view, w_out, weight.shape[w_out])
        if units is None:
            labels.use_whole([weight], op)
        else:
            shape = [1] * out.dim()
            shape[out.dim() - (2 if weight_left and data.dim() > 1 else 1)] = -1
            labels.put(out, units.to(out.device).reshape(shape))
    return columns


_WHOLE = (0, 0, 1)
"""An axis that walks along a parameter's first one, entry by entry."""


def _in_blocks(labels: UnitLabels, tensor: Tensor, row: int) -> bool:
    """Whether ``tensor`` stacks a parameter's rows, or a bias's entries, block by block; ``row`` is their axis."""
    view = labels.view_of(tensor)
    if view is None or tensor.dim() != 3 or len(tensor) == 1:
        return False
    each, other = tensor.shape[row], 3 - row
    rows = view.dims[0] == (0, 0, each) and view.dims[row] == (None if each == 1 else _WHOLE)
    columns = view.dims[other] == (None if tensor.shape[other] == 1 else (1, 0, 1))
    return rows and columns and tensor.numel() == labels.shapes[view.name].numel()


def _product_of_blocks(labels: UnitLabels, op: Any, left: Tensor, right: Tensor, out: Tensor) -> Any:
    """A convolution in groups, written as a batch of products: each block of rows reads inputs of its own."""
    weight, data, row = (left, right, 1) if labels.view_of(left) is not None else (right, left, 2)
    view, known = labels.view_of(weight), labels.of(data)
    assert view is not None
    groups, each = weight.shape[0], weight.shape[row]
    units: Tensor | None = torch.zeros(groups * data.shape[row], dtype=torch.int64)
    if known is not None:
        units = labels.along(known.movedim(row, 1).flatten(0, 1), 0)
    if units is None or view.dims[3 - row] is None:
        labels.freeze(known, f"{short(op)} reads {view.name!r} in a way that no rule covers")
        labels.use_whole([weight], op)
        return None
    labels.part(units.reshape(groups, -1))
    columns = labels.consume(view, 3 - row, units, data, padded=False, op=short(op), groups=groups)
    rows = labels.produce(View(view.name, (_WHOLE,)), 0, groups * each)
    if columns is None or rows is None:
        labels.use_whole([weight], op)
        return None
    labels.part(rows.reshape(groups, -1))
    labels.put(out, rows.to(out.device).reshape(groups, each, 1).movedim(1, row))
    return columns


def _mixes_along(
    labels: UnitLabels, op: Any, weight: Tensor, view: View, known: Tensor, axis: int, out: Tensor
) -> bool:
    """Whether a parameter mixes each unit's values along an axis of time or positions: the unit stays what it is."""
    top = known.amax(axis, keepdim=True)
    if not bool(((known == top) | (known == UNIFORM)).all()):
        return False
    own = labels.along(known, 0) if weight.dim() == 3 and axis != 0 and view.dims[0] is not None else None
    if own is not None and len(own) == weight.shape[0]:
        labels.own(view, 0, own, "gain", short(op))  # a matrix for each unit
    else:
        labels.use_whole([weight], op)
        if known.dim() > 2:
            labels.part(top.flatten(1))
    labels.put(out, top if out.dim() == known.dim() else top.squeeze(axis))
    return True


def _free_product(
    labels: UnitLabels, op: Any, left: Tensor, right: Tensor, inner: tuple[int, int], out: Tensor
) -> None:
    """No parameter takes part. Units may stand beside the contracted axis, along it only as one block."""
    known = labels.of(left), labels.of(right)
    if all(k is not None and bool((k > 0).any()) for k in known):
        labels.mix(known)
        if labels.blocks is None or not _mix(labels, known, inner, out):
            for mark, other in zip(known, (right, left), strict=True):
                labels.freeze(mark, f"{short(op)} multiplies it by {labels.weight(other)}")
        return
    for side, (mark, axis) in enumerate(zip(known, inner, strict=True)):
        if mark is None or not bool((mark > 0).any()):
            continue
        top = mark.amax(axis, keepdim=True)
        if not bool(((mark == top) | (mark == UNIFORM)).all()):
            labels.freeze(mark, f"{short(op)} multiplies it by {labels.weight((right, left)[side])}")
        elif out.dim() == (left, right)[side].dim():
            labels.put(out, top)
            if out.dim() > 2:  # heads: each meets a matrix of its own
                labels.part(top.flatten(1))


def _mix(labels: UnitLabels, known: Sequence[Tensor | None], inner: tuple[int, int], out: Tensor) -> bool:
    """Each result comes from a row of the one side and a column of the other: all units in both are one."""
    tops = []
    for mark, axis in zip(known, inner, strict=True):
        if mark is None or mark.dim() != out.dim() or bool((mark == NONE).any()):  # other data has a part in it
            return False
        top = mark.amax(axis, keepdim=True)
        labels.join(mark, top.expand_as(mark))
        tops.append(top.expand_as(out))
    labels.join(*tops)
    labels.put(out, labels.root(torch.maximum(*tops)))
    return True


def convolution(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Convolutions of any dimension, transposed ones and those in groups included."""
    data, weight, bias, _, padding, _, transposed, _, groups = args[:9]
    view, known = labels.view_of(weight), labels.of(data)
    units = torch.zeros(data.shape[1], dtype=torch.int64) if known is None else labels.along(known, 1)
    channel = [1, -1] + [1] * (out.dim() - 2)
    biases = [] if bias is None else [bias.reshape(channel)]
    if view is None or units is None:
        why = f"with {labels.weight(weight)}" if view is None else "meets units mixed within a channel"
        labels.freeze(known, f"{short(op)} {why}")
        labels.use_whole([weight, *biases], op)
        return
    each = out.shape[1] // groups
    if groups == data.shape[1] and (each == 1 or (not transposed and bool((units > 0).all()))):
        kernels = units.repeat_interleave(each)  # depthwise: a unit owns the kernels that read it alone
        labels.put(out, kernels.to(out.device).reshape(channel))
        merge(labels, op, out, [out, weight.flatten(1)[:, 0].reshape(channel)], "weight")
        merge(labels, op, out, [out, *biases], "bias")
        return
    if groups > 1 and transposed:
        labels.freeze(units, f"a transposed {short(op)} with {view.name!r} in {groups} groups has no rule")
        labels.use_whole([weight, *biases], op)
        return
    w_in, w_out = (0, 1) if transposed else (1, 0)
    if view.dims[w_in] is None or view.dims[w_out] is None:
        view = View(view.name, _unit_axes(weight, view))
    padded = transposed or any(padding)
    labels.part(units.reshape(groups, -1))  # each part is read by other rows
    columns = labels.consume(view, w_in, units, data, padded=padded, op=short(op), groups=groups)
    rows = labels.produce(view, w_out, weight.shape[w_out])
    if columns is None or rows is None:
        labels.use_whole([weight, *biases], op)
        return
    bias_view = labels.view_of(bias)
    columns.biases += [] if bias_view is None else [bias_view.name]
    labels.part(rows.reshape(groups, -1))  # and reads other channels
    labels.put(out, rows.to(out.device).reshape(channel))
    merge(labels, op, out, [out, *biases], "bias")


def _unit_axes(weight: Tensor, view: View) -> tuple[tuple[int, int, int] | None, ...]:
    """A convolution's kernel is read whole, so an axis of size 1 is that axis itself."""
    return tuple((d, 0, 1) if place is None and weight.shape[d] == 1 else place for d, place in enumerate(view.dims))


def embedding(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """A table whose columns are units."""
    labels.freeze(labels.of(args[1]), f"{short(op)} uses it as an index")
    view = labels.view_of(args[0])
    units = None if view is None else labels.produce(view, 1, args[0].shape[1])
    if units is None:
        labels.use_whole([args[0]], op)
    else:
        labels.put(out, units.to(out.device))
