"""The compiler that links compiled libraries: which one is taken, and what happens without any."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from rotquant_tvm import linker
from rotquant_tvm.errors import DeviceError

# Compiles an exponential by TVM, saves it, loads it and runs it; argument: the library's path
SAVE_AND_LOAD = """
import sys
import numpy as np
import tvm
from tvm import relax
from rotquant_tvm.linker import export_library, linker_command

builder = relax.BlockBuilder()
x = relax.Var("x", relax.TensorType((4,), "float32"))
with builder.function("main", [x]):
    builder.emit_func_output(builder.emit(relax.op.exp(x)))
export_library(tvm.compile(builder.get(), "llvm"), sys.argv[1])
machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
x = np.arange(4, dtype="float32")
np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), np.exp(x), rtol=1e-5)
print(linker_command()[1:])
"""


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without compilers and without ziglang; returns the only folder on its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda _name: None)
    return folder


def program(folder, name, script="exit 0"):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_any_compiler_the_error_names_the_remedy(bare, tmp_path):
    for attempt in (linker.linker_command, lambda: linker.link_shared(str(tmp_path / "a.so"), [])):
        with pytest.raises(DeviceError, match=r"install g\+\+ or clang, or pip install ziglang"):
            attempt()


def test_the_order_of_preference(bare, monkeypatch):
    monkeypatch.setattr(linker.importlib.util, "find_spec", lambda name: name)
    assert linker.linker_command() == [sys.executable, "-m", "ziglang", "cc"]
    for name in ("clang", "g++"):
        program(bare, name)
        assert linker.linker_command() == [name]
    wrapper = program(bare, "wrapper")
    monkeypatch.setenv("CXX", f"{wrapper} g++")
    assert linker.linker_command() == [wrapper, "g++"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert linker.linker_command() == ["g++"]


def test_a_failing_linker_is_a_device_error_with_its_words(bare, tmp_path):
    program(bare, "g++", "echo cannot find -lm; exit 1")
    with pytest.raises(DeviceError, match=r"g\+\+ cannot link.*cannot find -lm"):
        linker.link_shared(str(tmp_path / "a.so"), ["a.o"])


def _save_and_load(tmp_path, path_variable):
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment["PATH"] = path_variable
    command = [sys.executable, "-c", SAVE_AND_LOAD, str(tmp_path / "library.so")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the package ziglang is not installed")
def test_ziglang_links_where_there_is_no_compiler(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "ziglang" in _save_and_load(tmp_path, str(tmp_path / "empty"))


def test_the_systems_compiler_links(tmp_path):
    try:
        linker.linker_command()
    except DeviceError as error:
        pytest.skip(str(error))
    _save_and_load(tmp_path, os.environ["PATH"])
