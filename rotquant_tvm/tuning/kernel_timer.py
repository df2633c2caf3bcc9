"""Times of one kernel: CUDA graph replays, or runs by the wall clock on CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]

_MOST_LAUNCHES = 2000
"""Of one graph."""


@dataclass(frozen=True)
class Timing:
    """How often a kernel is run.

    number   runs of one measurement, at least. repeat  measurements. min_repeat_ms  what one of them lasts, at least.
    """

    number: int = 10
    repeat: int = 5
    min_repeat_ms: float = 5.0

    def launches(self, estimate: float, calls: int) -> int:
        """How many runs make a measurement, in whole rounds through ``calls``, if one takes ``estimate`` seconds."""
        wanted = max(self.number, self.min_repeat_ms * 1e-3 / max(estimate, 1e-7))
        return calls * max(1, round(min(wanted, _MOST_LAUNCHES) / calls))


def time_calls(calls: Sequence[Call], timing: Timing, torch: Any = None) -> list[float]:
    """Time calls that do the same on different buffers, in turn; returns seconds per call, one for every measurement.

    ``torch``: the module, for kernels on CUDA; else they run on this CPU.
    """
    return _cuda(calls, timing, torch) if torch is not None else _host(calls, timing)


def _host(calls: Sequence[Call], timing: Timing) -> list[float]:
    since = time.perf_counter()
    for call in calls:
        call()
    launches = timing.launches((time.perf_counter() - since) / len(calls), len(calls))
    seconds = []
    for _ in range(timing.repeat):
        since = time.perf_counter()
        for index in range(launches):
            calls[index % len(calls)]()
        seconds.append((time.perf_counter() - since) / launches)
    return seconds


def _cuda(calls: Sequence[Call], timing: Timing, torch: Any) -> list[float]:
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls:  # loads the module, which a graph could not
            call()
        estimate = _elapsed(torch, lambda: [call() for call in calls]) / len(calls)
        launches = timing.launches(estimate, len(calls))
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for index in range(launches):
                calls[index % len(calls)]()
        finally:
            graph.capture_end()
        graph.replay()
        return [_elapsed(torch, graph.replay) / launches for _ in range(timing.repeat)]


def _elapsed(torch: Any, run: Call) -> float:
    """Seconds between two events around what ``run`` queues on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
