"""Files that are written whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path, mode: str = "w+b", **options: Any) -> Iterator[Any]:
    """A new file, open to write, that takes the place of ``path`` in one step once it is on the disk, or vanishes.

    Until then it is ``.<name>.part`` beside it; only one process at a time may write there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the operating system's lock on a file; it goes when the block or the process ends, however that ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    with path.open("r+b") as file:  # to write, or a network file system would refuse an exclusive lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{path.parent} is in use: another process trains this run. Wait for it, stop it, or choose --tag NAME"
            ) from error
        yield


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
