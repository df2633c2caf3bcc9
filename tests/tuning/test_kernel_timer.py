"""Timing: whole rounds through the buffers, at least so many runs and so long."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.tuning.kernel_timer import Timing, time_calls


@given(
    number=st.integers(1, 100), estimate=st.floats(1e-7, 1.0), calls=st.integers(1, 64), milliseconds=st.floats(0, 20)
)
def test_launches_are_whole_rounds(number, estimate, calls, milliseconds):
    launches = Timing(number, 1, milliseconds).launches(estimate, calls)
    assert launches >= calls and launches % calls == 0
    wanted = max(number, milliseconds * 1e-3 / estimate)
    assert abs(launches - min(wanted, 2000)) <= calls


def test_calls_take_turns_and_every_measurement_is_returned():
    seen = []
    calls = [lambda index=index: seen.append(index) or time.sleep(1e-3) for index in range(3)]
    seconds = time_calls(calls, Timing(number=6, repeat=4, min_repeat_ms=0))
    assert len(seconds) == 4 and all(1e-3 <= value < 20e-3 for value in seconds)
    assert seen[:9] == [0, 1, 2] * 3 and len(seen) == 3 + 4 * 6


def test_a_longer_call_takes_longer():
    short, long = (time_calls([lambda s=s: time.sleep(s)], Timing(2, 3, 0)) for s in (1e-3, 4e-3))
    assert 2 * min(short) < min(long)


@pytest.mark.gpu
def test_graph_replays_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sizes = {n: [torch.zeros(n, device="cuda") for _ in range(2)] for n in (1 << 20, 1 << 26)}
    timing = Timing(5, 3, 1)
    seconds = {n: time_calls([lambda x=x: x.add_(1) for x in pair], timing, torch) for n, pair in sizes.items()}
    assert min(seconds[1 << 26]) > 5 * min(seconds[1 << 20])
    assert 0.3e12 < (1 << 26) * 8 / min(seconds[1 << 26]) < 10e12
