"""What is free: the least of the system's memory, the process's limits and its control groups'."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from rotquant_tvm.errors import DeviceError
from rotquant_tvm.runtime import free_memory
from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.free_memory import check_room, free_bytes, largest, size_text


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_largest_that_fits(limit, most):
    assert largest(lambda number: number <= limit, most) == min(limit, most)


def test_sizes_in_words():
    sizes = (0, 1023, 1536, 13_851_000_000, 3 << 40)
    assert [size_text(size) for size in sizes] == ["0 bytes", "1023 bytes", "1.5 KiB", "12.9 GiB", "3.0 TiB"]


def test_the_system_tells():
    free = free_memory._system()
    assert 1 << 20 < free < 1 << 50
    assert 0 < free_bytes(tvm.cpu()) <= free * 1.5  # others allocate and free meanwhile


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_the_processs_own_limit_counts(kind, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (1 << 45, -1) if asked == kind else (-1, -1))
    assert 0 < (1 << 45) - free_memory._process() < 1 << 43
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (1 << 20, -1) if asked == kind else (-1, -1))
    assert free_bytes(tvm.cpu()) == 0
    monkeypatch.setattr(resource, "getrlimit", lambda _asked: (-1, -1))
    assert free_memory._process() is None


@pytest.mark.parametrize(
    ("controllers", "limit", "used", "files"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, controllers, limit, used, files):
    """Its own group's or that of one around it; what files take there can be taken back."""
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path)
    text = free_memory.Path.read_text
    listing = f"3:cpu:/x\n2:{controllers}:/outer/inner\n"
    monkeypatch.setattr(
        free_memory.Path, "read_text", lambda self: listing if str(self) == "/proc/self/cgroup" else text(self)
    )
    assert free_memory._group() is None
    outer = tmp_path / controllers / "outer"
    (outer / "inner").mkdir(parents=True)
    (outer / limit).write_text("1000000\n")
    (outer / used).write_text("300000\n")
    (outer / "memory.stat").write_text(f"anon 5\n{files} 20000\n")
    assert free_memory._group() == 720_000
    (outer / "inner" / limit).write_text("max\n" if not controllers else f"{(1 << 63) - 4096}\n")
    assert free_memory._group() == 720_000
    (outer / "inner" / limit).write_text("500000\n")
    (outer / "inner" / used).write_text("400000\n")
    (outer / "inner" / "memory.stat").write_text("")
    assert free_memory._group() == 100_000


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    lengths = tvm.runtime.tensor(np.array([9, 4], np.int32))
    cache = CacheArrays([tvm.runtime.tensor(np.zeros((2, 1, 1, 1024), np.uint32)), lengths], tvm.cpu())
    monkeypatch.setattr(free_memory, "free_bytes", lambda _device: 9000)
    cache.copy()
    with pytest.raises(DeviceError, match=r"cannot reorder the KV cache: 16.0 KiB are needed and 8.8 KiB are free; .*"):
        cache.gather([0, 1, 0, 1])
    monkeypatch.setattr(free_memory, "free_bytes", lambda _device: None)
    assert cache.gather([0, 1, 0, 1]).batch == 4
    check_room(tvm.cpu(), 1 << 60, "what", "remedy")
