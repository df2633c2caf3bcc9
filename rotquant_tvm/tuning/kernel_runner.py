"""Measuring candidates: in a process of its own, which a kernel may bring down, or on another machine by RPC."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from ..errors import DeviceError
from ..process_locks import locked_file
from .kernel_timer import Timing
from .measuring import measure_candidate, open_bench
from .remote_measuring import RemoteDevice, measure_remotely
from .roofline import Roofline
from .worker_process import WorkerProcess

_OPENING_SECONDS = 300.0
"""For loading TVM and torch, and opening the device."""


@dataclass
class MeasuringProcess:
    """A process that measures, one candidate after the other; it is replaced when a candidate fails in it.

    ``folder``: where the process keeps results to compare. ``remote``: the machine to measure on instead. ``lost``: why
    nothing can be measured there any more, which is no fault of a candidate's.
    """

    target: tvm.target.Target
    folder: Path
    timing: Timing
    timeout: float
    remote: RemoteDevice | None = None
    roofline: Roofline = field(default_factory=Roofline)
    lost: DeviceError | None = None

    def __post_init__(self) -> None:
        self._worker = WorkerProcess()
        self._open = False
        self._turn: Path | None = None

    def open(self) -> None:
        """Start the process, and measure what the device could do unless that is known. Raises DeviceError."""
        if self.remote is None and not self._open:
            known = self.roofline.bandwidth is not None
            found, self._turn = self._worker.call(_OPENING_SECONDS, open_bench, self.target, str(self.folder), known)
            self.roofline = self.roofline if known else found
        self._open = True

    def measure(self, library: str, args_info: list[list[Any]]) -> list[float]:
        """Return seconds per run of a candidate, one for each measurement. Raises DeviceError.

        Processes that measure on the same device take turns, so that several tasks can be tuned at once; waiting does
        not count.
        """
        if self.lost is not None:
            raise DeviceError(str(self.lost))
        self.open()
        call, seconds, folder = self._worker.call, self.timeout, str(self.folder)
        try:
            if self.remote is not None:
                return call(seconds, measure_remotely, self.remote, library, args_info, self.timing)  # type: ignore
            with nullcontext() if self._turn is None else locked_file(self._turn, lambda: None):
                return call(  # type: ignore[no-any-return]
                    seconds, measure_candidate, self.target, folder, library, args_info, self.timing
                )
        except DeviceError:
            if self.remote is not None and not self._worker.closed:
                self.lost = self.remote.lost()
            raise
        finally:
            self._open = self._worker.alive

    def close(self) -> None:
        """End the process."""
        self._worker.close()


@derived_object
class _Result(ms.runner.PyRunnerFuture):  # type: ignore[misc]
    """A measurement that may still be under way."""

    def __init__(self, future: Future[list[float]]) -> None:
        super().__init__()
        self.future = future

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Any:
        try:
            return ms.runner.RunnerResult(self.future.result(), None)
        except DeviceError as error:
            return ms.runner.RunnerResult(None, str(error))


@derived_object
class KernelRunner(ms.runner.PyRunner):  # type: ignore[misc]
    """Hands candidates to the measuring process; GPUs measure while the next batch is compiled, CPUs do not."""

    def __init__(self, process: MeasuringProcess) -> None:
        """Use ``process`` alone."""
        super().__init__()
        self.process = process
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.alone = process.remote is None and process.target.kind.name != "cuda"

    def run(self, runner_inputs: list[Any]) -> list[Any]:
        """Measure the candidates of one batch."""
        futures = []
        for entry in runner_inputs:
            args_info = [info.as_json() for info in entry.args_info]
            futures.append(self.thread.submit(self._measure, str(entry.artifact_path), args_info))
        if self.alone:
            for future in futures:
                future.exception()
        return [_Result(future) for future in futures]

    def _measure(self, library: str, args_info: list[list[Any]]) -> list[float]:
        try:
            return self.process.measure(library, args_info)
        finally:
            shutil.rmtree(Path(library).parent, ignore_errors=True)

    def close(self) -> None:
        """Wait for what is under way and end the process."""
        self.thread.shutdown(cancel_futures=True)
        self.process.close()
