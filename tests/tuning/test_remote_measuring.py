"""Measuring behind an RPC tracker: a server of this machine stands for another."""

from __future__ import annotations

import socket
import time

import pytest

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.tuning.kernel_timer import Timing
from rotquant_tvm.tuning.log_check import log_problems
from rotquant_tvm.tuning.remote_measuring import RemoteDevice
from rotquant_tvm.tuning.tune import TuningOptions, tune


@pytest.mark.parametrize("address", ["9190 k", "host: k", "host:port k", ":9190 k", "host:1 "])
def test_addresses_that_cannot_be_read(address, monkeypatch):
    monkeypatch.setattr("rotquant_tvm.tuning.remote_measuring.importlib.util.find_spec", lambda _name: object())
    with pytest.raises(UsageError, match="host:port and a key"):
        RemoteDevice.parse(*address.split(" "), "llvm")


def test_an_address(monkeypatch):
    monkeypatch.setattr("rotquant_tvm.tuning.remote_measuring.importlib.util.find_spec", lambda _name: object())
    assert RemoteDevice.parse("::1:9190", "h100", "cuda") == RemoteDevice("::1", 9190, "h100", "cuda")


@pytest.fixture
def tracker():
    """A tracker with one server, key "cpu"."""
    pytest.importorskip("tornado", reason="RPC needs the package tornado")
    from tvm import rpc
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", port=9190, port_end=9290)
    server = rpc.Server("127.0.0.1", key="cpu", tracker_addr=("127.0.0.1", tracker.port))
    time.sleep(1)
    yield tracker
    server.terminate()
    tracker.terminate()


@pytest.mark.slow
def test_tuning_there(tracker, task, tmp_path):
    remote = RemoteDevice("127.0.0.1", tracker.port, "cpu", "llvm")
    options = TuningOptions(trials_per_task=2, parallel=1, timing=Timing(1, 2, 0), remote=remote)
    result = tune([task], tmp_path, options)
    (record,) = result.records
    assert result.failures == () and result.measured == 2 and record.share is None
    assert result.device.name == "a CPU at cpu" and log_problems(result.folder) == []


def test_where_nobody_listens(monkeypatch):
    pytest.importorskip("tornado", reason="RPC needs the package tornado")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("tvm.rpc.client.TrackerSession.request", lambda *_args, **_options: None)
    with pytest.raises(DeviceError, match=f"no session with 'k' at 127.0.0.1:{port}"):
        RemoteDevice("127.0.0.1", port, "k", "llvm").session()
