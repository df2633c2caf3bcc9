"""Times on CUDA: medians of graph replays, or of events around many launches where a graph cannot hold the work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .contender import Call, Contender, Outcome, failure

GRAPH_SECONDS = 1e-3
"""What a graph should last, so that its start does not count."""
MOST_LAUNCHES = 1500
_PER_THREAD = 2
"""The CUDA runtime's handle of the calling thread's default stream."""
_CLOCK = 2e9
"""About how many cycles a GPU makes in a second."""

_MOST_HEAD_START = int(0.2 * _CLOCK)
_HEAD_START = 200_000
"""Clock cycles that the device waits before what is timed, so that the host has queued it by then."""


class NotCaptured(Exception):
    """A graph does not hold all of the work that was to be captured."""


@dataclass(frozen=True)
class _Sample:
    """Something to time: ``run`` queues ``launches`` calls."""

    run: Callable[[], object]
    launches: int
    head_start: int = _HEAD_START


class CudaTimer:
    """Races contenders: every round times each of them once, and the medians over ``samples`` rounds count."""

    def __init__(self, torch: Any, samples: int) -> None:
        self.torch = torch
        self.samples = samples
        self._own = torch.cuda.Stream()
        self._per_thread = torch.cuda.ExternalStream(_PER_THREAD)
        self.clocks: set[str] = set()

    def race(self, contenders: Sequence[Contender]) -> dict[str, Outcome]:
        """Return every contender's outcome by name; all are timed in one way, by graphs if they can be."""
        shared = any(contender.default_stream for contender in contenders)
        stream = self._per_thread if shared else self._own
        outcomes, running, estimates = {}, [], {}
        with self._on(stream):
            for contender in contenders:
                try:
                    estimates[contender.name] = self._warm_up(contender)
                    running.append(contender)
                except Exception as error:  # a rival that cannot run is a line of the table, not the end of it
                    outcomes[contender.name] = failure(error)
            try:
                samples = {c.name: self._graph(c, estimates[c.name]) for c in running}
                self.clocks.add("CUDA graph replays")
            except Exception:  # whatever ended the capture, events can time it
                self.torch.cuda.synchronize()
                samples = {c.name: self._launches(c, estimates[c.name]) for c in running}
                self.clocks.add("events around launches")
            return outcomes | self._medians(samples)

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """Make a stream current; what was queued before is done before, and the other way round."""
        self.torch.cuda.synchronize()
        with self.torch.cuda.stream(stream):
            yield
        self.torch.cuda.synchronize()

    def _warm_up(self, contender: Contender) -> float:
        """Run every call once, then some in turn; returns the seconds that one takes with its launch."""
        for call in contender.calls:
            call()
        self.torch.cuda.synchronize()
        times = [self._timed(_Sample(_in_turn(contender.calls, 4), 4)) for _ in range(3)]
        return min(times)

    def _graph(self, contender: Contender, estimate: float) -> _Sample:
        launches = _launch_count(len(contender.calls), estimate)
        graph = self.torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            _in_turn(contender.calls, launches)()
        finally:
            graph.capture_end()
        for output in contender.outputs:
            output.fill_(float("nan"))
        graph.replay()
        self.torch.cuda.synchronize()
        if any(self.torch.isnan(output).any().item() for output in contender.outputs):
            raise NotCaptured(contender.name)
        return _Sample(graph.replay, launches)

    def _launches(self, contender: Contender, estimate: float) -> _Sample:
        launches = min(_launch_count(len(contender.calls), estimate), 200)
        head_start = int(1.5 * _CLOCK * estimate * launches)  # the estimate has the host's time in it
        return _Sample(_in_turn(contender.calls, launches), launches, min(head_start, _MOST_HEAD_START))

    def _medians(self, samples: dict[str, _Sample]) -> dict[str, Outcome]:
        times: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(self.samples):
            for name, sample in samples.items():
                times[name].append(self._timed(sample))
        return {name: Outcome(statistics.median(seconds)) for name, seconds in times.items()}

    def _timed(self, sample: _Sample) -> float:
        """Seconds per launch."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda._sleep(sample.head_start)
        start.record()
        sample.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / sample.launches


def _launch_count(calls: int, estimate: float) -> int:
    """Whole rounds through the buffers that last ``GRAPH_SECONDS``, at least one."""
    rounds = max(1, round(GRAPH_SECONDS / max(estimate, 1e-7) / calls))
    return calls * max(1, min(rounds, MOST_LAUNCHES // calls))


def _in_turn(calls: Sequence[Call], count: int) -> Callable[[], None]:
    def run() -> None:
        for index in range(count):
            calls[index % len(calls)]()

    return run
