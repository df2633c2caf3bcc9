"""Measuring behind an RPC tracker: servers of this machine stand for others."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import psutil
import pytest

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.tuning import remote_measuring
from rotquant_tvm.tuning.kernel_timer import Timing
from rotquant_tvm.tuning.log_check import log_problems
from rotquant_tvm.tuning.remote_measuring import RemoteDevice, measure_remotely
from rotquant_tvm.tuning.tune import TuningOptions, tune


@pytest.mark.parametrize("address", ["9190 k", "host: k", "host:port k", ":9190 k", "host:1 "])
def test_addresses_that_cannot_be_read(address, monkeypatch):
    monkeypatch.setattr("rotquant_tvm.tuning.remote_measuring.importlib.util.find_spec", lambda _name: object())
    with pytest.raises(UsageError, match="host:port and a key"):
        RemoteDevice.parse(*address.split(" "), "llvm")


def test_an_address(monkeypatch):
    monkeypatch.setattr("rotquant_tvm.tuning.remote_measuring.importlib.util.find_spec", lambda _name: object())
    assert RemoteDevice.parse("::1:9190", "h100", "cuda") == RemoteDevice("::1", 9190, "h100", "cuda")


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_lost_server_is_tried_again_once(failures, monkeypatch):
    calls = []

    def measured(*_):
        calls.append(1)
        if len(calls) <= failures:
            raise RuntimeError("Traceback\nRPCError: Error caught from RPC call: connection reset")
        return [1e-3]

    monkeypatch.setattr(remote_measuring, "_measured", measured)
    monkeypatch.setattr(remote_measuring, "_PAUSE_SECONDS", 0.0)
    remote = RemoteDevice("h", 1, "k", "llvm")
    if failures < 2:
        assert measure_remotely(remote, "kernel.tar", [], Timing()) == [1e-3] and len(calls) == 1 + failures
    else:
        with pytest.raises(DeviceError, match=r"measuring at 'k': .*connection reset"):
            measure_remotely(remote, "kernel.tar", [], Timing())
        assert len(calls) == 2


@pytest.mark.parametrize("failures", [0, 1, 5])
def test_a_server_may_take_a_moment_to_be_back(failures, monkeypatch):
    checks = []

    def check(remote):
        checks.append(1)
        if len(checks) <= failures:
            raise DeviceError("no server")

    monkeypatch.setattr(RemoteDevice, "check", check)
    monkeypatch.setattr(remote_measuring, "_PAUSE_SECONDS", 0.0)
    lost = RemoteDevice("h", 1, "k", "llvm").lost()
    assert (lost is None) == (failures < 2) and len(checks) == min(failures + 1, 2)


def test_where_nobody_listens():
    pytest.importorskip("tornado", reason="RPC needs the package tornado")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DeviceError, match=f"no RPC tracker answers at 127.0.0.1:{port}"):
        RemoteDevice("127.0.0.1", port, "k", "llvm").session()


def test_what_answers_is_no_tracker():
    """A server of something else: it says something, or closes the connection."""
    pytest.importorskip("tornado", reason="RPC needs the package tornado")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(DeviceError, match="no RPC tracker answers at"):
            RemoteDevice("127.0.0.1", server.getsockname()[1], "k", "llvm").check()


@pytest.fixture
def tracker():
    """A tracker, and a function that starts servers of the key "cpu" for it."""
    pytest.importorskip("tornado", reason="RPC needs the package tornado")
    from tvm import rpc
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", port=9190, port_end=9390, silent=True)
    servers = []

    def serve(count):
        address = ("127.0.0.1", tracker.port)
        servers.extend(rpc.Server("127.0.0.1", key="cpu", tracker_addr=address, silent=True) for _ in range(count))
        until = time.monotonic() + 60
        while len(rpc.connect_tracker(*address).summary()["server_info"]) < len(servers):
            assert time.monotonic() < until
            time.sleep(0.1)
        return servers

    tracker.serve = serve
    yield tracker
    for server in servers:
        server.terminate()
    tracker.terminate()


def remote_options(tracker, trials):
    remote = RemoteDevice("127.0.0.1", tracker.port, "cpu", "llvm")
    return TuningOptions(trials_per_task=trials, parallel=1, timing=Timing(1, 2, 0), remote=remote)


@pytest.mark.full
@pytest.mark.slow
def test_keys_that_no_server_has(tracker, task, tmp_path):
    with pytest.raises(DeviceError, match="has no server of the key 'cpu'; it has no server at all"):
        tune([task], tmp_path, remote_options(tracker, 2))
    tracker.serve(1)
    with pytest.raises(DeviceError, match="no server of the key 'gpu'; it has cpu"):
        RemoteDevice("127.0.0.1", tracker.port, "gpu", "llvm").check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.slow
def test_two_servers_and_the_death_of_one(tracker, task, tmp_path):
    """One is killed with all that it had started while the tuning goes on; the other one measures the rest."""
    servers = tracker.serve(2)

    def kill(step):
        if step.done != 2:
            return
        process = psutil.Process(servers[0].proc._proc.pid)
        for child in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    result = tune([task], tmp_path, remote_options(tracker, 6), kill)
    (record,) = result.records
    assert record.trials == 6 and result.measured + len(result.failures) == 6 and result.measured >= 5
    assert record.share is None  # what the machines could do is not known
    assert result.finished and result.device.name == "a CPU at cpu" and log_problems(result.folder) == []


@pytest.mark.full
@pytest.mark.slow
def test_the_death_of_the_only_server(tracker, task, tmp_path):
    """The tuning ends; with another server the same call measures the rest."""
    servers, options = tracker.serve(1), remote_options(tracker, 6)

    def kill(step):
        process = psutil.Process(servers[0].proc._proc.pid)
        for child in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    with pytest.raises(DeviceError, match=r"no server of the key 'cpu'.*the same command goes on"):
        tune([task], tmp_path, options, kill)
    servers.clear()
    tracker.serve(1)
    result = tune([task], tmp_path, options)
    assert result.finished and result.records[0].trials == 6 and result.failures == ()


@pytest.mark.full
@pytest.mark.slow
def test_a_server_that_dies_at_its_work(tracker, task, tmp_path, monkeypatch):
    """The one that is measuring: its candidate goes to the other."""
    servers = tracker.serve(2)
    processes = [psutil.Process(server.proc._proc.pid) for server in servers]
    ended = []

    def watch():
        until = time.monotonic() + 120
        while time.monotonic() < until and not ended:
            busy = next((process for process in processes if process.children(recursive=True)), None)
            if busy is not None:  # a session is a process of its own
                for child in [*busy.children(recursive=True), busy]:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                ended.append(busy)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = tune([task], tmp_path, remote_options(tracker, 4))
    watcher.join(1)
    assert ended and result.measured == 4 and result.failures == ()
