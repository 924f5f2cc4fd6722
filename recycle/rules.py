"""What each aten operation does to unit labels. An operation that has no rule freezes the units it touches.

A rule is a function ``(labels, op, args, kwargs, out)``; adding one is a function here and a line in
:data:`RULES`. Nothing is ever assumed to be element-wise: torch itself tags the operations that are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recycle.elementwise import constant, dropout, fused_cell, gated_linear_unit, merge, pointwise, short, spread
from recycle.labels import NONE, UNIFORM, Rule, UnitLabels, arguments, described, tensors_in
from recycle.products import convolution, embedding, matrix_product


def _default(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    if torch.Tag.pointwise in op.tags:
        pointwise(labels, op, args, kwargs, out)
        return
    operands = list(tensors_in((args, kwargs)))
    for tensor in operands:
        labels.freeze(labels.of(tensor), f"no rule for {short(op)}")
    labels.use_whole(operands, op)


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
    given = arguments(op, args, kwargs)
    dims = given.get("dim")
    axes = [dims] if isinstance(dims, int) else list(dims or range(known.dim()))
    axes = [axis % known.dim() for axis in axes] if known.dim() else []
    top = known.amax(axes, keepdim=True) if known.dim() else known
    if bool(((known == top) | (known == UNIFORM)).all()):
        for result in tensors_in(out):
            labels.put(result, top.reshape(result.shape))
        return
    table = known.movedim(axes, list(range(len(axes)))).reshape(math.prod(known.shape[d] for d in axes), -1).t()
    symmetric = all(t.is_floating_point() for t in tensors_in(out))  # the position of the largest is not
    if not symmetric or bool((table != table[:1]).any() or (table == NONE).any()) or labels.moments_in(table):
        for result in tensors_in(out):
            labels.freeze_if_used(result, known, f"{short(op)} reduces over the units")
        return
    labels.parted.append(table[0].cpu())
    labels.reductions.add(described((str(op), args, kwargs)))
    for result in tensors_in(out):
        labels.put(result, torch.tensor(labels.moment(table[0], short(op))))


def _scan(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    known, axis = labels.of(args[0]), args[1]
    labels.use_whole(args[:1], op)
    if known is None:
        return
    if bool((known != known.narrow(axis, 0, 1)).any()):
        labels.freeze(known, f"{short(op)} runs over the units")
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
            labels.freeze(known, f"{short(op)} meets units mixed within a channel")
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
    labels.use_whole([t for t in operands if labels.of_vector(t) is None], op)
    given = arguments(op, args, kwargs)
    moving = _indexed_by_data(labels, given)
    if moving:
        for tensor in operands:
            labels.freeze(labels.of(tensor), f"{short(op)} moves units by an index that depends on the data")
    for name, value in given.items():
        if name in _INDICES:
            for tensor in tensors_in(value):
                labels.freeze(labels.of(tensor), f"{short(op)} uses it as an index")
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
        known = labels.of_vector(value) if known is None else known
        return (
            torch.zeros(value.shape, dtype=torch.int64, device=value.device)
            if known is None
            else known.to(value.device, copy=True)
        )
    if isinstance(value, (list, tuple)):
        return [_relabel(labels, v) for v in value]
    return NONE  # a number


def _index_put(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    adds = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    (_default if adds else _movement)(labels, op, args, kwargs, out)


def _copy(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    labels.use_whole(args[1:2], op)
    labels.put(args[0], spread(labels, args[1], args[0].shape))


def _ignore(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reads a shape, or makes a tensor whose values do not depend on the operands."""


def _read(labels: UnitLabels, op: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels.freeze(labels.of(args[0]), "its value is read by Python")
    labels.use_whole(args[:1], op)


# fmt: off
RULES: dict[str, Rule] = {
    "default": _default,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), matrix_product),
    "convolution": convolution,
    "embedding": embedding,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
         "cudnn_batch_norm", "_batch_norm_with_update"), _batch_norm),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), _softmax),
    "glu": gated_linear_unit,
    **dict.fromkeys(("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"), fused_cell),
    "_prelu_kernel": lambda lab, op, args, kwargs, out: merge(lab, op, out, args, "gain"),
    "nativedropout": dropout,
    "bernoulli_": constant,
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
         "zero_", "fill_", "scalar_tensor", "zero", "fill"), constant),
    **dict.fromkeys(
        ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "rand_like", "randn_like",
         "lift_fresh", "lift", "detach", "detach_", "transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_",
         "swapdims_", "_assert_async", "sym_size", "sym_numel"), _ignore),
    **dict.fromkeys(("_local_scalar_dense", "_is_all_true", "_is_any_true"), _read),
}
"""Operation name (without ``aten::``) to what it does to the labels."""
# fmt: on

MOVES = frozenset({name for name, rule in RULES.items() if rule in (_movement, _copy, _index_put)} | {"clone"})
"""Operations that only move values."""
