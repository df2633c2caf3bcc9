"""The CUDA compiler that is there is taken; where there is none, the error says what to install."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from rotquant_tvm import cuda_compiler
from rotquant_tvm.cuda_compiler import COMPILERS, compiling_here
from rotquant_tvm.errors import DeviceError
from rotquant_tvm.target import resolve_target

MODE = "TVM_CUDA_COMPILE_MODE"
CUDA = resolve_target("cuda -arch=sm_90a")


@pytest.fixture
def machine(monkeypatch):
    """Make this a machine with a GPU or without, with nvcc or without, …"""

    def make(mode="", nvcc=False, bindings=False, gpu=True):
        monkeypatch.setenv(MODE, mode)
        monkeypatch.delenv(cuda_compiler.KEEP_SOURCE, raising=False)
        monkeypatch.setattr(cuda_compiler.tvm, "cuda", lambda index: SimpleNamespace(exist=gpu))
        monkeypatch.setattr(cuda_compiler.shutil, "which", lambda name: name if nvcc else None)
        monkeypatch.setattr(cuda_compiler.importlib.util, "find_spec", lambda name: object() if bindings else None)

    return make


@pytest.mark.parametrize(
    ("mode", "nvcc", "bindings", "expected", "here"),
    [
        ("", True, True, "nvcc", "nvrtc"),
        ("", False, True, "nvrtc", "nvrtc"),
        ("", True, False, "nvcc", "nvcc"),
        ("nvcc", True, True, "nvcc", "nvcc"),
        ("nvrtc", True, True, "nvrtc", "nvrtc"),
        ("clang", True, False, "nvcc", "nvcc"),
    ],
)
def test_the_compiler_that_is_there_is_taken(machine, mode, nvcc, bindings, expected, here):
    machine(mode, nvcc, bindings)
    assert cuda_compiler.cuda_compiler() == expected
    with compiling_here(CUDA):
        assert os.environ[MODE] == here
    assert os.environ[MODE] == mode


@pytest.mark.parametrize(
    ("mode", "nvcc", "bindings", "said"),
    [
        ("", False, False, "neither nvcc on the PATH nor the package cuda-bindings"),
        ("nvcc", False, True, "TVM_CUDA_COMPILE_MODE is nvcc and no nvcc is on the PATH"),
        ("nvrtc", True, False, "TVM_CUDA_COMPILE_MODE is nvrtc and the package cuda-bindings is not installed"),
    ],
)
def test_without_a_compiler_the_error_says_what_to_install(machine, mode, nvcc, bindings, said):
    machine(mode, nvcc, bindings)
    remedy = r"put the nvcc .* on the PATH, or .* pip install 'cuda-bindings\[all\]'"
    with pytest.raises(DeviceError, match=f"{said}.*; {remedy}"):
        with compiling_here(CUDA):
            pytest.fail("entered")
    assert os.environ[MODE] == mode


def test_no_compiler_is_asked_for_where_the_source_is_kept(machine, monkeypatch):
    machine(gpu=False)
    with compiling_here(CUDA):
        assert os.environ[MODE] == ""
    machine()
    with compiling_here(resolve_target("llvm")):
        pass
    monkeypatch.setenv(cuda_compiler.KEEP_SOURCE, "1")
    with compiling_here(CUDA):
        pass


REFUSED = r"cannot compile the kernels for sm_90a: x.cu\(3\): error: no$"


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("code\nCompilation error:\nx.cu(3): error: no\nmore", REFUSED),
        ("NVRTC compilation failed:\nx.cu(3): error: no\nmore", REFUSED),
        ('Failure finding "libnvrtc.so.13"', r"is not there, .* pip install 'cuda-bindings\[all\]'"),
        ("Cannot find CUDA path", "needs CUDA's headers: Cannot find CUDA path; .*set CUDA_PATH"),
        ("Cannot find CUDA headers in /x. Searched in: [].", "needs CUDA's headers: .* in /x. .*set CUDA_PATH"),
    ],
)
def test_what_a_compiler_says_is_one_line(machine, compiler, text, said):
    machine(compiler, nvcc=True, bindings=True)
    with pytest.raises(DeviceError, match=f"^{compiler} {said}"), compiling_here(CUDA):
        raise RuntimeError(text)
    assert os.environ[MODE] == compiler


def test_errors_of_something_else_stay_what_they_are(machine):
    machine(nvcc=True)
    with pytest.raises(RuntimeError, match="a pass is wrong"), compiling_here(CUDA):
        raise RuntimeError("a pass is wrong")
    assert os.environ[MODE] == ""
