"""What the scripts share: ``key:value`` words, and one line for a user's mistake."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import yaml

MISTAKES = (
    ValueError, TypeError, KeyError, OSError, ImportError, AssertionError, NotImplementedError, RuntimeError,
    gym.error.Error,
)  # fmt: skip
"""What a wrong option ends in, here or inside gymnasium, stable-baselines3 and torch."""


class Stopped(Exception):
    """A run ended early and in order, because it was told to.

    Args:
        message: what was kept, and how to go on.
        code: what the process ends with: 128 and the number of the signal, as a shell counts.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def reported(command: Callable[[], None]) -> int:
    """Run a command. Returns 0, or 2 after one line on stderr that says what was wrong; 130 if interrupted."""
    try:
        command()
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("interrupted; what was logged so far is kept", file=sys.stderr)
        return 130
    except MISTAKES as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def pairs(words: Sequence[str]) -> dict[str, Any]:
    """``["noise:0.1", "parent:random"]`` as ``{"noise": 0.1, "parent": "random"}``.

    Raises:
        ValueError: a word has no colon.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, colon, value = word.partition(":")
        if not colon or not key:
            raise ValueError(f"expected key:value, got {word!r}. Write for example noise:0.01")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
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
        except (ValueError, SyntaxError):
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
