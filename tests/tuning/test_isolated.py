"""A function in a process that may crash."""

from __future__ import annotations

import os
import time

import pytest

from rotquant_tvm.errors import DeviceError
from rotquant_tvm.tuning.isolated import call_isolated


def _fail():
    raise ValueError("first\nlast line")


def test_results_and_errors():
    assert call_isolated(60, lambda *values: [*values, os.getpid()], 1, "x")[:2] == [1, "x"]
    assert call_isolated(60, os.getpid) != os.getpid()
    with pytest.raises(DeviceError, match=r"^last line$"):
        call_isolated(60, _fail)


@pytest.mark.parametrize("signal", [6, 9, 11])
def test_crashes(signal):
    with pytest.raises(DeviceError, match="crashed"):
        call_isolated(60, lambda: os.kill(os.getpid(), signal))
    with pytest.raises(ChildProcessError):  # nothing of it is left
        os.waitpid(-1, os.WNOHANG)


def test_what_takes_too_long_is_ended():
    since = time.perf_counter()
    with pytest.raises(DeviceError, match="too long"):
        call_isolated(0.2, time.sleep, 60)
    assert time.perf_counter() - since < 10


def test_results_without_end():
    with pytest.raises(DeviceError, match="too long"):
        call_isolated(60, lambda: "x" * (3 << 20))
