"""What the measuring process does: it opens the device, runs candidates on full caches, compares and times them."""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from numpy.typing import NDArray

from ..benchmark.device import BenchmarkDevice, open_device
from ..errors import DeviceError
from ..process_locks import locked_file
from .arguments import Measurement, Parameter
from .kernel_builder import Candidate
from .kernel_timer import Timing, time_calls
from .roofline import Roofline, measured_roofline
from .tuning_task import MAIN

_LARGEST_ERROR = 2e-2
"""Relative L2 error of a float result, and share of the words that a packed one changes: sums have no one order."""
_MOST_BYTES = 4 << 30
"""Of all sets of buffers together."""
_COMPARED_BYTES = 64 << 20
"""Of a result; more of the same would show nothing else."""


@dataclass
class Bench:
    """A device with the arguments of the task that is being measured.

    ``folder`` keeps the results of the first candidate of every task, which all others must agree with.
    """

    device: BenchmarkDevice
    folder: Path
    key: str = ""
    sets: list[list[Any]] = field(default_factory=list)
    before: dict[int, NDArray[Any]] = field(default_factory=dict)

    def prepare(self, measurement: Measurement) -> None:
        """Make the arguments, in so many sets that no run finds its data in a cache; kept until another task comes.

        What results the first set holds are as they were before any candidate ran.
        """
        key = hashlib.sha256(f"{measurement.shape} {measurement.parameters}".encode()).hexdigest()
        if key != self.key:
            self.key, self.sets, self.before = "", [], {}
            self.device.free()
            count = max(1, min(self.device.sets(measurement.nbytes), _MOST_BYTES // max(1, measurement.nbytes)))
            self._reseed()
            self.sets = [measurement.arrays(self.device) for _ in range(count)]
            self.before = {index: self.device.numpy(self.sets[0][index]) for index in measurement.results}
            self.key = key
        for index, values in self.before.items():
            self.sets[0][index] = self.device.argument(self.device.native(values))

    def _reseed(self) -> None:
        """Tasks take turns: the same arguments must come again."""
        self.device.generator = np.random.default_rng(0)
        torch = getattr(self.device, "torch", None)
        if torch is not None:
            torch.manual_seed(0)

    def check(self, measurement: Measurement) -> None:
        """Compare the first set's results with those of the task's first candidate. Raises DeviceError."""
        parts = {index: _part(measurement.parameters[index]) for index in measurement.results}
        found = {str(index): self.device.numpy(self.sets[0][index], part) for index, part in parts.items()}
        file = self.folder / f"{self.key}.npz"
        if not file.exists():
            np.savez(file, **found)  # type: ignore[arg-type]
            return
        expected = np.load(file)
        for index, part in parts.items():
            if not _agree(found[str(index)], expected[str(index)], self.before[index][part]):
                name = measurement.parameters[index].name
                raise DeviceError(f"wrong result: {name} differs from that of the rule's own kernel")


_BENCHES: dict[tuple[str, str], Bench] = {}


def bench_for(target: tvm.target.Target, folder: str) -> Bench:
    """The process's bench for a target; opens the device the first time."""
    key = (str(target), folder)
    if key not in _BENCHES:
        _BENCHES[key] = Bench(open_device(target, 10), Path(folder))
    return _BENCHES[key]


def open_bench(target: tvm.target.Target, folder: str, known: bool = False) -> tuple[Roofline, Path]:
    """Open the device, and measure what it could do unless that is ``known``; returns its ``turn_file`` too."""
    device = bench_for(target, folder).device
    file = turn_file(device)
    if known:
        return Roofline(), file
    with locked_file(file, lambda: None):
        return measured_roofline(device), file


def measure_candidate(
    target: tvm.target.Target, folder: str, library: str, args_info: list[list[Any]], timing: Timing
) -> list[float]:
    """Run, compare and time a candidate; returns seconds per run. Raises DeviceError for a wrong result."""
    bench, candidate = bench_for(target, folder), Candidate.read(library, args_info)
    kernel = tvm.runtime.load_module(library)[MAIN]
    bench.prepare(candidate.measurement)
    sets = [candidate.arguments(arrays, bench.device) for arrays in bench.sets]
    kernel(*sets[0])
    bench.check(candidate.measurement)
    calls = [lambda arguments=arguments: kernel(*arguments) for arguments in sets]
    return time_calls(calls, timing, getattr(bench.device, "torch", None))


def turn_file(device: BenchmarkDevice) -> Path:
    """The file that whoever measures on a device locks: several tunings at once would disturb each other's times.

    It is one user's, in the folder for temporary files: where another user has it, nobody waits.
    """
    name = re.sub(r"[^0-9A-Za-z]+", "-", f"{device.name} {device.unit}").strip("-")
    return Path(tempfile.gettempdir()) / f"rotquant-tvm-measuring-{name}"


def _part(parameter: Parameter) -> tuple[slice, ...]:
    """What is compared of an array: the first of its first axis that is longer than 1."""
    axis = next((axis for axis, size in enumerate(parameter.shape) if size > 1), 0)
    size = parameter.shape[axis]
    kept = max(1, min(size, size * _COMPARED_BYTES // max(1, parameter.nbytes)))
    return (slice(None),) * axis + (slice(0, kept),)


def _agree(result: NDArray[Any], wanted: NDArray[Any], before: NDArray[Any]) -> bool:
    if wanted.dtype == ml_dtypes.bfloat16:
        result, wanted = result.astype(np.float32), wanted.astype(np.float32)
    if wanted.dtype.kind == "f":
        known = np.isfinite(wanted)
        if not np.array_equal(known, np.isfinite(result)):
            return False
        exact = np.where(known, wanted, 0).astype(np.float64)
        error = np.linalg.norm(np.where(known, result, 0).astype(np.float64) - exact)
        return bool(error <= _LARGEST_ERROR * np.linalg.norm(exact))
    changed = np.count_nonzero(wanted != before)
    return bool(np.count_nonzero(result != wanted) <= _LARGEST_ERROR * changed)
