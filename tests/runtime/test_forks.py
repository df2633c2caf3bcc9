"""A fork of a thread that ran kernels is refused rather than left waiting for workers that it has not."""

from __future__ import annotations

import os
import threading

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.runtime import forks


def in_fork(check) -> int:
    """Run ``check`` in a fork; 0 if it returned."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        check()
        os._exit(0)
    except UsageError as error:
        os._exit(10 if "'spawn'" in str(error) else 11)
    except BaseException:
        os._exit(12)


@pytest.mark.parametrize(("workers", "status"), [(1, 0), (2, 10)])
def test_a_fork_of_a_thread_that_ran_kernels(monkeypatch, workers, status):
    monkeypatch.setattr(forks.tvm_ffi, "get_global_func", lambda _name: lambda: workers)
    monkeypatch.setattr(forks, "_first", threading.local())
    assert in_fork(forks.check_fork) == 0  # nothing had run
    forks.check_fork()
    forks.check_fork()
    assert in_fork(forks.check_fork) == status

    def in_a_thread():
        done = []
        thread = threading.Thread(target=lambda: done.append(forks.check_fork()))
        thread.start()
        thread.join()
        assert done == [None]

    assert in_fork(in_a_thread) == 0  # which has workers of its own
