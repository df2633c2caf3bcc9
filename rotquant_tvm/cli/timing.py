"""Times of repeated runs, and of the kernels inside one run."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rotquant_tvm.cli.output import table

if TYPE_CHECKING:
    from rich.table import Table
    from tvm.runtime import Device

STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "max": max,
    "min": min,
    "std": statistics.pstdev,
}


def measure(run: Callable[[], object], repeat: int, number: int) -> list[float]:
    """Return ``repeat`` measurements, in seconds per run, of ``number`` runs each."""
    seconds = []
    for _ in range(repeat):
        since = time.perf_counter()
        for _ in range(number):
            run()
        seconds.append((time.perf_counter() - since) / number)
    return seconds


def summarize(seconds: list[float]) -> dict[str, float]:
    """Return mean, median, max, min and std in milliseconds."""
    return {name: 1000 * function(seconds) for name, function in STATISTICS.items()}


def time_table(summary: dict[str, float]) -> Table:
    """Return a summary as the table that ``--print-time`` shows."""
    cells = [[f"{summary[name]:.3f}" for name in STATISTICS]]
    return table("execution time (ms)", list(STATISTICS), cells, left=0)


class KernelProfile:
    """Adds up the time between a virtual machine's calls of a kernel and their ends, by phase and kernel.

    ``instrument`` is what ``Session.instrument`` takes. The virtual machine's own bookkeeping is one entry.
    On a GPU every kernel is waited for, so the sum is more than an undisturbed run takes.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._phase = ""
        self._since = 0.0
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._calls: defaultdict[tuple[str, str], int] = defaultdict(int)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside the block under the phase ``name``."""
        self._phase = name
        yield
        self._phase = ""

    def instrument(self, _function: Any, symbol: str, before: bool, _result: Any, *_arguments: Any) -> int:
        """Note the beginning or the end of a call."""
        if before:
            self._since = time.perf_counter()
            return 0
        own = symbol.startswith("vm.")
        if not own:
            self._device.sync()
        key = (self._phase, "(virtual machine)" if own else symbol)
        self._seconds[key] += time.perf_counter() - self._since
        self._calls[key] += 1
        return 0

    def kernels(self) -> list[dict[str, Any]]:
        """Return the entries, per phase the longest first; ``share`` is of the phase's sum."""
        totals: defaultdict[str, float] = defaultdict(float)
        for (phase, _), seconds in self._seconds.items():
            totals[phase] += seconds
        order = sorted(self._seconds.items(), key=lambda item: (list(totals).index(item[0][0]), -item[1]))
        return [
            {
                "phase": phase,
                "kernel": kernel,
                "calls": self._calls[phase, kernel],
                "milliseconds": 1000 * seconds,
                "share": seconds / totals[phase] if totals[phase] else 0.0,
            }
            for (phase, kernel), seconds in order
        ]


def profile_table(kernels: list[dict[str, Any]]) -> Table:
    """Return the entries of a profile as a table."""
    rows = [
        [
            entry["phase"],
            entry["kernel"],
            entry["calls"],
            f"{entry['milliseconds']:.3f}",
            f"{1000 * entry['milliseconds'] / entry['calls']:.1f}",
            f"{100 * entry['share']:.1f} %",
        ]
        for entry in kernels
    ]
    return table("kernels", ["phase", "kernel", "calls", "ms", "µs/call", "share"], rows, left=2)
