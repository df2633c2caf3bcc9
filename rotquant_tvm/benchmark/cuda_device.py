"""The current CUDA device, through torch: compiled kernels launch on torch's current stream."""

# ruff: noqa: D102 (``BenchmarkDevice`` says what the methods do)
from __future__ import annotations

import importlib.util
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

READ_VARIANTS = ((256, 4), (256, 8), (512, 8), (1024, 4))
"""(threads, loads) of the reading kernel; the fastest says what the memory gives."""


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

    def free(self) -> None:
        self.torch.cuda.empty_cache()

    def bandwidth(self) -> Bandwidth:
        words = self.BANDWIDTH_BYTES // 4
        source, target, sink = self.words((words,)), self.empty((words,), "uint32"), self.empty((1,), "uint32")
        contenders = [Contender("copy", [lambda: target.copy_(source)])]
        for threads, loads in READ_VARIANTS:
            kernel = compiled(read_cuda(threads, loads), self.target)
            call = lambda kernel=kernel: kernel(source, sink)  # noqa: E731
            contenders.append(Contender(f"read {threads}x{loads}", [call]))
        outcomes = self.race(contenders)
        seconds = {name: outcome.seconds for name, outcome in outcomes.items() if outcome.seconds}
        if "copy" not in seconds or len(seconds) < 2:
            raise DeviceError(f"cannot measure the device's bandwidth: {outcomes}")
        copy = seconds.pop("copy")
        return Bandwidth(2 * self.BANDWIDTH_BYTES / copy, self.BANDWIDTH_BYTES / min(seconds.values()))

    def _dtype(self, name: str) -> Any:
        return getattr(self.torch, name)
