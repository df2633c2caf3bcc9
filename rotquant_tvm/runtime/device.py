"""Devices by name, and what a device raises as errors of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import tvm
from tvm.base import _LOADED_LIBS
from tvm.runtime import Device
from tvm_ffi.libinfo import load_lib_ctypes

from rotquant_tvm.errors import DeviceError, RotQuantError, UsageError

_CUDA_RUNTIME = "tvm_runtime_cuda"


def parse_device(name: str) -> Device:
    """Return the device called ``name`` (``cpu``, ``cuda``, ``cuda:1`` …).

    Raises UsageError for a name that is none, DeviceError for a device that this machine does not have.
    """
    unknown = f"unknown device {name!r}; use cpu, cuda or cuda:1"
    if not isinstance(name, str) or not re.fullmatch(r"[a-z]+(:\d+)?", name):
        raise UsageError(unknown)
    try:
        device: Device = tvm.device(name)
    except ValueError as error:
        raise UsageError(unknown) from error
    problem = _load_cuda_runtime() if device.type == "cuda" else ""
    if not device.exist:
        why = f" ({problem})" if problem else ""
        raise DeviceError(f"device {name} is not available here{why}; check its driver, or use another device")
    return device


def _load_cuda_runtime() -> str:
    """Load TVM's CUDA runtime, which ``TVM_USE_RUNTIME_LIB=1`` leaves out; return what went wrong, or nothing."""
    if _CUDA_RUNTIME in _LOADED_LIBS:
        return ""
    try:
        paths = tvm.libinfo.package_lib_paths()
        _LOADED_LIBS[_CUDA_RUNTIME] = load_lib_ctypes("tvm", _CUDA_RUNTIME, "RTLD_LOCAL", extra_lib_paths=paths)
    except (OSError, RuntimeError) as error:
        return reason(error)
    return ""


@contextmanager
def device_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the device's runtime raises into a DeviceError: what failed, its reason, the remedy."""
    try:
        yield
    except RotQuantError:
        raise
    except Exception as error:
        raise DeviceError(f"{what}: {reason(error)}; {remedy}") from error
    finally:
        forget_cuda_error()


def forget_cuda_error() -> None:
    """Take the error of a call that CUDA refused out of its runtime.

    It would stay there for whoever asks next: torch in the same process would find an allocation of its own refused.
    An error that was there before goes too.
    """
    with suppress(KeyError, AttributeError):  # without CUDA; a stand-in for its library
        _LOADED_LIBS[_CUDA_RUNTIME].cudaGetLastError()


def reason(error: Exception) -> str:
    """Return the last line of an error's message; TVM puts its own context before it."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
