"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

from agents.command_line import Stopped
from agents.interruption import Interruption

PARENT = "RECYCLE_PARENT"
"""The environment variable in which a child finds the number of the process that started it and watches over it."""


class Children:
    """Runs commands in processes of their own; an error or a signal that asks to end, inside the block, ends them all.

    They are asked to end (SIGTERM), so that a training run writes a last checkpoint. Where this process is killed it
    cannot ask: children that call :func:`end_with_parent` see that for themselves. ::

        with ThreadPoolExecutor(2) as pool, Children() as children:
            ends = [pool.submit(children.run, command) for command in commands]
            while not all(end.done() for end in ends):
                children.rest(1.0)

    A signal is acted on in :meth:`rest`: an exception that a handler raises anywhere may leave a lock of the pool
    closed for good.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._over = False
        self._interruption = Interruption()

    def __enter__(self) -> Children:
        self._interruption.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._interruption.__exit__(kind, error, at)
        if kind is not None:
            with self._lock:
                self._over = True
                for process in self._running:
                    process.terminate()

    def rest(self, seconds: float) -> None:
        """Wait while the children work.

        Raises:
            Stopped: a signal came that asks to end.
        """
        until, interruption = time.monotonic() + seconds, self._interruption
        while interruption.asked is None and time.monotonic() < until:
            time.sleep(min(0.1, seconds))
        if interruption.asked is not None:
            name = interruption.asked.name
            raise Stopped(f"{name}: asked all runs to end; the same command goes on with them", interruption.code)

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and keep what it says; none is begun any more once the block is left by an error."""
        with self._lock:
            if self._over:
                return subprocess.CompletedProcess(command, 128 + signal.SIGTERM, "", "not begun")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {PARENT: str(os.getpid())},
                process_group=0,  # Ctrl-C comes to this process alone: a second signal would end a run at once
            )
            self._running.add(process)
        said, complained = process.communicate()
        with self._lock:
            self._running.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, said, complained)


def end_with_parent() -> None:
    """Ask this process to end (SIGTERM) once the one that :data:`PARENT` names, which started it, is no more."""
    parent = os.environ.pop(PARENT, None)  # it is not for processes that this one starts
    if parent is not None:
        _end_with(int(parent))


def processes(workers: int) -> ProcessPoolExecutor:
    """A pool of new processes that end with this one."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),))


def _end_with(parent: int) -> None:
    """Ask this process to end (SIGTERM) half a second after ``parent``, which started it, is no more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
