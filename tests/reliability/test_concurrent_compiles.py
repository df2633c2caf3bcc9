"""Several processes that want the same entry of a compile cache at once: one compiles, all get the result."""

from __future__ import annotations

import os
import signal
import time

import pytest

from rotquant_tvm import compile_cache
from rotquant_tvm.compile_cache import CompileCache
from rotquant_tvm.process_locks import locked_file
from rotquant_tvm.runtime import read_artifact

from ..sampling import sampled
from .processes import forked, kill_after, started, status_of
from .small_files import artifact
from .test_killed import COMPILE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_environment", lambda: [])
    return CompileCache(tmp_path / "cache")


CASES = [(count, damaged) for count in (2, 3, 6) for damaged in (False, True)]


@pytest.mark.parametrize("case", sampled(CASES, [(2, True), (3, False)]))
def test_one_compiles_and_the_others_wait(cache, tmp_path, case):
    count, damaged = case
    log = tmp_path / "log"
    if damaged:
        path = cache.entry(("model",), lambda: lambda path: artifact(path, 0)).path
        (path / "model.so").write_bytes(b"damaged")

    def note(what):
        with log.open("a") as file:  # one write, which is appended whole
            file.write(f"{what}\n")

    def make():
        note("compile")
        time.sleep(0.1)
        return lambda path: artifact(path, 5)

    def run():
        entry = cache.entry(("model",), make, lambda stage: note(stage.split(":")[0]))
        assert read_artifact(entry.path).manifest.report["version"] == 5
        note(f"found {entry.found}")

    processes = [forked(run) for _ in range(count)]
    assert [status_of(process) for process in processes] == [0] * count
    said = log.read_text().splitlines()
    assert said.count("compile") == said.count("found False") == 1 and said.count("found True") == count - 1
    assert said.count("an entry of the compile cache is damaged and is made again") == int(damaged)
    assert set(said) - {"compile", "found False", "found True", "wait for another process's compile"} == (
        {"an entry of the compile cache is damaged and is made again"} if damaged else set()
    )
    assert len(os.listdir(cache.folder)) == 1


def test_a_lock_of_a_dead_process_does_not_block(cache):
    """Neither the lock that it held nor the file that it left."""
    marker = cache.folder.parent / "compiling"

    def make_forever():
        marker.touch()
        time.sleep(600)

    process = forked(lambda: cache.entry(("model",), make_forever))
    while not marker.exists():
        time.sleep(0.001)
    (lock,) = cache.folder.glob(".*.lock")
    waited = []
    waiting = forked(lambda: _entry_tells(cache, marker.with_name("waits")))
    while not marker.with_name("waits").exists():
        time.sleep(0.001)
    assert kill_after(process, 0.02) == -signal.SIGKILL
    assert status_of(waiting) == 0 and not lock.exists()
    assert cache.entry(("model",), lambda: pytest.fail("compiled again"), waited.append).found and not waited


def _entry_tells(cache, marker):
    found = cache.entry(("model",), lambda: lambda path: artifact(path, 5), lambda _stage: marker.touch())
    assert not found.found


def test_entries_do_not_wait_for_each_other(cache):
    path = cache.entry(("a",), lambda: lambda path: artifact(path, 1)).path
    told = []
    with locked_file(path.with_name(f".{path.name}.lock"), lambda: pytest.fail("locked")):
        # one that is whole needs no lock
        assert cache.entry(("a",), lambda: pytest.fail("compiled again"), told.append).found
        assert not cache.entry(("b",), lambda: lambda path: artifact(path, 2), told.append).found
    assert told == []


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 3])
def test_real_compiles(tmp_path, count):
    processes = [started(COMPILE, tmp_path / "cache") for _ in range(count)]
    said = [process.communicate(timeout=500)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum("compiling" in words for words in said) == 1 and len({words[-1] for words in said}) == 1
    assert os.listdir(tmp_path / "cache") == [os.path.basename(said[0][-1])]
    read_artifact(said[0][-1])
