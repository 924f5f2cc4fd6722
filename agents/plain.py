"""Values as ``torch.save`` writes them and ``torch.load(weights_only=True)`` reads them: without unpickling code."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ARRAY, _NUMBER, _DEQUE = "__numpy_array__", "__numpy_number__", "__deque__"


def to_plain(value: Any) -> Any:
    """Nested dicts, lists, tuples and deques of tensors, arrays, numbers and strings; named tuples become plain.

    Raises:
        TypeError: something else is among them.
    """
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)}
    if isinstance(value, np.generic):
        return {_NUMBER: torch.from_numpy(np.asarray(value))}
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, deque):
        return {_DEQUE: [to_plain(item) for item in value], "maxlen": value.maxlen}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"expected tensors, arrays, numbers and strings, got {type(value).__name__}")


def from_plain(value: Any) -> Any:
    """The inverse of :func:`to_plain`; tensors stay on the CPU."""
    if isinstance(value, dict):
        if _ARRAY in value:
            return value[_ARRAY].numpy()
        if _NUMBER in value:
            return value[_NUMBER].numpy()[()]
        if _DEQUE in value:
            return deque(map(from_plain, value[_DEQUE]), maxlen=value["maxlen"])
        return {key: from_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(from_plain, value))
    return value
