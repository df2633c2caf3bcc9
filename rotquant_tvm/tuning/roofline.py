"""What a device could do at best: bytes copied and products computed per second, both measured on it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import Measurement

_CUDA_SIZE, _HOST_SIZE = 8192, 1024
"""Rows and columns of the products that are timed."""
_ROUNDS = 20


@dataclass(frozen=True)
class Roofline:
    """Bytes per second that a copy reads and writes, and multiplications and additions per second; None: unknown.

    The rate of products is that of a large one in float16 on GPUs and in float32 on CPUs.
    """

    bandwidth: float | None = None
    product_rate: float | None = None

    def floor(self, measurement: Measurement) -> float | None:
        """Seconds that a run must take; None where the bandwidth is unknown."""
        if self.bandwidth is None:
            return None
        products = measurement.flops() / self.product_rate if self.product_rate else 0.0
        return max(measurement.moved_bytes() / self.bandwidth, products)

    def share(self, measurement: Measurement, seconds: float) -> float | None:
        """How much of what the device could do a kernel does that takes so long."""
        floor = self.floor(measurement)
        return None if floor is None or not 0 < seconds < math.inf else floor / seconds


def measured_roofline(device: Any) -> Roofline:
    """Measure a ``BenchmarkDevice``."""
    return Roofline(float(device.bandwidth().copy), _product_rate(getattr(device, "torch", None)))


def _product_rate(torch: Any) -> float:
    if torch is not None:
        return _cuda_rate(torch)
    one = np.ones((_HOST_SIZE, _HOST_SIZE), np.float32)
    one @ one
    seconds = []
    for _ in range(_ROUNDS):
        since = time.perf_counter()
        one @ one
        seconds.append(time.perf_counter() - since)
    return float(2 * _HOST_SIZE**3 / min(seconds))


def _cuda_rate(torch: Any) -> float:
    one = torch.randn((_CUDA_SIZE, _CUDA_SIZE), dtype=torch.float16, device="cuda")
    one @ one
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(_ROUNDS):
        start.record()
        one @ one
        end.record()
        end.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end))
    return float(2 * _CUDA_SIZE**3 / min(seconds))
