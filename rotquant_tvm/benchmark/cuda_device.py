"""The current CUDA device, through torch: compiled kernels launch on torch's current stream."""

# ruff: noqa: D102 (``BenchmarkDevice`` says what the methods do)
from __future__ import annotations

import importlib.util
import math
from functools import partial
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from rotquant_tvm.errors import DeviceError, UsageError

from .contender import Contender
from .cuda_timing import CudaTimer
from .device import BenchmarkDevice, Shape, compiled
from .read_kernel import read_cuda
from .report import Bandwidth

L2_TIMES = 40
"""The cache does not simply forget the oldest: of data read in turn it keeps about its share of all that is touched."""

CONTENDERS = 24
"""More than are raced at once, each with buffers of its own."""

READ_VARIANTS = ((256, 4), (256, 8), (512, 8), (1024, 4))
"""(threads, loads) of the reading kernel; the fastest says what the memory gives."""

READ_BYTES = math.lcm(*(16 * threads * loads for threads, loads in READ_VARIANTS))
"""What every variant reads a whole number of."""

SETS = 4
"""Buffers of which the bandwidth is measured in turn."""


def require_torch() -> Any:
    """Import torch; raises ``UsageError`` naming the remedy."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("benchmarks on CUDA need the package torch: pip install 'rotquant-tvm[torch]'")
    import torch

    return torch


class CudaDevice(BenchmarkDevice):
    """The current CUDA device, through torch."""

    BANDWIDTH_BYTES = 1 << 30
    where = "cuda"

    def __init__(self, target: tvm.target.Target, samples: int) -> None:
        self.torch = require_torch()
        if not self.torch.cuda.is_available():
            raise DeviceError("torch sees no CUDA device; install a torch with CUDA, or use --target llvm")
        super().__init__(target, CudaTimer(self.torch, samples))
        properties = self.torch.cuda.get_device_properties(0)
        self.name, self.cache_bytes = properties.name, int(properties.L2_cache_size)
        self.unit = str(getattr(properties, "uuid", ""))
        self.torch.manual_seed(0)

    def words(self, shape: Shape) -> Any:
        words = self.torch.randint(-(1 << 31), 1 << 31, shape, dtype=self.torch.int32, device=self.where)
        return words.view(self.torch.uint32)

    def normal(self, shape: Shape, dtype: str) -> Any:
        return self.torch.randn(shape, dtype=self._dtype(dtype), device=self.where)

    def uniform(self, low: float, high: float, shape: Shape, dtype: str) -> Any:
        return self.torch.empty(shape, dtype=self._dtype(dtype), device=self.where).uniform_(low, high)

    def view(self, array: Any, dtype: str) -> Any:
        return array.view(self._dtype(dtype))

    def cast(self, array: Any, dtype: str) -> Any:
        return array.to(self._dtype(dtype))

    def reshape(self, argument: Any, shape: Shape) -> Any:
        return argument.view(shape)

    def native(self, array: NDArray[Any]) -> Any:
        return self.torch.from_numpy(np.array(array, order="C")).to(self.where)

    def argument(self, array: Any) -> Any:
        return array

    def empty(self, shape: Shape, dtype: str) -> Any:
        return self.torch.zeros(shape, dtype=self._dtype(dtype), device=self.where)

    def numpy(self, argument: Any, index: Any = ...) -> NDArray[Any]:
        part: NDArray[Any] = argument[index].contiguous().cpu().numpy()
        return part

    def rotated_bytes(self) -> int:
        free, _ = self.torch.cuda.mem_get_info()
        return min(L2_TIMES * self.cache_bytes, int(free) // CONTENDERS)

    def free(self) -> None:
        self.torch.cuda.empty_cache()

    def bandwidth(self) -> Bandwidth:
        nbytes = min(self.BANDWIDTH_BYTES, self.rotated_bytes())
        buffers = [self.words((nbytes // READ_BYTES * READ_BYTES // 4,)) for _ in range(SETS)]
        nbytes, sink = 4 * len(buffers[0]), self.empty((1,), "uint32")
        pairs = list(zip(buffers, [*buffers[1:], buffers[0]], strict=True))
        # Large copies are given to the copy engines (2.4 TB/s on an H100, 2.8 on an H200), which kernels outdo: the
        # faster counts, of them and of a kernel that reads as much as it writes.
        ways = {"copy": lambda x, y: y.copy_(x), "copy by a kernel": self._inverted}
        contenders = [Contender(name, [partial(way, x, y) for x, y in pairs]) for name, way in ways.items()]
        for threads, loads in READ_VARIANTS:
            kernel = compiled(read_cuda(threads, loads), self.target)
            calls = [partial(kernel, x, sink) for x in buffers]
            contenders.append(Contender(f"read {threads}x{loads}", calls))
        outcomes = self.race(contenders)
        seconds = {name: outcome.seconds for name, outcome in outcomes.items() if outcome.seconds}
        copies = [seconds.pop(name) for name in ways if name in seconds]
        if not copies or not seconds:
            raise DeviceError(f"cannot measure the device's bandwidth: {outcomes}")
        return Bandwidth(2 * nbytes / min(copies), nbytes / min(seconds.values()))

    def _inverted(self, source: Any, target: Any) -> None:
        """Write the bits of words inverted."""
        self.torch.bitwise_not(source.view(self.torch.int32), out=target.view(self.torch.int32))

    def _dtype(self, name: str) -> Any:
        return getattr(self.torch, name)
