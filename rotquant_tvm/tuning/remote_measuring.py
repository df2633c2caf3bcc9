"""Measuring on another machine: TVM's RPC server there runs the library on arrays that are made here."""

from __future__ import annotations

import importlib.util
import socket
import time
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
_ANSWER_SECONDS = 10.0
"""For a tracker to answer; TVM's client waits a minute for one that is not there."""
_PAUSE_SECONDS = 1.0
"""After which a tracker knows that a server is gone."""
_SESSIONS = 2
"""That a candidate is tried in: a server may be gone, and another one there."""


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
            raise UsageError("RPC needs the package tornado: pip install 'rotquant-tvm[rpc]'")
        return cls(host, int(port), key, kind)

    def session(self) -> Any:
        """Ask the tracker for a server that is free, or wait for one. Raises DeviceError."""
        from tvm import rpc

        self.check()
        try:
            tracker = rpc.connect_tracker(self.host, self.port)
            return tracker.request(self.key, priority=_PRIORITY, session_timeout=_SESSION_SECONDS)
        except Exception as error:
            where = f"'{self.key}' at {self.host}:{self.port}"
            raise DeviceError(f"no session with {where}: {_line(error)}") from error

    def check(self) -> None:
        """Raise DeviceError unless the tracker is there and has a server of the key: it would wait for one for ever."""
        from tvm import rpc

        where = f"{self.host}:{self.port}"
        try:
            socket.create_connection((self.host, self.port), _ANSWER_SECONDS).close()
            servers = rpc.connect_tracker(self.host, self.port).summary()["server_info"]
            keys = sorted({str(server["key"]).removeprefix("server:") for server in servers})
        except Exception as error:
            raise DeviceError(f"no RPC tracker answers at {where}: {_line(error)}") from error
        if self.key not in keys:
            known = f"it has {', '.join(keys)}" if keys else "it has no server at all"
            raise DeviceError(f"the RPC tracker at {where} has no server of the key '{self.key}'; {known}")

    def lost(self) -> DeviceError | None:
        """Why there is no server any more, after a moment for it to come back; None if there is one."""
        found = None
        for _ in range(_SESSIONS):
            try:
                self.check()
            except DeviceError as error:
                found = error
                time.sleep(_PAUSE_SECONDS)
            else:
                return None
        return found

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
    """Time a candidate there; returns seconds per run.

    If a server is lost on the way, once more with another one, or the same one back again. Raises DeviceError.
    """
    for session in range(_SESSIONS):
        try:
            return _measured(remote, library, args_info, timing)
        except DeviceError:
            raise
        except Exception as error:  # RPC has one for whatever happens there
            if session + 1 == _SESSIONS:
                raise DeviceError(f"measuring at '{remote.key}': {_line(error)}") from error
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError


def _measured(remote: RemoteDevice, library: str, args_info: list[list[Any]], timing: Timing) -> list[float]:
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


def _line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _device_type(kind: str) -> str:
    return "cuda" if kind == "cuda" else "cpu"
