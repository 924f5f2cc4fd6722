"""What the scripts ask of their options, each in one clear line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from recycle.names import did_you_mean

_FROM_INSIDE = (
    TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError, ArithmeticError, MemoryError,
)  # fmt: skip
"""What other people's code raises where it does not look at what it was given."""


def at_least(args: object, **least: int) -> None:
    """Refuse options below these numbers: ``at_least(args, seeds=1)``.

    Raises:
        ValueError: one is; None is not looked at.
    """
    for name, number in least.items():
        value = getattr(args, name)
        if value is not None and value < number:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {number}, got {value}")


def threads(count: int | None) -> None:
    """Refuse a number of threads that torch cannot have.

    Raises:
        ValueError: it is none; None is torch's own choice.
    """
    if count is not None and not 1 <= count <= 4096:
        raise ValueError(f"--num-threads must be at least 1 and at most 4096, got {count}")


def chosen(option: str, given: Sequence[str], known: Collection[str]) -> None:
    """Refuse a list of names that is empty, or in which one is unknown or comes twice.

    Raises:
        ValueError: it is.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"{option} has no {name!r}: {did_you_mean(name, known)}")
        if given.count(name) > 1:
            raise ValueError(f"{option} takes each name once, got {name!r} more than once")
    if not given:
        raise ValueError(f"{option} takes one name or more of {', '.join(known)}, got none")


def writable(folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made.

    Raises:
        ValueError: it is a file, lies below one, or may not be written to.
    """
    path = Path(folder)
    try:
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
    except OSError as error:
        raise ValueError(f"--log-folder {str(folder)!r}: {error.strerror}. Choose a folder you may write") from error
    if "\0" in str(folder) or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--log-folder {str(folder)!r} cannot be written ({nearest}). Choose a folder you may write")


@contextlib.contextmanager
def blamed(on: str) -> Iterator[None]:
    """Errors from inside other people's code say what of the user's they are about.

    Args:
        on: what was handed to that code, and cannot be used: ``"--env-kwargs"``, say.

    Raises:
        ValueError: the block ended in an error that is no answer to a user.
    """
    try:
        yield
    except _FROM_INSIDE as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{on}: {text or 'no reason was given'} ({type(error).__name__})") from error
