"""Loading and unloading artifacts with real kernels, in one process and in several."""

from __future__ import annotations

import pytest

from rotquant_tvm.runtime import load

from .processes import started
from .tiny_sessions import POLICY, library, model, resources

pytestmark = pytest.mark.full


def test_a_hundred_loads_leave_nothing(tmp_path):
    path = tmp_path / "model.rq"
    model(POLICY).save(path)

    def cycle():
        session = load(path)
        session.prefill([1, 2, 3])
        session.decode([4])

    for _ in range(5):
        cycle()
    memory, files, threads = resources()
    for _ in range(100):
        cycle()
    after = resources()
    assert after[1:] == (files, threads) and after[0] < memory + 3


def test_another_library_at_the_same_place_is_another_one(tmp_path):
    """Though the first is still in use, and the system's loader knows it by that name."""
    path = tmp_path / "model.rq"
    model(POLICY).save(path)
    first = load(path)
    expected = first.generate([1, 2, 3], 20).ids
    model("f16").save(path)
    second = load(path)
    assert second.info.layers[0].k == "f16" and second.kv_bytes() != first.kv_bytes()
    assert second.generate([1, 2, 3], 20).ids == library("f16").session().generate([1, 2, 3], 20).ids
    assert first.generate([1, 2, 3], 20).ids == expected


GENERATE = """
import sys
from rotquant_tvm.runtime import load
print(*load(sys.argv[1]).generate([1, 2, 3], 60).ids)
"""


def test_processes_share_an_artifact(tmp_path):
    model(POLICY).save(tmp_path / "model.rq")
    processes = [started(GENERATE, tmp_path / "model.rq", runtime_only=True) for _ in range(3)]
    said = [process.communicate(timeout=100)[0].split() for process in processes]
    expected = [str(token) for token in library().session().generate([1, 2, 3], 60).ids]
    assert said == [expected] * 3
