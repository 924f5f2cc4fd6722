"""Whether arguments and options are of the kinds that they are declared with: one clear line where they are not."""

from __future__ import annotations

import numbers
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from recycle.names import did_you_mean

_PLAIN: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    NoneType: "None",
}


def check_arguments(of: Callable[..., Any], name: str, /, **given: Any) -> None:
    """Refuse arguments of a function that are not what its signature says.

    Args:
        of: the function, with annotations.
        name: what the error calls it.
        given: arguments by name.

    Raises:
        TypeError: one is of another kind.
        ValueError: one is none of a few words.
    """
    _check(name, _hints(of), given)


def check_fields(of: Any, name: str = "") -> None:
    """Refuse fields of a dataclass's object as :func:`check_arguments` does those of a call.

    Args:
        of: the object, in its ``__post_init__``.
        name: what the error calls it; "": its class's name.
    """
    kind: Callable[..., Any] = type(of)
    _check(name or kind.__name__, _hints(kind), {f.name: getattr(of, f.name) for f in fields(of) if f.init})


def unit_numbers(values: Any, what: str) -> tuple[int, ...]:
    """Numbers of units as a tuple.

    Args:
        values: a tensor ``(units,)`` of integers, or anything that gives whole numbers when it is iterated over.
        what: what the error calls them.

    Raises:
        TypeError: they are something else; a mask, say.
    """
    listed = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(listed, (str, bytes, Mapping)) or not hasattr(listed, "__iter__"):
        raise TypeError(f"{what} are numbers of units in a list, such as [0, 3], got {_shown(values)}")
    listed = list(listed)
    if set(map(type, listed)) & {bool, np.bool_}:
        raise TypeError(f"{what} are numbers of units, got a mask {_shown(values)}. Pass mask.nonzero()[:, 0]")
    if not _all_fit(listed, int):
        raise TypeError(f"{what} are whole numbers of units in a list, such as [0, 3], got {_shown(values)}")
    return tuple(map(int, listed))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a type annotation says; where the annotation says too little to tell, it is."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    if hint in _PLAIN:
        return _is_plain(type(value), hint)
    if origin is Callable or hint is Callable:
        return callable(value)
    if origin is tuple and get_args(hint)[1:] != (Ellipsis,):
        parts = get_args(hint)
        whole = isinstance(value, (tuple, list)) and len(value) == len(parts)
        return whole and all(map(fits, value, parts))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is type:
        return isinstance(value, type)
    if isinstance(origin, type) and issubclass(origin, (Sequence, AbstractSet)):
        several = isinstance(value, (Sequence, AbstractSet)) and not isinstance(value, (str, bytes))
        return several and _all_fit(value, get_args(hint)[0])
    if hint is Any or not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return True
    return isinstance(value, hint)


def _all_fit(values: Collection[Any], hint: Any) -> bool:
    """Whether each of several values is what an annotation says; no loop in Python over plain ones."""
    if hint in _PLAIN:
        return all(_is_plain(kind, hint) for kind in set(map(type, values)))
    return all(fits(each, hint) for each in values)


def _is_plain(kind: type, hint: type) -> bool:
    if hint in (int, float):
        return issubclass(kind, numbers.Integral if hint is int else numbers.Real) and not issubclass(kind, bool)
    return issubclass(kind, (bool, np.bool_) if hint is bool else hint)


def described(hint: Any) -> str:
    """A type annotation in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(described(each) for each in parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is Callable or hint is Callable:
        return "a function"
    if origin is tuple and parts[1:] != (Ellipsis,):
        return f"({', '.join(map(described, parts))})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a dictionary"
    if origin is type:
        return "a class"
    if isinstance(origin, type) and issubclass(origin, (Sequence, AbstractSet)):
        return f"a list with {described(parts[0])} in each place"
    return f"a {getattr(hint, '__name__', hint)}"


def _check(name: str, hints: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        hint = hints.get(key, Any)
        if fits(value, hint):
            continue
        words = get_args(hint) if get_origin(hint) is Literal else ()
        if words and isinstance(value, str):
            raise ValueError(f"{name} has no {key} {value!r}: {did_you_mean(value, words)}")
        raise TypeError(f"{name} needs {key} to be {described(hint)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value on one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, torch.nn.Module):
        return f"a module {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _hints(of: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(of)
