"""Processes killed without warning while they write: what is under a final name is always whole."""

from __future__ import annotations

import os
import random
import re
import signal
import time
import warnings

import numpy as np
import pytest

from rotquant_tvm import compile_cache
from rotquant_tvm.compile_cache import CompileCache
from rotquant_tvm.runtime import read_artifact

from ..sampling import sampled
from .processes import forked, kill_after, started
from .small_files import artifact, save, saved_version

KILLS = sampled([6, 300], [6])


def wait_for(path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_writers(write, folder, kills: int, longest: float) -> int:
    """Fork ``kills`` writers of one version after the other, kill each so many seconds after its first at the latest.

    Returns how many left something behind.
    """
    moments, left = random.Random(kills), 0
    for kill in range(kills):
        ready = folder.parent / f"ready{kill}"
        ready.unlink(missing_ok=True)  # of an earlier call

        def go_on(first=1000 * kill, ready=ready):
            for version in range(first, first + 1000):
                write(version)
                ready.touch()

        before = {entry for entry in os.listdir(folder) if entry.startswith(".")}
        process = forked(go_on)
        wait_for(ready)
        assert kill_after(process, moments.uniform(0, longest)) == -signal.SIGKILL
        left += bool({entry for entry in os.listdir(folder) if entry.startswith(".")} - before)
    return left


@pytest.mark.parametrize("kills", KILLS)
def test_an_artifact_is_whole_and_the_next_writer_tidies_up(tmp_path, kills):
    folder = tmp_path / "artifacts"
    final = folder / "model.rq"
    artifact(final, 0)

    def write(version):
        artifact(final, version)

    def check():
        stored = read_artifact(final)
        [(_, weights)] = stored.weights()
        assert np.unique(weights).tolist() == [stored.manifest.report["version"]]
        return stored.manifest.report["version"]

    left = 0
    for _ in range(3):
        left += kill_writers(write, folder, kills // 3, 0.05)
        check()
        assert len(os.listdir(folder)) <= 2  # what one killed process left, the next one removed
    assert (left or kills < 100) and check() > 0
    write(7)
    assert os.listdir(folder) == ["model.rq"] and check() == 7


@pytest.mark.parametrize("kills", KILLS)
def test_a_saved_session_is_whole_and_the_next_writer_tidies_up(tmp_path, kills):
    folder = tmp_path / "sessions"
    folder.mkdir()
    final = folder / "prefix.kv"
    save(final, 4096, 0)
    left = 0
    for _ in range(3):
        left += kill_writers(lambda version: save(final, 4096, version), folder, kills // 3, 0.03)
        saved_version(final)
        assert len(os.listdir(folder)) <= 2
    assert (left or kills < 100) and saved_version(final) > 0
    save(final, 32, 7)
    assert os.listdir(folder) == ["prefix.kv"] and saved_version(final) == 7


@pytest.mark.parametrize("kills", KILLS)
def test_the_compile_cache_is_whole_and_no_lock_blocks(tmp_path, kills, monkeypatch):
    monkeypatch.setattr(compile_cache, "_environment", lambda: [])
    folder = tmp_path / "cache"
    folder.mkdir()
    cache = CompileCache(folder, keep=1000)

    def write(version):
        cache.entry((version % 5,), lambda: lambda path: artifact(path, version % 5))
        for path in folder.glob("[0-9a-f]*"):  # so that there is something to compile again
            (path / "model.so").write_bytes(b"damaged")

    def check():
        for number in range(5):
            stored = read_artifact(cache.entry((number,), lambda n=number: lambda path: artifact(path, n)).path)
            assert stored.manifest.report["version"] == number

    with warnings.catch_warnings():  # of damage
        warnings.simplefilter("ignore")
        check()
        left = kill_writers(write, folder, kills, 0.1)
        check()
    assert left or kills < 100
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in os.listdir(folder))


COMPILE = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests/passes")
import tiny_model
from rotquant_tvm import compile, compile_cache
from rotquant_tvm.compile_cache import CompileCache
from rotquant_tvm.frontend import ImportedModel

compile_cache._environment = lambda: []  # whatever someone edits meanwhile

def make():
    print("compiling", flush=True)
    model = tiny_model.TinyModel(layers=1)
    config = {"model_type": "tiny", "vocab_size": tiny_model.VOCAB, "max_position": 256}
    config["layers"] = [(model.kv_heads, model.heads, model.head_dim)]
    names = [f"w{i}" for i in range(len(model.weights))]
    compiled = compile(ImportedModel(model.module(), model.weights, names, config), "f16")
    print("saving", flush=True)
    return compiled.save

print(CompileCache(Path(sys.argv[1])).entry(("tiny",), make).path, flush=True)
"""


@pytest.mark.full
def test_a_real_compile_killed_at_many_moments(tmp_path):
    """The last moments fall into code generation and the linker; the compile after them finds nothing in its way."""
    moments, at = random.Random(1), []
    for kill in range(12):
        process = started(COMPILE, tmp_path / "cache")
        assert process.stdout.readline() == "compiling\n"
        if kill % 2:
            assert process.stdout.readline() == "saving\n"
        time.sleep(moments.uniform(0, 0.5 if kill % 2 else 4))
        process.kill()
        at.append((process.stdout.read() or "compiling").split()[-1])
        process.wait()
        for entry in (tmp_path / "cache").glob("[0-9a-f]*"):
            read_artifact(entry)
    process = started(COMPILE, tmp_path / "cache")
    path = process.communicate(timeout=300)[0].split()[-1]
    assert process.returncode == 0 and read_artifact(path).manifest.target
    assert os.listdir(tmp_path / "cache") == [os.path.basename(path)], at
