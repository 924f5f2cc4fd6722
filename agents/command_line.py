"""What the scripts share: ``key:value`` words, and one line for a user's mistake."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import yaml

MISTAKES = (ValueError, OSError, ImportError, gym.error.Error)
"""What a wrong option ends in. Anything else is a mistake of ours, and its traceback tells where."""


class Broken(RuntimeError):
    """A run broke off for a reason outside of this package: a full disk, an environment, a device.

    Args:
        message: what went wrong, and how to go on.
    """


class Stopped(Exception):
    """A run ended early and in order, because it was told to.

    Args:
        message: what was kept, and how to go on.
        code: what the process ends with: 128 and the number of the signal, as a shell counts.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def reported(command: Callable[[], int | None]) -> int:
    """Run a command. Returns its code, or 2 after one line on stderr that says what was wrong; 130 if interrupted."""
    try:
        return command() or 0
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("interrupted; what was logged so far is kept", file=sys.stderr)
        return 130
    except (*MISTAKES, Broken) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: Exception) -> str:
    """What a user is told of an error."""
    return " ".join(str(error).split()) or type(error).__name__


def pairs(words: Sequence[str]) -> dict[str, Any]:
    """``["noise:0.1", "parent:random"]`` as ``{"noise": 0.1, "parent": "random"}``.

    Raises:
        ValueError: a word has no colon, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, colon, value = word.partition(":")
        if not colon or not key:
            raise ValueError(f"expected key:value, got {word!r}. Write for example noise:0.01")
        if key in found:
            raise ValueError(f"{key!r} is given twice, the second time as {word!r}. Leave one out")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found[key] = value
    return found


def words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """What :func:`pairs` reads as these options, whose values may have passed through :func:`written` and YAML."""
    return tuple(f"{key}:{value}" if isinstance(value, str) else f"{key}:{value!r}" for key, value in options.items())


def written(value: Any) -> Any:
    """A value that :func:`pairs` read, as YAML can keep it: where that would give another back, its Python literal."""
    if isinstance(value, str):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value
        return repr(value)
    try:
        same = repr(yaml.safe_load(yaml.safe_dump(value, sort_keys=False))) == repr(value)
    except yaml.YAMLError:
        same = False
    return value if same else repr(value)


def say(message: str) -> None:
    """Warn the user in one line; what goes wrong here does not end the run."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
