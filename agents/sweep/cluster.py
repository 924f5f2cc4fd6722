"""Ray, as far as a sweep needs it: a connection, and one attempt at a run on whichever machine has room.

What runs inside Ray's worker is :func:`_attempt` alone, sent by value: it knows nothing of torch, and only watches over
a process that does. So a run that crashes takes neither the worker nor the sweep along.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from agents.children import PARENT

QUIET = ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_kill_child_processes_on_worker_exit")
"""What Ray shall not do: report home, warn of a run without a GPU, and kill a run that is writing its last checkpoint
(on a cluster that others started this is set there)."""

REACHED, JOINED = 5.0, 30.0
"""Seconds in which a machine has to take a connection, and its cluster to let us in."""


def load_ray() -> Any:
    """The module, told not to report home and to keep its warnings.

    Raises:
        ImportError: Ray is not installed.
    """
    for name in QUIET:
        os.environ.setdefault(name, "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("a sweep needs Ray: pip install 'recycle-rl[sweep]'") from error


@contextlib.contextmanager
def connected(address: str | None, *, cpus: float, gpus: float) -> Iterator[Cluster]:
    """Ray, on this machine alone, or in the cluster at ``host:port`` or ``auto`` that this machine belongs to.

    ``cpus`` and ``gpus`` are what one run is given.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the address is none.
        ConnectionError: nobody answers there, or the cluster is lost.
    """
    if address is not None:
        _check_address(address)
    ray = load_ray()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    with contextlib.ExitStack() as stack:
        try:
            if address is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
                small = {"object_store_memory": 100 * 2**20, "include_dashboard": False, "_temp_dir": folder}
                ray.init(address="local", **small, **quiet)
            else:
                with _within(JOINED, f"--address: no Ray cluster that we can join answers at {address}"), _silence():
                    ray.init(address=address, **quiet)
            stack.callback(ray.shutdown)
            yield Cluster(ray, cpus, gpus)
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"Ray has failed: {error}. The same command goes on with the sweep") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what compiled code writes to stderr in the block."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_address(address: str) -> None:
    """Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--address: expected HOST:PORT of a cluster's head, or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=REACHED).close()
    except OSError as error:
        raise ConnectionError(
            f"--address: nobody answers at {address} ({error}). `ray start --head` prints the address of a cluster"
        ) from error


class _TooLate(BaseException):
    """No Exception: Ray would catch that, and try again."""


@contextlib.contextmanager
def _within(seconds: float, message: str) -> Iterator[None]:
    """Raise a ConnectionError if the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLate

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLate:
        raise ConnectionError(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Ended(NamedTuple):
    """How an attempt ended."""

    code: int
    host: str
    said: str
    """The last line that the run wrote; "" after code 0."""


class Cluster:
    """Machines that are given attempts at runs."""

    def __init__(self, ray: Any, cpus: float, gpus: float) -> None:
        self._ray, self._cpus, self._gpus = ray, cpus, gpus
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_attempt)

    def check_room(self) -> None:
        """Refuse what no machine could ever run.

        Raises:
            ValueError: every machine is too small for one run.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(own.get("CPU", 0) >= self._cpus and own.get("GPU", 0) >= self._gpus for own in machines):
            there = "; ".join(f"{own.get('CPU', 0):g} CPUs and {own.get('GPU', 0):g} GPUs" for own in machines)
            raise ValueError(
                f"no machine has room for a run of --cpus-per-run {self._cpus:g} --gpus-per-run {self._gpus:g}; "
                f"there are machines of {there}"
            )

    def submit(self, folder: Path, words: Sequence[str], log: Path) -> Any:
        """Queue an attempt at the run in ``folder``, whose output is appended to ``log``; what :meth:`ended` takes."""
        return self._task.remote(str(folder), list(words), str(log.absolute()), os.getcwd(), self._gpus > 0)

    def ended(self, attempts: Sequence[Any], seconds: float) -> Iterator[tuple[Any, Ended]]:
        """Those of the attempts that have ended, once one has, or so many seconds have passed."""
        ready, _ = self._ray.wait(attempts, num_returns=len(attempts), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(attempts, num_returns=1, timeout=seconds)
        for attempt in ready:
            yield attempt, self._result(attempt)

    def _result(self, attempt: Any) -> Ended:
        try:
            return Ended(*self._ray.get(attempt))
        except self._ray.exceptions.RayTaskError as error:
            return Ended(1, "", f"{type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            return Ended(1, "", f"its worker or machine was lost ({type(error).__name__})")

    def stop(self, attempts: Sequence[Any]) -> None:
        """Drop those that are queued, end those that run in order, and wait until they have written a checkpoint."""
        for attempt in attempts:
            self._ray.cancel(attempt)
        self._ray.wait(attempts, num_returns=len(attempts))


def _attempt(folder: str, words: list[str], log: str, workplace: str, gpu: bool) -> tuple[int, str, str]:
    """Runs in a worker of Ray, perhaps on another machine."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so Ray ends a task; background jobs inherit it ignored
    host = socket.gethostname()
    for needed in (workplace, os.path.dirname(log)):
        if not os.path.isdir(needed):
            return 1, host, f"{needed} is not there on {host}: all machines must see the same files"
    environment = os.environ | {PARENT: str(os.getpid())} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    with open(log, "ab") as output:
        output.write(f"--- attempt on {host}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "agents.sweep.attempt", folder, *words],
            cwd=workplace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches it once, through the sweep
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
        except BaseException:
            process.terminate()
            output.write(b"--- asked to end\n")
            output.flush()
            process.wait()
            raise
    if process.returncode == 0:
        return 0, host, ""
    with open(log, "rb") as output:
        output.seek(begin)
        lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else f"it said nothing (exit code {process.returncode})"
    if process.returncode < 0:
        said = f"killed by {signal.Signals(-process.returncode).name}"
    return process.returncode, host, said
