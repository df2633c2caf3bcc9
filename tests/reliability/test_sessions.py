"""Sessions over real kernels of several formats, a thousand of them one after the other, and too little memory.

``tests/test_policy_session.py`` runs the same checks over one library in every run of the tests.
"""

from __future__ import annotations

import re
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from rotquant_tvm.errors import DeviceError

from .processes import forked, status_of
from .session_checks import CHECKS, tokens
from .tiny_sessions import POLICY, library, resources

pytestmark = pytest.mark.full


@pytest.mark.parametrize("kv_cache", [POLICY, "f16", "hurwitz3"])
@pytest.mark.parametrize("check", CHECKS)
def test_sessions(kv_cache, check):
    CHECKS[check](library(kv_cache))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_thousand_sessions_leave_nothing(tmp_path):
    """Each of a size of its own, 0.1 to 3 MB: a pool that keeps a block of every size would keep most of it all."""
    path = tmp_path / "prefix.kv"

    def cycle(count):
        session = library().session(batch=1 + count % 3, capacity=128 + 8 * count)
        session.prefill([[1, 2, 3]] * session.batch)
        if count % 10 == 0:
            session.reorder([0, 0])
            session.fork().save(path)
            library().restore(path).decode([1, 2])
        session.decode([4] * session.batch)

    for count in range(0, 1000, 30):
        cycle(count)
    memory, files, threads = resources()
    for count in range(1000):
        cycle(count)
    after = resources()
    assert after[1:] == (files, threads) and after[0] < memory + 10, (memory, after)


def in_limited_fork(spare: int, check) -> None:
    """Run ``check`` in a process that may take ``spare`` bytes more than this one has.

    In a thread of its own: a fork has not the worker threads of the one that it is a copy of.
    """

    def limited():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
        done = []
        thread = threading.Thread(target=lambda: done.append(check()))
        thread.start()
        thread.join()
        assert done == [None]

    assert status_of(forked(limited)) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_cache_that_does_not_fit_names_one_that_does():
    made = library()  # compiled before the fork

    def check():
        with pytest.raises(DeviceError) as error:
            made.session(batch=4, capacity=1 << 20)
        said = str(error.value)
        expected = r"batch 4 x capacity 1048576 takes ([\d.]+) MiB and [\d.]+ MiB are free: capacity (\d+) would fit"
        found = re.search(expected, said)
        assert found and abs(float(found[1]) - made.info.cache_bytes(4, 1 << 20) / 2**20) < 0.1, said
        session = made.session(batch=4, capacity=int(found[2]))
        before = session.prefill(tokens(8, 4, 50))
        with pytest.raises(DeviceError, match=r"cannot copy the KV cache: .* MiB are needed and .* are free"):
            session.fork()
        with pytest.raises(DeviceError, match="cannot reorder the KV cache"):
            session.reorder([0, 1, 2, 3, 3])
        assert session.batch == 4 and session.lengths.tolist() == [50] * 4
        session.crop(49)
        np.testing.assert_array_equal(np.argmax(session.decode(tokens(8, 4, 50)[:, 49]), 1), np.argmax(before, 1))

    in_limited_fork(300 << 20, check)
