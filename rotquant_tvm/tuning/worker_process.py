"""Processes that compile or measure: they may hang or crash, and an interrupt ends them at once."""

from __future__ import annotations

import queue
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tvm.support.popen_pool import PopenWorker

from ..errors import DeviceError


class WorkerProcess:
    """A process that runs functions one after the other; the next call starts a new one if it was ended.

    ``uses``: calls after which the process is replaced; None for never.
    """

    def __init__(self, uses: int | None = None) -> None:
        self._worker = PopenWorker(initializer=_ignore_interrupts, maximum_uses=uses)
        self.closed = False

    def call(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function(*arguments)`` there; raises DeviceError with the last line of whatever went wrong.

        The process is ended if it took more than ``seconds`` or failed otherwise than by a DeviceError.
        """
        if self.closed:
            raise DeviceError("it was interrupted")
        try:
            self._worker.send(function, arguments, timeout=seconds)
            return self._worker.recv()
        except DeviceError as error:
            raise DeviceError(last_line(error)) from error
        except TimeoutError as error:  # the worker has ended the process
            raise DeviceError(f"it took more than {seconds:g} s") from error
        except Exception as error:  # whatever it was, the process may be unusable
            self._end()
            raise DeviceError("it was interrupted" if self.closed else last_line(error)) from error

    @property
    def alive(self) -> bool:
        """Whether the process that the last call used is there for the next."""
        return bool(self._worker.is_alive())

    def close(self) -> None:
        """End the process, also while another thread waits for it."""
        self.closed = True
        self._end()

    def _end(self) -> None:
        process = self._worker._proc
        if process is not None:  # first, since closing a pipe would wait for whoever reads it
            with suppress(OSError):
                process.kill()
        # At interpreter exit; a pipe that is closed already; a process that whoever waited for it has cleared away.
        with suppress(ImportError, OSError, AttributeError):
            self._worker.kill()


class WorkerPool:
    """Several processes that share jobs."""

    def __init__(self, count: int, uses: int | None = None) -> None:
        self.workers = [WorkerProcess(uses) for _ in range(count)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have ``WorkerProcess.call`` done by whichever process is idle next."""
        return self._threads.submit(self._call, seconds, function, arguments)

    def _call(self, seconds: float, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(seconds, function, *arguments)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes; jobs that have not begun never will."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.close()
        self._threads.shutdown()


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; what it means is decided by the one that started the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def last_line(error: object) -> str:
    """The last line of what an error says, without its type's name."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else type(error).__name__
