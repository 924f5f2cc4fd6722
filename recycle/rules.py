"""What each aten operation does to unit labels. An operation that has no rule freezes the units it touches.

A rule is a function ``(labels, op, args, kwargs, out)``; adding one is a function here and a line in
:data:`RULES`. Nothing is ever assumed to be element-wise: torch itself tags the operations that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycle.labels import NONE, UNIFORM, Rule, UnitLabels, View, tensors_in


def _default(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    if torch.Tag.pointwise in op.tags:
        _pointwise(labels, op, args, kwargs, out)
        return
    operands = list(tensors_in((args, kwargs)))
    for tensor in operands:
        labels.freeze(labels.of(tensor), f"no rule for {_short(op)}")
    labels.use_whole(operands, op)


def _short(op: Any) -> str:
    return str(op).rsplit(".", 1)[0]


# -- element-wise ------------------------------------------------------------------------------------------


def _pointwise(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    operands = list(tensors_in((args, kwargs)))
    target = next(iter(tensors_in(out)))
    if op._schema.name == "aten::clone" and labels.alias(target, operands[0]):
        return
    if len(operands) == 1 and labels.view_of(operands[0]) is None:
        known = labels.of(operands[0])
        if known is not None:
            for result in tensors_in(out):
                labels.put(result, known)
        return
    labels.settle_bias(operands, op, plain=not kwargs)
    name = op._schema.name.removeprefix("aten::").removesuffix("_")
    merge(labels, op, target, operands, role="bias" if name in ("add", "sub", "rsub") else "gain")


def merge(labels: UnitLabels, op: Any, out: Tensor, operands: Sequence[Tensor], role: str | Sequence[str]) -> None:
    """Labels of a result whose elements each come from one element of every operand (broadcast)."""
    roles = [role] * len(operands) if isinstance(role, str) else role
    marks = _without_broadcast_units(labels, op, operands, [_spread(labels, t, out.shape) for t in operands])
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
                merged[loose], f"{_short(op)} joins it with a value that differs from unit to unit, such as an input"
            )
    uniform = torch.stack([m == UNIFORM for m in marks]).all(0)
    labels.put(out, torch.where(uniform & (merged == NONE), UNIFORM, labels.root(merged)))


def _without_broadcast_units(
    labels: UnitLabels, op: Any, operands: Sequence[Tensor], marks: list[Tensor]
) -> list[Tensor]:
    """A unit that is repeated along an axis of other units (an outer product, one gate for all) is no peer."""
    changes = [{d for d in range(-m.dim(), 0) if bool((m != m.narrow(d, 0, 1)).any())} for m in marks]
    result = list(marks)
    for i, (tensor, mark) in enumerate(zip(operands, marks, strict=True)):
        others = set().union(*(c for j, c in enumerate(changes) if j != i))
        if bool((mark > 0).any()) and any(not _differs_along(tensor, d) for d in others):
            labels.freeze(mark, f"{_short(op)} spreads it over other units")
            result[i] = torch.full_like(mark, UNIFORM)
    return result


def _spread(labels: UnitLabels, tensor: Tensor, shape: torch.Size) -> Tensor:
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
        labels.freeze(merged, f"{_short(op)} spreads {view.name!r} over units in a way that no rule covers")
        labels.use_whole([tensor], op)
        return
    labels.own(view, across[0] - merged.dim() + tensor.dim(), vector, role, op)


def _gated_linear_unit(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    known = labels.of(args[0])
    if known is not None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
        value, gate = known.chunk(2, dim)
        labels.join(value, gate)
        labels.put(out, labels.root(value))


def _constant(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """One value for every unit. Dropout's mask counts as one: edits are exact once it is off."""
    for tensor in tensors_in((args[1:], kwargs)):
        labels.freeze(labels.of(tensor), f"no rule for {_short(op)} of a tensor")
        labels.use_whole([tensor], op)
    labels.put(out, torch.tensor(UNIFORM))


def _dropout(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: tuple[Tensor, Tensor]) -> None:
    known = labels.of(args[0])
    if known is not None:
        labels.put(out[0], known)


# -- linear maps -------------------------------------------------------------------------------------------


def _matrix_product(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
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
    if known is not None and view is not None and bias.dim() == 1 and labels.view_of(right) is not None:
        labels.own(view, 0, known[0], "bias", _short(op))
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
    weight, view, data = (left, views[0], right) if weight_left else (right, views[1], left)
    assert view is not None
    w_in, x_in = (inner[0], inner[1]) if weight_left else (inner[1], inner[0])
    w_out = None if weight.dim() == 1 else (weight.dim() - 2 if weight_left else weight.dim() - 1)
    batched = weight.dim() == 3 and weight.shape[0] > 1 and weight.stride(0) != 0
    if batched or view.dims[w_in] is None:
        labels.use_whole([weight], op)
        labels.freeze(labels.of(data), f"{_short(op)} reads {view.name!r} through a view that no rule covers")
        return None
    known = labels.of(data)
    vector = torch.zeros(data.shape[x_in], dtype=torch.int64) if known is None else labels.along(known, x_in)
    if vector is None:
        labels.freeze(known, f"{_short(op)} with {view.name!r} meets units laid out differently from row to row")
        labels.use_whole([weight], op)
        return None
    columns = labels.consume(view, w_in, vector, data, padded=False, op=_short(op))
    if w_out is not None:
        units = labels.produce(view, w_out, weight.shape[w_out])
        if units is None:
            labels.use_whole([weight], op)
        else:
            shape = [1] * out.dim()
            shape[out.dim() - (2 if weight_left and data.dim() > 1 else 1)] = -1
            labels.put(out, units.to(out.device).reshape(shape))
    return columns


def _free_product(
    labels: UnitLabels, op: Any, left: Tensor, right: Tensor, inner: tuple[int, int], out: Tensor
) -> None:
    """No parameter takes part. Units may stand beside the contracted axis, never along it."""
    known = labels.of(left), labels.of(right)
    reason = f"{_short(op)} multiplies it by a matrix that is no parameter"
    both = all(k is not None and bool((k > 0).any()) for k in known)
    for side, (mark, axis) in enumerate(zip(known, inner, strict=True)):
        if mark is None or not bool((mark > 0).any()):
            continue
        top = mark.amax(axis, keepdim=True)
        if both or not bool(((mark == top) | (mark == UNIFORM)).all()):
            labels.freeze(mark, reason)
        elif out.dim() == (left, right)[side].dim():
            labels.put(out, top)


def _convolution(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    data, weight, bias, _, padding, _, transposed, _, groups = args[:9]
    view, known = labels.view_of(weight), labels.of(data)
    units = torch.zeros(data.shape[1], dtype=torch.int64) if known is None else labels.along(known, 1)
    channel = [1, -1] + [1] * (out.dim() - 2)
    biases = [] if bias is None else [bias.reshape(channel)]
    if view is None or units is None:
        why = "with a weight computed in the forward pass" if view is None else "meets units mixed within a channel"
        labels.freeze(known, f"{_short(op)} {why}")
        labels.use_whole([weight, *biases], op)
        return
    if groups == data.shape[1] == weight.shape[0] and not transposed:  # depthwise: one kernel a unit
        labels.put(out, units.to(out.device).reshape(channel))
        merge(labels, op, out, [out, weight.flatten(1)[:, 0].reshape(channel)], "weight")
        merge(labels, op, out, [out, *biases], "bias")
        return
    if groups > 1:
        labels.freeze(units, f"{_short(op)} in {groups} groups is a consumer that no rule covers")
        labels.use_whole([weight, *biases], op)
        return
    w_in, w_out = (0, 1) if transposed else (1, 0)
    if view.dims[w_in] is None or view.dims[w_out] is None:
        view = View(view.name, _unit_axes(weight, view))
    padded = transposed or any(padding)
    columns = labels.consume(view, w_in, units, data, padded=padded, op=_short(op))
    rows = labels.produce(view, w_out, weight.shape[w_out])
    if columns is None or rows is None:
        labels.use_whole([weight, *biases], op)
        return
    bias_view = labels.view_of(bias)
    columns.biases += [] if bias_view is None else [bias_view.name]
    labels.put(out, rows.to(out.device).reshape(channel))
    merge(labels, op, out, [out, *biases], "bias")


def _unit_axes(weight: Tensor, view: View) -> tuple[tuple[int, int, int] | None, ...]:
    """A convolution's kernel is read whole, so an axis of size 1 is that axis itself."""
    return tuple((d, 0, 1) if place is None and weight.shape[d] == 1 else place for d, place in enumerate(view.dims))


def _embedding(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    labels.freeze(labels.of(args[1]), f"{_short(op)} uses it as an index")
    view = labels.view_of(args[0])
    units = None if view is None else labels.produce(view, 1, args[0].shape[1])
    if units is None:
        labels.use_whole([args[0]], op)
    else:
        labels.put(out, units.to(out.device))


# -- normalisation -----------------------------------------------------------------------------------------


def _batch_norm(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    data, *state = args[:5]
    channel = [1, -1] + [1] * (data.dim() - 2)
    given = [(t.reshape(channel), r) for t, r in zip(state, ("gain", "bias", "buffer", "buffer"), strict=True)
             if t is not None]  # fmt: skip
    merge(labels, op, out[0], [data, *(t for t, _ in given)], ["gain", *(r for _, r in given)])


def _layer_norm(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    data, shape, weight, bias = args[:4]
    known = labels.of(data)
    if known is not None:
        _blend_across(labels, known, range(data.dim() - len(shape), data.dim()), "LayerNorm mixes the units")
    pairs = [(t, r) for t, r in ((weight, "gain"), (bias, "bias")) if t is not None]
    merge(labels, op, out[0], [data, *(t for t, _ in pairs)], ["gain", *(r for _, r in pairs)])


def _group_norm(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    data, weight, bias, _, channels, _, groups = args[:7]
    known = labels.of(data)
    if known is not None and groups != channels:
        _blend_across(labels, known, range(1, data.dim()), f"GroupNorm mixes the units of its {groups} groups")
    channel = [1, -1] + [1] * (data.dim() - 2)
    pairs = [(t.reshape(channel), r) for t, r in ((weight, "gain"), (bias, "bias")) if t is not None]
    merge(labels, op, out[0], [data, *(t for t, _ in pairs)], ["gain", *(r for _, r in pairs)])


def _softmax(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    known = labels.of(args[0])
    if known is not None:
        _blend_across(labels, known, [args[1] % known.dim()], "softmax mixes the units")
        labels.put(out, known)
    labels.use_whole(args[:1], op)


def _blend_across(labels: UnitLabels, known: Tensor, axes: Any, reason: str) -> None:
    if any(bool((known != known.narrow(d, 0, 1)).any()) for d in axes):
        labels.blend(known, reason)


# -- along other axes --------------------------------------------------------------------------------------


def _reduction(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    data = args[0]
    known = labels.of(data)
    labels.use_whole([data], op)
    if known is None:
        return
    names = [a.name for a in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dims = given.get("dim")
    axes = [dims] if isinstance(dims, int) else list(dims or range(known.dim()))
    top = known.amax(axes, keepdim=True) if known.dim() else known
    if not bool(((known == top) | (known == UNIFORM)).all()):
        labels.freeze(known, f"{_short(op)} reduces over the units")
        return
    for result in tensors_in(out):
        labels.put(result, top.reshape(result.shape))


def _scan(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    known, axis = labels.of(args[0]), args[1]
    labels.use_whole(args[:1], op)
    if known is None:
        return
    if bool((known != known.narrow(axis, 0, 1)).any()):
        labels.freeze(known, f"{_short(op)} runs over the units")
    else:
        labels.put(next(iter(tensors_in(out))), known)


def _by_channel(spatial: int) -> Rule:
    """Pooling and resampling work on each channel alone: the last ``spatial`` axes may change."""

    def rule(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
        known = labels.of(args[0])
        if known is None:
            return
        top = known.flatten(-spatial).amax(-1)
        flat = known.flatten(-spatial)
        if not bool(((flat == top[..., None]) | (flat == UNIFORM)).all()):
            labels.freeze(known, f"{_short(op)} meets units mixed within a channel")
            return
        labels.put(next(iter(tensors_in(out))), top.reshape(*top.shape, *[1] * spatial))

    return rule


# -- data movement -----------------------------------------------------------------------------------------

_INDICES = {"index", "indices", "mask", "offsets"}


def _movement(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The same operation, called on the labels: exact for any layout, no index arithmetic by hand."""
    operands = list(tensors_in((args, kwargs)))
    targets = list(tensors_in(out))
    if op._schema.name == "aten::_to_copy" and labels.alias(targets[0], operands[0]):
        return
    labels.use_whole(operands, op)
    names = [a.name for a in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    moving = _indexed_by_data(labels, given)
    if moving:
        for tensor in operands:
            labels.freeze(labels.of(tensor), f"{_short(op)} moves units by an index that depends on the data")
    for name, value in given.items():
        if name in _INDICES:
            for tensor in tensors_in(value):
                labels.freeze(labels.of(tensor), f"{_short(op)} uses it as an index")
        elif name in ("self", "tensors", "values", "value", "src", "source"):
            given[name] = _relabel(labels, value)
    for name in ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"):
        given.pop(name, None)
    if op._schema.name == "aten::constant_pad_nd":
        given["value"] = UNIFORM
    cast = op._schema.name == "aten::_to_copy"
    results = [given["self"]] if cast else list(tensors_in(_on_integers(op, given)))
    for target, result in zip(targets, results, strict=True):
        labels.put(target, result)


def _indexed_by_data(labels: UnitLabels, given: dict[str, Any]) -> bool:
    """Whether an index that other inputs would change runs along an axis on which the labels vary."""
    indices = [given[name] for name in _INDICES if name in given]
    if all(labels.constant(tensor) for tensor in tensors_in(indices)):
        return False
    known = labels.of(given.get("self"))
    if known is None or not known.dim():
        return True
    axes = [given["dim"]] if "dim" in given else list(range(known.dim()))
    if isinstance(given.get("indices"), (list, tuple)):
        axes = [axis for axis, index in enumerate(given["indices"]) if index is not None]
    return any(bool((known != known.narrow(axis, 0, 1)).any()) for axis in axes)


def _on_integers(op: Any, given: dict[str, Any]) -> Any:
    try:
        return op(**given)
    except (RuntimeError, NotImplementedError):  # some kernels exist for floats only; labels fit in a double
        doubled = {k: v.double() if isinstance(v, Tensor) and k not in _INDICES else v for k, v in given.items()}
        return [t.long() for t in tensors_in(op(**doubled))]


def _relabel(labels: UnitLabels, value: Any) -> Any:
    if isinstance(value, Tensor):
        known = labels.of(value)
        return torch.zeros(value.shape, dtype=torch.int64, device=value.device) if known is None else known.clone()
    if isinstance(value, (list, tuple)):
        return [_relabel(labels, v) for v in value]
    return NONE  # a number


def _index_put(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    adds = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    (_default if adds else _movement)(labels, op, args, kwargs, out)


def _copy(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    labels.use_whole(args[1:2], op)
    labels.put(args[0], _spread(labels, args[1], args[0].shape))


def _ignore(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reads a shape, or makes a tensor whose values do not depend on the operands."""


def _read(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels.freeze(labels.of(args[0]), "its value is read by Python")
    labels.use_whole(args[:1], op)


# fmt: off
RULES: dict[str, Rule] = {
    "default": _default,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), _matrix_product),
    "convolution": _convolution,
    "embedding": _embedding,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
         "cudnn_batch_norm", "_batch_norm_with_update"), _batch_norm),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    "glu": _gated_linear_unit,
    "_prelu_kernel": lambda lab, op, args, kwargs, out: merge(lab, op, out, args, "gain"),
    "native_dropout": _dropout,
    "bernoulli_": _constant,
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "norm",
         "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin", "median", "count_nonzero"),
        lambda lab, op, args, kwargs, out: (
            _default if torch.Tag.pointwise in op.tags else _reduction)(lab, op, args, kwargs, out)),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"), _scan),
    **{f"{name}{n}d{suffix}": _by_channel(n)
       for name in ("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool",
                    "upsample_nearest", "_upsample_nearest_exact", "fractional_max_pool")
       for n in (1, 2, 3) for suffix in ("", "_with_indices")},
    **{f"upsample_{name}": _by_channel(n)
       for name, n in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3))},
    **dict.fromkeys(
        ("_to_copy", "cat", "stack", "constant_pad_nd", "repeat", "flip", "roll", "index", "_unsafe_index",
         "index_select", "gather", "take", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
         "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
         "replication_pad3d", "masked_select", "select_scatter", "slice_scatter", "tril", "triu", "rot90",
         "lift_fresh_copy", "expand_copy", "permute_copy", "view_copy", "slice_copy", "repeat_interleave",
         "unsafe_split_with_sizes", "unsafe_split", "scatter", "scatter_", "index_copy", "index_copy_"), _movement),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
    "copy_": _copy,
    **dict.fromkeys(
        ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
         "zero_", "fill_", "scalar_tensor", "zero", "fill"), _constant),
    **dict.fromkeys(
        ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "rand_like", "randn_like",
         "lift_fresh", "lift", "detach", "detach_", "transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_",
         "swapdims_", "_assert_async", "sym_size", "sym_numel"), _ignore),
    "_local_scalar_dense": _read,
}
"""Operation name (without ``aten::``) to what it does to the labels."""
# fmt: on

MOVES = frozenset({name for name, rule in RULES.items() if rule in (_movement, _copy, _index_put)} | {"clone"})
"""Operations that only move values."""
