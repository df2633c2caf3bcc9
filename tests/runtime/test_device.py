"""Devices by name: what is loaded for them, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tvm

from rotquant_tvm.errors import DeviceError
from rotquant_tvm.runtime import device as device_module
from rotquant_tvm.runtime.device import device_errors, parse_device

without_gpu = pytest.mark.skipif(tvm.cuda().exist, reason="needs a machine without CUDA")


@without_gpu
def test_tvms_cuda_runtime_is_loaded_once(monkeypatch):
    """A process with TVM's runtime library alone has not loaded it."""
    loaded, asked = {"tvm_runtime": object()}, []

    def load(package, name, _mode, extra_lib_paths):
        asked.append((package, name, len(extra_lib_paths) > 0))
        return "library"

    monkeypatch.setattr(device_module, "_LOADED_LIBS", loaded)
    monkeypatch.setattr(device_module, "load_lib_ctypes", load)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"cuda is not available here; check its driver"):
            parse_device("cuda")
    assert asked == [("tvm", "tvm_runtime_cuda", True)] and loaded["tvm_runtime_cuda"] == "library"
    parse_device("cpu")
    assert len(asked) == 1


@without_gpu
def test_what_keeps_it_from_loading_is_said(monkeypatch):
    def load(*_arguments, **_options):
        raise OSError("context\nlibcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(device_module, "_LOADED_LIBS", {})
    monkeypatch.setattr(device_module, "load_lib_ctypes", load)
    with pytest.raises(DeviceError, match=r"cuda:1 is not available here \(libcuda\.so\.1: cannot open .*\); check"):
        parse_device("cuda:1")


def test_no_error_of_cuda_is_left_for_others(monkeypatch):
    """Torch would take it for one of its own."""
    pending = [2]
    library = SimpleNamespace(cudaGetLastError=lambda: pending.clear())
    monkeypatch.setattr(device_module, "_LOADED_LIBS", {"tvm_runtime_cuda": library})
    with pytest.raises(DeviceError, match="it failed: out of memory; wait"), device_errors("it failed", "wait"):
        raise RuntimeError("context\nout of memory")
    assert not pending
    pending.append(2)
    with device_errors("it failed", "wait"):  # TVM's pool was refused memory, emptied itself and was given it
        pass
    assert not pending
    for others in ({}, {"tvm_runtime_cuda": object()}):
        monkeypatch.setattr(device_module, "_LOADED_LIBS", others)
        device_module.forget_cuda_error()


@pytest.mark.gpu
def test_torch_allocates_after_we_were_refused():
    torch = pytest.importorskip("torch")
    if not tvm.cuda().exist:
        pytest.skip("there is no GPU")
    torch.zeros(1, device="cuda")
    with pytest.raises(DeviceError, match="out of memory"), device_errors("it failed", "wait"):
        tvm.runtime.empty((1 << 50,), "uint8", tvm.cuda())
    assert torch.ones(8, device="cuda").sum().item() == 8


@pytest.mark.gpu
def test_the_runtime_library_alone_sees_the_gpu():
    if not tvm.cuda().exist:
        pytest.skip("there is no GPU")
    script = (
        "import os; os.environ['TVM_USE_RUNTIME_LIB'] = '1'\n"
        "from rotquant_tvm.runtime.device import parse_device\n"
        "import tvm; print(parse_device('cuda').compute_version, 'tvm_compiler' in tvm.base._LOADED_LIBS)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tvm.cuda().compute_version), "False"]
