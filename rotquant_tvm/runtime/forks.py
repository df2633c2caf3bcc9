"""Kernels in forked processes: the threads that share their work are not copied by a fork."""

from __future__ import annotations

import os
import threading

import tvm_ffi

from rotquant_tvm.errors import UsageError

_first = threading.local()  # the process in which this thread ran its first kernel


def check_fork() -> None:
    """Note that this thread runs kernels; raises UsageError where it did so before the process was forked.

    TVM's worker threads belong to the thread that uses them. In a fork that thread is there and its workers are not,
    and it would wait for them forever. With one thread (``TVM_NUM_THREADS=1``) there are no workers.
    """
    process = getattr(_first, "process", None)
    if process is None:
        _first.process = os.getpid()
    elif process != os.getpid() and tvm_ffi.get_global_func("runtime.NumThreads")() > 1:
        raise UsageError(
            "this process was forked from a thread that had run kernels, whose worker threads a fork does not have; "
            "start processes anew (multiprocessing's 'spawn'), fork before the first call, or set TVM_NUM_THREADS=1"
        )
