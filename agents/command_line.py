"""What the scripts share: ``key:value`` words, and one line for a user's mistake."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym

MISTAKES = (
    ValueError, TypeError, KeyError, OSError, ImportError, AssertionError, NotImplementedError, RuntimeError,
    gym.error.Error,
)  # fmt: skip
"""What a wrong option ends in, here or inside gymnasium, stable-baselines3 and torch."""


def reported(command: Callable[[], None]) -> int:
    """Run a command. Returns 0, or 2 after one line on stderr that says what was wrong; 130 if interrupted."""
    try:
        command()
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
