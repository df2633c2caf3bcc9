"""Caches that do not fit: bytes asked, bytes free, and a capacity that does fit."""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import tvm

from rotquant_tvm.errors import DeviceError
from rotquant_tvm.runtime import cache_allocation
from rotquant_tvm.runtime.cache_allocation import allocated_copy
from rotquant_tvm.runtime.free_memory import usable

from ..reliability.processes import started


@pytest.mark.parametrize("free", [0, 100, 4000, 15_000])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_capacity_that_is_told_fits(library, monkeypatch, free, batch):
    """And one tile more would not."""
    monkeypatch.setattr(cache_allocation, "free_bytes", lambda _device: free)
    with pytest.raises(DeviceError) as error:
        library.session(batch=batch, capacity=4096)
    said = re.search(r"capacity (\d+) would fit", str(error.value))
    if said is None:
        assert library.info.cache_bytes(batch, 1) > usable(free) and "use a smaller batch" in str(error.value)
    else:
        fitting = int(said[1])
        assert library.info.cache_bytes(batch, fitting) <= usable(free) < library.info.cache_bytes(batch, fitting + 32)


def test_what_does_not_fit_is_not_allocated(library, monkeypatch):
    monkeypatch.setattr(cache_allocation, "free_bytes", lambda _device: 20_000)
    monkeypatch.setattr(cache_allocation, "_create", lambda *_: pytest.fail("allocated"))
    with pytest.raises(DeviceError, match=r"batch 2 x capacity 4096 takes 40.0 KiB and 19.5 KiB are free: .* 1888 "):
        library.session(batch=2, capacity=4096)


def test_a_device_that_refuses_is_asked_once_more_without_pools(library, monkeypatch):
    calls, create = [], cache_allocation._create

    def fail(times):
        def attempt(*arguments):
            calls.append(arguments)
            if len(calls) <= times:
                raise RuntimeError("context\nout of memory")
            return create(*arguments)

        calls.clear()
        return attempt

    monkeypatch.setattr(cache_allocation, "_create", fail(1))
    assert library.session(capacity=64).batch == 1 and len(calls) == 2
    monkeypatch.setattr(cache_allocation, "_create", fail(2))
    monkeypatch.setattr(cache_allocation, "free_bytes", lambda _device: 1 << 40)
    with pytest.raises(DeviceError, match=r"are free \(out of memory\); use a smaller capacity or batch"):
        library.session(capacity=64)
    monkeypatch.setattr(cache_allocation, "_create", fail(2))
    monkeypatch.setattr(cache_allocation, "free_bytes", lambda _device: None)
    with pytest.raises(DeviceError, match=r"takes 320 bytes \(out of memory\); use a smaller capacity or batch"):
        library.session(capacity=64)


def test_a_copy_that_a_gpu_refuses_names_the_bytes(monkeypatch):
    """Those that are free are counted when what the failed copy had allocated is free again."""
    held: list[weakref.ref] = []

    def make(refusals):
        array = np.zeros(1)
        held.append(weakref.ref(array))
        if len(held) <= refusals:
            raise RuntimeError("context\nout of memory")
        return array

    def free(_device):
        assert all(array() is None for array in held)
        return 1 << 20

    monkeypatch.setattr(cache_allocation, "free_bytes", free)
    arguments = (tvm.cuda(0), 3 << 30, "cannot copy it", "use less")
    assert len(allocated_copy(*arguments, lambda: make(1))) == 1 and len(held) == 2
    held.clear()
    expected = r"^cannot copy it: 3.0 GiB are needed and 1.0 MiB are free \(out of memory\); use less$"
    with pytest.raises(DeviceError, match=expected):
        allocated_copy(*arguments, lambda: make(2))
    monkeypatch.setattr(cache_allocation, "free_bytes", lambda _device: None)
    with pytest.raises(DeviceError, match=r"it: 3.0 GiB are needed \(out of memory\); use less"):
        allocated_copy(*arguments, lambda: make(9))


MANY_SIZES = """
import gc, os, sys
from pathlib import Path
from rotquant_tvm.runtime import load_library

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

library = load_library(sys.argv[1])
for count in (1, 100, 200):
    library.session(batch=64, capacity=15 * count)
before = resident()
for count in range(1, 201):
    session = library.session(batch=64, capacity=15 * count)
    session.prefill([[1, 2]] * 64)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_caches_of_many_sizes_leave_nothing(artifact):
    """90 MB together, of which a pool would keep a block of each size; in a process where nothing else grows."""
    growth = started(MANY_SIZES, artifact, runtime_only=True).communicate(timeout=120)[0]
    assert int(growth) < 10 << 20
