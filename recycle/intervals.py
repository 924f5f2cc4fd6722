"""Interval arithmetic: the values that an aten operation can give where its operands range over intervals.

A rule is a function ``(op, args, kwargs, out) -> (low, high)`` in which every tensor argument is an
:class:`Interval`; None says that nothing is known. Bounds are ``float64`` whatever the network computes in, and
are then widened by more than the network itself can err: with ``eps`` its precision, ``8 eps`` times the magnitudes
that meet in an element-wise operation, ``2 (n + 2) eps`` times the sum of magnitudes of a sum of ``n`` products
(twice the worst case of any order of summation, Higham 2002, eq. 3.5), eight times that for convolutions, taken
over the whole plane, since Winograd and FFT kernels mix positions. Operations that do not round are not widened, so
zero stays zero. An element without finite bounds may be NaN, and nothing is known of what is computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Interval:
    """Bounds of every element of a tensor; ``low`` and ``high`` are ``float64`` of its shape."""

    low: Tensor
    high: Tensor
    tensor: Tensor
    """The tensor itself, of which dtype and shape may be asked; its values only if ``constant``."""
    constant: bool = False
    """Whether the values are the same for every input."""

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value of each element."""
        return torch.maximum(self.low.abs(), self.high.abs())


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], Pair | None]


def settled(pair: Pair | None, out: Tensor) -> Pair:
    """Bounds that ``out`` can take: rounded as it is, and none at all where one of them is not finite."""
    if out.dtype == torch.bool and pair is None:
        return torch.zeros((), device=out.device), torch.ones((), device=out.device)
    if pair is None:
        return torch.tensor(-math.inf, device=out.device), torch.tensor(math.inf, device=out.device)
    low, high = (bound.broadcast_to(out.shape) for bound in pair)
    if out.is_floating_point():  # what lies between two bounds lies between their nearest neighbours in its precision
        low, high = low.to(out.dtype).double(), high.to(out.dtype).double()
    known = low.isfinite() & high.isfinite()
    return torch.where(known, low, -math.inf), torch.where(known, high, math.inf)


def function(op: Any) -> Any:
    """The operation that makes a new tensor: ``aten.add`` for ``aten.add_.Tensor``."""
    return getattr(torch.ops.aten, op._schema.name.removeprefix("aten::").removesuffix("_"))


# -- rounding ----------------------------------------------------------------------------------------------


def _precision(*values: Any) -> float:
    """The coarsest ``eps`` of the tensors, 0 for integers."""
    tensors = [v.tensor if isinstance(v, Interval) else v for v in values if isinstance(v, (Interval, Tensor))]
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)


def _product_precision(*values: Any) -> float:
    """The same for matrix products and convolutions, which may round their operands to fewer bits."""
    eps = _precision(*values)
    reduced = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    if torch.backends.cudnn.allow_tf32 and any(v.tensor.is_cuda for v in values if isinstance(v, Interval)):
        reduced = max(reduced, 2.0**-10)
    return max(eps, reduced) if eps > torch.finfo(torch.float64).eps else eps


def _rounded(low: Tensor, high: Tensor, met: Tensor, eps: float, out: Tensor) -> Pair:
    """Widen the result of an element-wise operation; ``met`` are the magnitudes that met."""
    met = met + torch.maximum(low.abs(), high.abs())
    error = 8 * eps * met + torch.where(met > 0, 8 * _smallest(out), 0.0)
    return low - error, high + error


def _summed(low: Tensor, high: Tensor, total: Tensor, count: int, eps: float, out: Tensor) -> Pair:
    """Widen a sum of ``count`` terms whose magnitudes sum up to ``total``."""
    share = (count + 2) * eps
    error = 2 * share * total + torch.where(total > 0, (count + 2) * _smallest(out), 0.0)
    overflows = (total > _largest(out) / 2) | (share > 0.25)
    error = torch.where(overflows, math.inf, error)
    return low - error, high + error


def _smallest(out: Tensor) -> float:
    return float(torch.finfo(out.dtype).smallest_normal) if out.is_floating_point() else 0.0


def _largest(out: Tensor) -> float:
    return float(torch.finfo(out.dtype).max) if out.is_floating_point() else 2.0**53


# -- element by element ------------------------------------------------------------------------------------


def _operand(value: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Low, high and magnitude of a tensor argument or a number."""
    if isinstance(value, Interval):
        return value.low, value.high, value.magnitude
    number = torch.tensor(float(value), dtype=torch.double)
    return number, number, number.abs()


def _plain_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """Everything but the first argument as it is, tensors in float64; None if one of them is no constant."""
    given = [*args, *kwargs.values()]
    if any(isinstance(v, Interval) and not v.constant for v in given):
        return None

    def plain(value: Any) -> Any:
        return value.low if isinstance(value, Interval) else value

    return [plain(v) for v in args], {k: plain(v) for k, v in kwargs.items()}


def _exact(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    """A function that never falls and does not round."""
    rest = _plain_arguments(args[1:], kwargs)
    if rest is None:
        return None
    low, high = (function(op)(bound, *rest[0], **rest[1]) for bound in (args[0].low, args[0].high))
    known = args[0].low.isfinite()  # clamping NaN gives NaN
    return torch.where(known, low, -math.inf), torch.where(known, high, math.inf)


def _rising(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    """A function that never falls: its ends are those of its operand."""
    ends = _exact(op, args, kwargs, out)
    return None if ends is None else _rounded(*ends, args[0].magnitude, _precision(args[0], out), out)


def _rising_if_positive(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    """``leaky_relu`` and ``elu``: rising where their options are positive."""
    options = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, (int, float))]
    return _rising(op, args, kwargs, out) if all(v >= 0 for v in options) else None


def _softplus(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    """Above its threshold it is the identity, a step down of less than ``exp(-threshold) / beta``."""
    options: list[float] = [*args[1:], *(1, 20)[len(args) - 1 :]]
    beta, threshold = options
    if beta <= 0 or kwargs:
        return None
    low, high = (function(op)(bound, beta, threshold) for bound in (args[0].low, args[0].high))
    step = 2 * math.exp(-threshold) / beta
    return _rounded(low - step, high + step, args[0].magnitude, _precision(args[0], out), out)


def _log_sigmoid(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    low, high = (torch.nn.functional.logsigmoid(bound) for bound in (args[0].low, args[0].high))
    return _rounded(low, high, args[0].magnitude, _precision(args[0], out), out)


def _valley(bottom: float, minimum: float) -> Rule:
    """A function that falls until ``bottom``, where it is above ``minimum``, and rises from there."""

    def rule(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
        x = args[0]
        ends = [function(op)(bound, *args[1:], **kwargs) for bound in (x.low, x.high)]
        low = torch.where((x.low < bottom + 0.01) & (x.high > bottom - 0.01), minimum, torch.minimum(*ends))
        return _rounded(low, torch.maximum(*ends), x.magnitude, _precision(x, out), out)

    return rule


def _add(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    one, other = args[:2]
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    if op._schema.name.startswith("aten::sub"):
        alpha = -alpha
    if op._schema.name == "aten::rsub":
        one, other, alpha = other, one, -alpha
    (a, b, size), (c, d, more) = _operand(one), _operand(other)
    c, d = _span(alpha * c, alpha * d)
    return _rounded(a + c, b + d, size + abs(alpha) * more, _precision(one, other, out), out)


def _span(*values: Tensor) -> Pair:
    """The least and the largest of each element of several tensors; NaN where one of them is."""
    low = high = values[0]
    for value in values[1:]:
        low, high = torch.minimum(low, value), torch.maximum(high, value)
    return low, high


def _mul(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    (a, b, size), (c, d, more) = map(_operand, args[:2])
    return _rounded(*_span(a * c, a * d, b * c, b * d), size * more, _precision(*args[:2], out), out)


def _div(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    if kwargs.get("rounding_mode") is not None:
        return None
    c, d, _ = _operand(args[1])
    known = (c > 0) | (d < 0)
    c, d = torch.where(known, 1 / d, math.nan), torch.where(known, 1 / c, math.nan)
    a, b, size = _operand(args[0])
    met = size * torch.maximum(c.abs(), d.abs())
    return _rounded(*_span(a * c, a * d, b * c, b * d), met, _precision(*args[:2], out), out)


def _reciprocal(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    return _div(op, (1.0, args[0]), {}, out)


def _neg(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    return -args[0].high, -args[0].low


def _abs(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    low, high = args[0].low, args[0].high
    return torch.maximum(low, -high).clamp_min(0), args[0].magnitude


def _power(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    exponent = args[1] if len(args) > 1 else 2
    if not isinstance(exponent, (int, float)) or exponent < 1 or exponent != int(exponent):
        return None
    base = _abs(op, args, kwargs, out) if exponent % 2 == 0 else (args[0].low, args[0].high)
    low, high = (bound**exponent for bound in base)
    return _rounded(low, high, torch.zeros_like(low), exponent * _precision(args[0], out), out)


def _extreme(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    """``maximum`` and ``minimum``."""
    one, other = args[:2]
    unknown = ~(one.low.isfinite() & other.low.isfinite())
    low, high = function(op)(one.low, other.low), function(op)(one.high, other.high)
    return torch.where(unknown, -math.inf, low), torch.where(unknown, math.inf, high)


def _compare(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    """0 or 1; the same at both ends where the intervals do not overlap."""
    name = op._schema.name.removeprefix("aten::").removesuffix("_")
    (a, b, _), (c, d, _) = map(_operand, args[:2])
    if name in ("lt", "le"):
        a, b, c, d = c, d, a, b  # x < y is y > x
    known = (a.isfinite() & c.isfinite()) if name in ("lt", "le", "gt", "ge") else torch.tensor(False)
    strict = name in ("gt", "lt")
    always = known & ((a > d) if strict else (a >= d))
    never = known & ((b <= c) if strict else (b < c))
    return always.double(), (~never).double()


def _where(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    return _choose(args[0], args[1], args[2])


def _masked_fill(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    return _choose(args[1], args[2], args[0])


def _choose(condition: Interval, yes: Any, no: Any) -> Pair:
    (a, b, _), (c, d, _) = _operand(yes), _operand(no)
    always, never = condition.low > 0, condition.high <= 0
    low = torch.where(always, a, torch.where(never, c, torch.minimum(a, c)))
    return low, torch.where(always, b, torch.where(never, d, torch.maximum(b, d)))


def _prelu(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    x, slope = args
    (a, b, _), (c, d, more) = _operand(x), _operand(slope)
    least, most = _span(*(slope_end * bound.clamp_max(0) for slope_end in (c, d) for bound in (a, b)))
    low, high = a.clamp_min(0) + least, b.clamp_min(0) + most
    return _rounded(low, high, x.magnitude * (1 + more), _precision(x, slope, out), out)


def _cast(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    x = args[0]
    if out.dtype == torch.bool:
        zero, apart = (x.low == 0) & (x.high == 0), (x.low > 0) | (x.high < 0)
        return apart.double(), (~zero).double()
    if out.is_floating_point():
        return x.low, x.high
    known = (x.low >= torch.iinfo(out.dtype).min) & (x.high <= torch.iinfo(out.dtype).max)
    return torch.where(known, x.low.trunc(), -math.inf), torch.where(known, x.high.trunc(), math.inf)


def _fill(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    """``fill_``, ``zero_`` and ``copy_``: what was there before is gone."""
    value = args[1] if len(args) > 1 else 0.0
    if isinstance(value, Interval):
        return _cast(op, (value,), {}, out)
    low, high, _ = _operand(value if out.is_floating_point() else int(value))
    return low.to(out.device), high.to(out.device)


# -- linear maps -------------------------------------------------------------------------------------------


def _contraction(contract: Callable[[Tensor, Tensor], Tensor], one: Interval, other: Interval) -> tuple[Tensor, ...]:
    """Low, high and total magnitude of a map that is linear in both operands."""
    total = contract(one.magnitude, other.magnitude)
    if other.constant:
        up, down = other.low.clamp_min(0), other.low.clamp_max(0)
        return contract(one.low, up) + contract(one.high, down), contract(one.high, up) + contract(one.low, down), total
    if one.constant:
        up, down = one.low.clamp_min(0), one.low.clamp_max(0)
        low = contract(up, other.low) + contract(down, other.high)
        return low, contract(up, other.high) + contract(down, other.low), total
    return -total, total, total


def _matrix_product(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    if kwargs or len(args) > 3:  # scaled
        return None
    one, other = args[-2:]
    low, high, total = _contraction(torch.matmul, one, other)
    eps = _product_precision(one, other, out)
    if len(args) == 3:
        low, high, total = low + args[0].low, high + args[0].high, total + args[0].magnitude
    return _summed(low, high, total, one.low.shape[-1], eps, out)


def _convolution(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    data, weight, bias, *options = args
    transposed = options[3]

    def contract(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, w, None, *options)  # type: ignore[no-any-return]

    low, high, total = _contraction(contract, data, weight)
    if bias is not None:
        shape = [-1] + [1] * (len(weight.low.shape) - 2)
        low, high = low + bias.low.reshape(shape), high + bias.high.reshape(shape)
        total = total + bias.magnitude.reshape(shape)
    plane = list(range(total.dim() - (weight.low.dim() - 2), total.dim()))
    count = weight.low.numel() // weight.low.shape[1 if transposed else 0]
    total = 8 * total.amax(plane, keepdim=True) * torch.ones_like(low)
    return _summed(low, high, total, count, _product_precision(data, weight, out), out)


def _embedding(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    table, index = args[:2]
    if index.constant:
        return table.low[index.tensor], table.high[index.tensor]
    return table.low.amin(0), table.high.amax(0)  # any row


# -- normalisation -----------------------------------------------------------------------------------------


def _affine(low: Tensor, high: Tensor, weight: Any, bias: Any, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Low, high and magnitude of ``x * weight + bias``."""
    size = torch.maximum(low.abs(), high.abs())
    if weight is not None:
        gain = weight.low.reshape(shape)
        low, high, size = *_span(low * gain, high * gain), size * gain.abs()
    if bias is not None:
        shift = bias.low.reshape(shape)
        low, high, size = low + shift, high + shift, size + shift.abs()
    return low, high, size


def _batch_norm(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    data, weight, bias, mean, variance = args[:5]
    training = op._schema.name != "aten::_native_batch_norm_legit_no_training" and args[5]
    state = [v for v in (weight, bias, mean, variance) if v is not None]
    if training or mean is None or variance is None or not all(v.constant for v in state):
        return None
    channel = [1, -1] + [1] * (data.low.dim() - 2)
    deviation = (variance.low.reshape(channel) + args[-1]).sqrt()
    centre = mean.low.reshape(channel)
    low, high, size = _affine((data.low - centre) / deviation, (data.high - centre) / deviation, weight, bias, channel)
    gain = (1 if weight is None else weight.low.reshape(channel).abs()) / deviation
    met = 4 * (size + gain * (data.magnitude + centre.abs()))
    return _rounded(low, high, met, _precision(data, *state, out), out)


def _standardised(data: Interval, count: int, epsilon: float, out: Tensor) -> Tensor | None:
    """A bound on |x - mean| / sqrt(variance + epsilon) of ``count`` values.

    It is ``sqrt(count - 1)``. Where the spread of the values is no larger than the error of their mean, the
    quotient is at most that of this error and ``sqrt(epsilon)``; else the variance is not off by more than half.
    """
    if epsilon <= 0 or not bool(data.low.isfinite().all()):
        return None
    root = math.sqrt(max(count - 1, 0))
    error = 4 * (count + 2) * _precision(data, out) * data.magnitude.max()
    return 1 + root * math.sqrt(2) + (4 * root + 1) * error / math.sqrt(epsilon)


def _layer_norm(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    data, shape, weight, bias, epsilon = args
    if any(v is not None and not v.constant for v in (weight, bias)):
        return None
    most = _standardised(data, math.prod(shape), epsilon, out)
    if most is None:
        return None
    most = most * torch.ones(out.shape, dtype=torch.double, device=out.device)
    return _rounded(*_affine(-most, most, weight, bias, shape), _precision(data, out), out)


def _group_norm(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    data, weight, bias, _, channels, positions, groups, epsilon = args
    if any(v is not None and not v.constant for v in (weight, bias)):
        return None
    most = _standardised(data, channels // groups * positions, epsilon, out)
    if most is None:
        return None
    most = most * torch.ones(out.shape, dtype=torch.double, device=out.device)
    channel = [1, -1] + [1] * (out.dim() - 2)
    return _rounded(*_affine(-most, most, weight, bias, channel), _precision(data, out), out)


def _softmax(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    if not bool(args[0].low.isfinite().all()):
        return None
    zero = torch.zeros((), dtype=torch.double, device=out.device)
    return zero, zero + 1 + 8 * _precision(out) * args[0].low.shape[args[1]]


# -- along axes --------------------------------------------------------------------------------------------


def _sum(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    """``sum`` and ``mean``."""
    kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
    x = args[0]
    low, high, total = (function(op)(bound, *args[1:], **kwargs) for bound in (x.low, x.high, x.magnitude))
    count = max(x.low.numel() // max(out.numel(), 1), 1)
    return _summed(low, high, total, count, _precision(x, out), out)


def _largest_of(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair | None:
    """``amax``, ``max_pool`` and their kin: they never fall and do not round."""
    x = args[0]
    if any(isinstance(v, Interval) for v in args[1:]):
        return _extreme(op, args, kwargs, out)
    results = [function(op)(bound, *args[1:], **kwargs) for bound in (x.low, x.high, (~x.low.isfinite()).double())]
    low, high, unknown = (r if isinstance(r, Tensor) else r[0] for r in results)
    if bool((~x.low.isfinite()).any()) and "min" in op._schema.name:
        return None
    return torch.where(unknown > 0, -math.inf, low), torch.where(unknown > 0, math.inf, high)


def _averaged(op: Any, args: Any, kwargs: Any, out: Tensor) -> Pair:
    """Averages over windows, with weights that are not negative."""
    x = args[0]
    low, high, total = (function(op)(bound, *args[1:], **kwargs) for bound in (x.low, x.high, x.magnitude))
    return _summed(low, high, total, math.prod(x.low.shape[2:]), _precision(x, out), out)


# -- data movement -----------------------------------------------------------------------------------------

_INDICES = {"index", "indices"}
_KINDS = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")


def _movement(op: Any, args: Any, kwargs: Any, out: Any) -> Pair | None:
    """The same operation, called on both bounds."""
    given = {**dict(zip((a.name for a in op._schema.arguments), args, strict=False)), **kwargs}
    if given.get("accumulate") or "reduce" in given:
        return None
    ends = []
    for low in (True, False):
        moved = {k: _end(v, low, index=k in _INDICES) for k, v in given.items() if k not in _KINDS}
        if any(v is NotImplemented for v in moved.values()):
            return None
        ends.append(function(op)(**moved))
    return ends[0], ends[1]


def _end(value: Any, low: bool, *, index: bool) -> Any:
    if isinstance(value, Interval):
        if index:
            return value.tensor if value.constant else NotImplemented
        return value.low if low else value.high
    if isinstance(value, (list, tuple)):
        items = [_end(v, low, index=index) for v in value]
        return NotImplemented if any(v is NotImplemented for v in items) else items
    return value


# fmt: off
RULES: dict[str, Rule] = {
    **dict.fromkeys(("relu", "clamp", "clamp_min", "clamp_max", "hardtanh", "floor", "ceil", "trunc", "sign"),
                    _exact),
    **dict.fromkeys(("tanh", "sigmoid", "exp", "expm1", "log", "log1p", "sqrt", "erf", "atan", "sinh", "hardsigmoid"),
                    _rising),
    **dict.fromkeys(("leaky_relu", "elu"), _rising_if_positive),
    "softplus": _softplus,
    "log_sigmoid_forward": _log_sigmoid,
    "silu": _valley(-1.27846454, -0.27846456),
    "gelu": _valley(-0.75179, -0.17005),  # of either approximation
    "mish": _valley(-1.19240, -0.30885),
    "hardswish": _valley(-1.5, -0.375001),
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    "mul": _mul, "div": _div, "reciprocal": _reciprocal, "neg": _neg, "abs": _abs, "pow": _power, "square": _power,
    **dict.fromkeys(("maximum", "minimum"), _extreme),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), _compare),
    "where": _where, "masked_fill": _masked_fill, "_prelu_kernel": _prelu, "_to_copy": _cast,
    **dict.fromkeys(("fill", "zero", "copy"), _fill),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), _matrix_product),
    "convolution": _convolution, "embedding": _embedding,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "native_layer_norm": _layer_norm, "native_group_norm": _group_norm, "_softmax": _softmax,
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("amax", "amin", "max", "min", "max_pool2d_with_indices", "max_pool3d_with_indices",
                     "adaptive_max_pool2d", "adaptive_max_pool3d"), _largest_of),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_linear1d",
                     "upsample_bilinear2d", "upsample_trilinear3d"), _averaged),
    **dict.fromkeys(
        ("clone", "cat", "stack", "constant_pad_nd", "repeat", "flip", "roll", "index", "index_select", "gather",
         "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "reflection_pad1d", "reflection_pad2d",
         "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "select_scatter",
         "slice_scatter", "tril", "triu", "rot90", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
         "scatter", "index_copy", "index_put"), _movement),
}
"""Operation name (without ``aten::`` and without the ``_`` of one in place) to the bounds of its first result."""
# fmt: on

ELEMENTWISE = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_to_copy"})
"""Operations that torch does not tag as element-wise, though (in evaluation mode) they are."""

MAKES = frozenset({
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty",
    "new_empty_strided", "sym_size", "sym_numel", "sym_stride",
})  # fmt: skip
"""Operations that read no more of a tensor than its shape."""
