"""CUDA graphs through the driver: launches recorded once and replayed as one.

The driver's library is loaded by name, so that nothing but TVM's runtime is needed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, cast

import tvm_ffi
from tvm.runtime import Device

from rotquant_tvm.errors import DeviceError

_RELAXED = 2
_NON_BLOCKING = 1
_Handle = ctypes.c_void_p


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"the CUDA driver's library cannot be loaded: {error}") from error


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise DeviceError(f"{name} failed: {(text.value or b'unknown error').decode()} ({code})")


class CUDAGraph:
    """What ``launch`` launched on ``device``, to be replayed.

    ``launch`` runs once, but its kernels do not: they are recorded. Whatever memory they use must stay where it is as
    long as the graph lives; memory that is allocated meanwhile is allocated for real. It must not wait for the device,
    and every kernel must have run before (the driver loads code at a first launch). Raises DeviceError if the driver
    cannot record it.
    """

    def __init__(self, device: Device, launch: Callable[[], object]) -> None:
        self.device = device
        self._executable = _Handle()
        device.sync()  # makes the device's context current in this thread
        stream, graph = _Handle(), _Handle()
        _call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        try:
            self._record(stream, graph, launch)
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        finally:
            if graph:
                _driver().cuGraphDestroy(graph)
            _driver().cuStreamDestroy_v2(stream)

    def _record(self, stream: _Handle, graph: _Handle, launch: Callable[[], object]) -> None:
        _call("cuStreamBeginCapture_v2", stream, _RELAXED)
        try:
            with tvm_ffi.use_raw_stream(self.device, cast(int, stream.value)):
                launch()
        except BaseException:
            _driver().cuStreamEndCapture(stream, ctypes.byref(graph))  # a broken recording; the first error counts
            raise
        _call("cuStreamEndCapture", stream, ctypes.byref(graph))

    def replay(self) -> None:
        """Launch everything again, on the current stream."""
        _call("cuGraphLaunch", self._executable, _Handle(tvm_ffi.get_raw_stream(self.device)))

    def __del__(self) -> None:
        if getattr(self, "_executable", None):
            _driver().cuGraphExecDestroy(self._executable)
