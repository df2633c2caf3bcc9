"""Times on the CPU: medians of runs, each over whole rounds through the buffers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from .contender import Contender, Outcome, failure

SAMPLE_SECONDS = 10e-3
"""What one sample should last, so that the clock's own time does not count."""

REST_SECONDS = 5e-3
"""Before a sample: threads of the contender before it, which spin after their work, go to sleep meanwhile."""


class HostTimer:
    """Races contenders: every round times each of them once, and the medians over ``samples`` rounds count."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.clocks = {"wall clock"}

    def race(self, contenders: Sequence[Contender]) -> dict[str, Outcome]:
        """Return every contender's outcome by name."""
        outcomes: dict[str, Outcome] = {}
        counts: dict[str, int] = {}
        for contender in contenders:
            try:
                for call in contender.calls:
                    call()
                counts[contender.name] = max(1, round(SAMPLE_SECONDS / max(_seconds(contender, 0, 1), 1e-7)))
            except Exception as error:  # a rival that cannot run is a line of the table, not the end of it
                outcomes[contender.name] = failure(error)
        times: dict[str, list[float]] = {name: [] for name in counts}
        for sample in range(self.samples):
            for contender in contenders:
                if contender.name in counts:
                    number = counts[contender.name]
                    times[contender.name].append(_seconds(contender, sample * number, number))
        return outcomes | {name: Outcome(statistics.median(seconds)) for name, seconds in times.items()}


def _seconds(contender: Contender, first: int, count: int) -> float:
    """Seconds per call of ``count`` calls in turn, from the ``first``-th set of buffers on, after one that wakes it."""
    calls = [contender.calls[(first + index) % len(contender.calls)] for index in range(count + 1)]
    time.sleep(REST_SECONDS)
    calls.pop(0)()
    since = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - since) / count
