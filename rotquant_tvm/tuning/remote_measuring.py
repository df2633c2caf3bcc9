"""Measuring on another machine: TVM's RPC server there runs the library on arrays that are made here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from ..benchmark.device import Shape
from ..benchmark.host_device import HostDevice
from ..errors import DeviceError, UsageError
from ..target import host_target
from .kernel_builder import Candidate
from .kernel_timer import Timing
from .tuning_task import MAIN

_SESSION_SECONDS = 600
_PRIORITY = 1


@dataclass(frozen=True)
class RemoteDevice:
    """A device behind an RPC tracker: where the tracker listens, the key of the device's server, and its kind."""

    host: str
    port: int
    key: str
    kind: str

    @classmethod
    def parse(cls, tracker: str, key: str, kind: str) -> RemoteDevice:
        """Read ``host:port``; raises ``UsageError``, also if RPC lacks a package."""
        host, _, port = tracker.rpartition(":")
        if not host or not port.isdecimal() or not key:
            raise UsageError(f"cannot read the RPC tracker '{tracker}' with key '{key}'; write host:port and a key")
        if importlib.util.find_spec("tornado") is None:
            raise UsageError("RPC needs the package tornado: pip install tornado")
        return cls(host, int(port), key, kind)

    def session(self) -> Any:
        """Ask the tracker for a session. Raises DeviceError."""
        from tvm import rpc

        try:
            tracker = rpc.connect_tracker(self.host, self.port)
            return tracker.request(self.key, priority=_PRIORITY, session_timeout=_SESSION_SECONDS)
        except Exception as error:
            raise DeviceError(f"no session with '{self.key}' at {self.host}:{self.port}: {error}") from error

    def device_name(self) -> str:
        """What the remote GPU is called, or the remote CPU's kind."""
        device = self.session().device(_device_type(self.kind), 0)
        return str(device.device_name) if self.kind == "cuda" else "CPU"


class _RemoteArrays(HostDevice):
    """Arrays made here, for a device there."""

    def __init__(self, device: Any) -> None:
        super().__init__(host_target(), samples=1)
        self.remote = device

    def argument(self, array: Any) -> Any:
        """A copy of a native array there."""
        return tvm.runtime.tensor(array, self.remote)

    def empty(self, shape: Shape, dtype: str) -> Any:
        """An array there, of anything."""
        return tvm.runtime.empty(shape, dtype, self.remote)


def measure_remotely(remote: RemoteDevice, library: str, args_info: list[list[Any]], timing: Timing) -> list[float]:
    """Time a candidate there; returns seconds per run."""
    session = remote.session()
    device = session.device(_device_type(remote.kind), 0)
    session.upload(library)
    module = session.load_module(Path(library).name)
    candidate, arrays = Candidate.read(library, args_info), _RemoteArrays(device)
    arguments = candidate.arguments(candidate.measurement.arrays(arrays), arrays)
    evaluator = module.time_evaluator(
        MAIN, device, number=timing.number, repeat=timing.repeat, min_repeat_ms=int(timing.min_repeat_ms)
    )
    return [float(seconds) for seconds in evaluator(*arguments).results]


def _device_type(kind: str) -> str:
    return "cuda" if kind == "cuda" else "cpu"
