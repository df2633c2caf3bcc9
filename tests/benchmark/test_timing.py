"""Contenders, and the timers that race them."""

from __future__ import annotations

import time

import pytest

from rotquant_tvm.benchmark import host_timing
from rotquant_tvm.benchmark.contender import Contender, failure, sets_past_cache
from rotquant_tvm.benchmark.host_timing import HostTimer


def test_sets_touch_all_bytes_of_a_round():
    assert sets_past_cache(10, 401) == 41 and sets_past_cache(1000, 100) == 1
    assert sets_past_cache(0, 10**9) == 1024 and sets_past_cache(1, 10**9, most=7) == 7


def test_a_failures_note_is_the_end_of_its_text():
    assert failure(RuntimeError("the context\n  the reason")).note == "failed: the context the reason"
    assert failure(KeyError()).note == "failed: KeyError" and failure(KeyError()).seconds is None
    long = failure(RuntimeError("x" * 5000 + " the reason")).note
    assert long.endswith("the reason") and len(long) < 250


def test_the_median_of_a_call_is_its_time(monkeypatch):
    monkeypatch.setattr(host_timing, "REST_SECONDS", 0)
    outcome = HostTimer(5).race([Contender("sleep", [lambda: time.sleep(0.01)])])["sleep"]
    assert 0.01 <= outcome.seconds < 0.03


def test_calls_run_in_turn_and_contenders_alternate(monkeypatch):
    monkeypatch.setattr(host_timing, "REST_SECONDS", 0)
    monkeypatch.setattr(host_timing, "SAMPLE_SECONDS", 1e-9)  # one call per sample
    log = []
    contenders = [Contender(name, [lambda w=f"{name}{i}": log.append(w) for i in range(3)]) for name in "ab"]
    HostTimer(2).race(contenders)
    names = [word[0] for word in log[-8:]]
    assert names == ["a", "a", "b", "b"] * 2  # one call wakes the contender, one is timed
    assert {word for word in log if word[0] == "a"} == {"a0", "a1", "a2"}


def test_a_contender_that_raises_is_noted_and_the_others_run(monkeypatch):
    monkeypatch.setattr(host_timing, "REST_SECONDS", 0)

    def broken():
        raise ValueError("no such kernel")

    outcomes = HostTimer(1).race([Contender("broken", [broken]), Contender("good", [lambda: None])])
    assert outcomes["broken"].seconds is None and "no such kernel" in outcomes["broken"].note
    assert outcomes["good"].seconds is not None


@pytest.mark.gpu
def test_cuda_graphs_and_events_agree():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from rotquant_tvm.benchmark.cuda_timing import CudaTimer

    source, target = torch.randn(1 << 24, device="cuda"), torch.empty(1 << 24, device="cuda")

    def add() -> None:
        torch.add(source, 1, out=target)

    def not_in_a_graph() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("refused")
        add()

    graphs, events = CudaTimer(torch, 10), CudaTimer(torch, 10)
    one = graphs.race([Contender("add", [add], [target])])["add"].seconds
    other = events.race([Contender("add", [not_in_a_graph], [target])])["add"].seconds
    assert graphs.clocks == {"CUDA graph replays"} and events.clocks == {"events around launches"}
    assert one == pytest.approx(other, rel=0.1)


@pytest.mark.gpu
def test_a_graph_without_the_work_is_not_believed():
    """A launch on another stream is not captured: its output stays poisoned when the graph is replayed."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from rotquant_tvm.benchmark.cuda_timing import CudaTimer

    other, target = torch.cuda.Stream(), torch.zeros(1 << 20, device="cuda")

    def elsewhere() -> None:
        with torch.cuda.stream(other):
            target.fill_(1)

    timer = CudaTimer(torch, 3)
    timer.race([Contender("elsewhere", [elsewhere], [target])])
    assert timer.clocks == {"events around launches"}
