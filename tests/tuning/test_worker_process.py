"""Workers: what goes wrong in them is an error here, and nobody waits for one that was ended."""

from __future__ import annotations

import os
import threading
import time

import pytest

from rotquant_tvm.errors import DeviceError
from rotquant_tvm.tuning.worker_process import WorkerPool, WorkerProcess, last_line

pytestmark = pytest.mark.slow  # every process loads TVM


@pytest.fixture
def worker():
    process = WorkerProcess()
    yield process
    process.close()


def test_results_errors_and_crashes(worker):
    first = worker.call(60, os.getpid)
    assert first != os.getpid() and worker.call(60, os.getpid) == first and worker.alive
    with pytest.raises(DeviceError, match="invalid literal"):
        worker.call(60, int, "x")
    assert not worker.alive  # it may have been the device
    second = worker.call(60, os.getpid)
    assert second not in (first, os.getpid())
    with pytest.raises(DeviceError):
        worker.call(60, os._exit, 1)
    assert worker.call(60, os.getpid) not in (first, second)


def _refuse():
    raise DeviceError("wrong result: out")


def test_a_device_error_leaves_the_process(worker):
    first = worker.call(60, os.getpid)
    with pytest.raises(DeviceError, match=r"^wrong result: out$"):
        worker.call(60, _refuse)
    assert worker.call(60, os.getpid) == first


def test_what_takes_too_long_is_ended(worker):
    worker.call(60, os.getpid)
    since = time.perf_counter()
    with pytest.raises(DeviceError, match=r"more than 0\.5 s"):
        worker.call(0.5, time.sleep, 60)
    assert time.perf_counter() - since < 10 and worker.call(60, abs, -1) == 1


def test_closing_frees_whoever_waits():
    worker = WorkerProcess()
    worker.call(60, os.getpid)
    caught = []

    def wait():
        try:
            worker.call(600, time.sleep, 600)
        except DeviceError as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    worker.close()
    thread.join(10)
    assert caught == ["it was interrupted"]
    with pytest.raises(DeviceError, match="interrupted"):
        worker.call(60, abs, 1)


def test_a_pool_shares_jobs_and_drops_what_has_not_begun():
    pool = WorkerPool(2)
    try:
        assert [job.result() for job in [pool.submit(60, abs, -n) for n in range(6)]] == list(range(6))
        slow = [pool.submit(600, time.sleep, 600) for _ in range(5)]
        time.sleep(0.3)
        since = time.perf_counter()
    finally:
        pool.close()
    assert time.perf_counter() - since < 10
    assert all(job.cancelled() or isinstance(job.exception(), DeviceError) for job in slow)


def test_the_last_line_of_an_error():
    text = "Traceback (most recent call last):\n  x\nrotquant_tvm.errors.DeviceError: wrong result: out"
    assert last_line(text) == "wrong result: out"
    assert last_line(RuntimeError()) == "RuntimeError"
