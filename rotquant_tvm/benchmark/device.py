"""What benchmarks ask of the device they run on: arrays, a timer and the measured bandwidth.

*Native* arrays are torch's or NumPy's, to be filled; ``argument`` turns them into what kernels take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from rotquant_tvm.codegen import compile_module
from rotquant_tvm.target import resolve_target

from .contender import Contender, Outcome, sets_past_cache
from .report import Bandwidth

Shape = tuple[int, ...]

MOST_SETS = 1024
"""Sets of buffers at most: those of small calls may not fill a large cache."""


class BenchmarkDevice(ABC):
    """Arrays, timers and bandwidth of one device; ``target`` is what its kernels are compiled for.

    ``unit`` tells it from others of the same ``name`` in the machine.
    """

    name: str
    unit: str = ""
    cache_bytes: int

    def __init__(self, target: tvm.target.Target, timer: Any) -> None:
        self.target, self.timer = target, timer
        self.generator = np.random.default_rng(0)

    @abstractmethod
    def words(self, shape: Shape) -> Any:
        """Random native uint32."""

    @abstractmethod
    def normal(self, shape: Shape, dtype: str) -> Any:
        """Native standard normal numbers, in float16, float32 or bfloat16."""

    @abstractmethod
    def uniform(self, low: float, high: float, shape: Shape, dtype: str) -> Any:
        """Native uniform numbers."""

    @abstractmethod
    def view(self, array: Any, dtype: str) -> Any:
        """The same native memory as another dtype; the last axis grows or shrinks."""

    @abstractmethod
    def cast(self, array: Any, dtype: str) -> Any:
        """A native array in another dtype."""

    @abstractmethod
    def reshape(self, argument: Any, shape: Shape) -> Any:
        """The memory of an argument in another shape."""

    @abstractmethod
    def native(self, array: NDArray[Any]) -> Any:
        """A native copy of a NumPy array."""

    @abstractmethod
    def argument(self, array: Any) -> Any:
        """A native array as kernels take it; the same memory on CUDA, aligned memory on CPUs."""

    @abstractmethod
    def empty(self, shape: Shape, dtype: str) -> Any:
        """An argument of zeros."""

    @abstractmethod
    def numpy(self, argument: Any, index: Any = ...) -> NDArray[Any]:
        """A part of an argument as NumPy."""

    @abstractmethod
    def bandwidth(self) -> Bandwidth:
        """Measure the bandwidth of copying and of reading."""

    def race(self, contenders: Sequence[Contender]) -> dict[str, Outcome]:
        """Time contenders in one run; see the timers."""
        outcomes: dict[str, Outcome] = self.timer.race(contenders)
        return outcomes

    def coefficients(self, data: NDArray[Any]) -> Any:
        """A rotation's coefficients as kernels take them: one unused element for the identity."""
        return self.argument(self.native(data if data.size else np.zeros(1, np.float32)))

    @abstractmethod
    def rotated_bytes(self) -> int:
        """How many bytes a round of calls must touch for a call to find nothing of its own data in the cache."""

    def sets(self, nbytes: int, most: int = MOST_SETS) -> int:
        """How many sets of buffers keep a call's data out of the cache, as far as the memory goes."""
        return sets_past_cache(nbytes, self.rotated_bytes(), most)

    def free(self) -> None:  # noqa: B027 - nothing to do unless memory is pooled
        """Return memory that nothing uses."""


def open_device(target: str, samples: int) -> BenchmarkDevice:
    """Return the device of a target; raises ``DeviceError`` or ``UsageError`` if it is not there, or torch is not."""
    resolved = resolve_target(target)
    if resolved.kind.name == "cuda":
        from .cuda_device import CudaDevice

        return CudaDevice(resolved, samples)
    from .host_device import HostDevice

    return HostDevice(resolved, samples)


def compiled(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Any:
    """Compile one function that is no operator."""
    return compile_module(tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")}), target)["kernel"]
