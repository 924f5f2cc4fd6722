"""Signals that ask a process to end: noted when they come, acted on where that is safe."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""To end: by a scheduler or another process, by Ctrl-C, by a terminal that is closed."""


class Interruption:
    """Notes signals that ask to end while its block runs, and lets the block find out where it can end in order. ::

        with Interruption() as interruption:
            while work and interruption.asked is None:
                ...

    A second one raises KeyboardInterrupt at once, wherever the program is, which may leave locks closed. A hang-up that
    is ignored (``nohup``) stays ignored. In any but the main thread nothing is noted: signals are not its business.
    """

    asked: signal.Signals | None = None
    """The first signal that came."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    @property
    def code(self) -> int:
        """What a process ends with that a signal has ended, as a shell counts: 128 and the signal's number."""
        return 128 + (self.asked or 0)
