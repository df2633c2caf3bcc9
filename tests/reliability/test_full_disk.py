"""Writing where there is no more space: one line that says so, nothing half-written, the old version as it was.

The limit on a file's size (RLIMIT_FSIZE) stops any write at any byte, as a full disk does. ``full``: a file system of a
few hundred kilobytes, where the user may mount one.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest

from rotquant_tvm import compile_cache
from rotquant_tvm.compile_cache import CompileCache
from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.linker import export_library
from rotquant_tvm.runtime import read_artifact, write_artifact

from ..sampling import sampled
from .processes import forked, status_of
from .small_files import INFO, artifact, save, saved_version

LIMITS = sampled([0, 1, 100, 5_000, 13_000, 60_000, 300_000, 799_000], [100, 300_000])
NEEDS = r"cannot write .*{}: .* \(at least [\d,]+ bytes are needed and [\d,]+ are free\); free some space or choose"


def in_limited_fork(limit: int, check) -> None:
    """Run ``check`` in a process whose files end after ``limit`` bytes."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        check()

    assert status_of(forked(limited)) == 0


@contextmanager
def refused(name: str):
    with pytest.raises(UsageError) as error:
        yield
    assert re.search(NEEDS.format(name), str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("limit", LIMITS)
def test_an_artifact(tmp_path, limit):
    final = tmp_path / "model.rq"
    artifact(final, 1)

    def check():
        for path in (final, tmp_path / "new.rq"):
            with refused(path.name):
                artifact(path, 2)

    in_limited_fork(limit, check)
    assert os.listdir(tmp_path) == ["model.rq"]
    assert read_artifact(final).manifest.report["version"] == 1


@pytest.mark.parametrize("limit", LIMITS)
def test_a_saved_session(tmp_path, limit):
    final = tmp_path / "prefix.kv"
    save(final, 8192, 1)

    def check():
        for path in (final, tmp_path / "new.kv"):
            with refused(path.name):
                save(path, 8192, 2)

    in_limited_fork(limit, check)
    assert os.listdir(tmp_path) == ["prefix.kv"] and saved_version(final) == 1


@pytest.mark.parametrize("limit", [13_000])
def test_the_compile_cache(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(compile_cache, "_environment", lambda: [])
    cache = CompileCache(tmp_path)
    old = cache.entry(("old",), lambda: lambda path: artifact(path, 1)).path

    def check():
        with refused("[0-9a-f]{64}"):
            cache.entry(("new",), lambda: lambda path: artifact(path, 2))
        assert cache.entry(("old",), lambda: pytest.fail("compiled again")).found

    in_limited_fork(limit, check)
    assert os.listdir(tmp_path) == [old.name] and read_artifact(old).manifest.report["version"] == 1
    assert not cache.entry(("new",), lambda: lambda path: artifact(path, 2)).found  # space again


@pytest.fixture
def small_disk(tmp_path):
    """Makes file systems of so many KiB."""
    mounted = []

    def mount(kilobytes: int):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip("this user may not mount file systems")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.full
@pytest.mark.parametrize("kilobytes", [4, 12, 20, 60, 400, 700])
def test_on_a_disk_that_is_full(small_disk, kilobytes):
    disk = small_disk(kilobytes)
    for write, name in ((artifact, "model.rq"), (lambda path, version: save(path, 8192, version), "prefix.kv")):
        with refused(name):
            write(disk / name, 1)
        assert os.listdir(disk) == []


def test_a_linker_that_runs_out_of_space(tmp_path):
    """It can only say so in words."""

    def library(path):
        raise DeviceError("g++ cannot link (status 1): ld: final link failed: No space left on device")

    with refused("model.rq"):
        write_artifact(tmp_path / "model.rq", library, {"weight_0000": np.zeros(9)}, kv_cache_info=INFO, target="llvm")
    assert os.listdir(tmp_path) == []


@pytest.mark.full
def test_a_library_on_a_disk_that_is_full(small_disk):
    """Without room for object files nothing is begun: LLVM would end the process."""
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    with builder.function("main", [x := relax.Var("x", relax.TensorType([4], "float32"))]):
        builder.emit_func_output(builder.emit(relax.op.add(x, x)))
    executable = tvm.compile(builder.get(), "llvm")
    weights = {"weight_0000": np.zeros(25_000, np.float32)}
    for megabytes in (1, 8, 20):
        disk = small_disk(1024 * megabytes)

        def write(path=disk / "model.rq"):
            write_artifact(path, lambda p: export_library(executable, p), weights, kv_cache_info=INFO, target="llvm")

        if megabytes < 16:
            with refused("model.rq"):
                write()
            assert os.listdir(disk) == []
        else:
            write()
            assert read_artifact(disk / "model.rq").manifest.target == "llvm"
