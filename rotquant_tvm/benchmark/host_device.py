"""The CPU at hand, through NumPy and TVM alone."""

# ruff: noqa: D102 (``BenchmarkDevice`` says what the methods do)
from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tvm
from numpy.typing import NDArray

from rotquant_tvm.errors import DeviceError

from .contender import Contender
from .cpu_cache import last_level_cache_bytes
from .device import BenchmarkDevice, Shape, compiled
from .host_timing import HostTimer
from .read_kernel import copy_llvm, read_llvm
from .report import Bandwidth


class HostDevice(BenchmarkDevice):
    """The CPU at hand."""

    BANDWIDTH_BYTES = 1 << 28

    def __init__(self, target: tvm.target.Target, samples: int) -> None:
        super().__init__(target, HostTimer(samples))
        self.name = f"{target.attrs.get('mcpu', 'CPU')}, {tvm.runtime.num_threads()} threads"
        self.cache_bytes = last_level_cache_bytes()

    def words(self, shape: Shape) -> Any:
        return self.generator.integers(0, 1 << 32, shape, dtype=np.uint32)

    def normal(self, shape: Shape, dtype: str) -> Any:
        return self.generator.standard_normal(shape, np.float32).astype(_numpy_dtype(dtype))

    def uniform(self, low: float, high: float, shape: Shape, dtype: str) -> Any:
        return self.generator.uniform(low, high, shape).astype(_numpy_dtype(dtype))

    def view(self, array: Any, dtype: str) -> Any:
        return array.view(_numpy_dtype(dtype))

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(_numpy_dtype(dtype))

    def reshape(self, argument: Any, shape: Shape) -> Any:
        return argument._create_view(shape)

    def native(self, array: NDArray[Any]) -> Any:
        return np.array(array, order="C")

    def argument(self, array: Any) -> Any:
        return tvm.runtime.tensor(array)

    def empty(self, shape: Shape, dtype: str) -> Any:
        return tvm.runtime.tensor(np.zeros(shape, dtype))

    def numpy(self, argument: Any, index: Any = ...) -> NDArray[Any]:
        part: NDArray[Any] = argument.numpy()[index]
        return part

    def rotated_bytes(self) -> int:
        return 4 * self.cache_bytes

    def bandwidth(self) -> Bandwidth:
        pieces = 8 * max(1, int(tvm.runtime.num_threads()))
        words = self.BANDWIDTH_BYTES // 4 // pieces // 1024 * 1024
        source, target = self.argument(self.words((pieces, words))), self.empty((pieces, words), "uint32")
        sink = self.empty((pieces, 16), "uint32")
        read, copy = (compiled(func, self.target) for func in (read_llvm(), copy_llvm()))
        calls = [Contender("read", [lambda: read(source, sink)]), Contender("copy", [lambda: copy(source, target)])]
        outcomes = self.race(calls)
        nbytes = 4 * pieces * words
        copied, seen = (outcomes[name].seconds for name in ("copy", "read"))
        if copied is None or seen is None:
            raise DeviceError(f"cannot measure this CPU's memory bandwidth: {outcomes}")
        return Bandwidth(2 * nbytes / copied, nbytes / seen)


def _numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
