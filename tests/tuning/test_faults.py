"""What can happen to a real ``tvmc tune`` on this CPU: interrupts, killed processes, a full disk. It goes on after.

The processes are real, and so is every kernel; all of it is ``full``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from rotquant_tvm.tuning.log_check import log_problems
from rotquant_tvm.tuning.log_folders import RECORD_FILE, WORKLOAD_FILE

pytestmark = [pytest.mark.full, pytest.mark.slow]

COMMAND = (
    *("tune", "--target", "llvm -mcpu=x86-64-v3", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"),
    *("--kv-cache", "hurwitz3", "--shapes", "1x256,1x512", "--trials-per-task", "6", "--number", "1", "--repeat", "2"),
    *("--min-repeat-ms", "0", "--parallel", "1", "--tasks", "attention_decode", "--json", "-v"),
)
FULL_DISK = """
import os, sys
from rotquant_tvm.tuning import trial_files
write, left = os.write, [int(sys.argv.pop(1))]
def full(descriptor, data):
    if "/trials/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        if len(data) > left[0]:
            if left[0]:
                written, left[0] = write(descriptor, data[: left[0]]), 0
                return written
            raise OSError(28, "No space left on device")
        left[0] -= len(data)
    return write(descriptor, data)
os.write = full
from rotquant_tvm.cli.main import main
sys.exit(main())
"""


class Tuning:
    """A process of its own group, as a terminal would start it."""

    def __init__(self, logs, *program):
        self.trials = logs / "llvm-x86-64-v3" / "trials" / RECORD_FILE
        program = program or ("-m", "rotquant_tvm.cli.main")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        environment = os.environ | {"TVM_NUM_THREADS": "1"}
        command = [sys.executable, *program, *COMMAND, "-o", str(logs)]
        self.process = subprocess.Popen(command, env=environment, **options)

    def wait_for(self, trials):
        until = time.monotonic() + 200
        while (len(self.trials.read_text().splitlines()) if self.trials.exists() else 0) < trials:
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate()
            time.sleep(0.02)
        return self

    def end(self):
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def sound(logs):
    """Whole lines in the trials, and no problem in the log."""
    folder = logs / "llvm-x86-64-v3"
    for name in (WORKLOAD_FILE, RECORD_FILE):
        assert all(json.loads(line) for line in (folder / "trials" / name).read_text().splitlines())
    assert log_problems(folder) == []


def finish(logs, before):
    """Run the same command to its end: it measures the rest, and of the rest alone."""
    status, out, err = Tuning(logs).end()
    assert status == 0, err
    document = json.loads(out)
    assert len(document["records"]) == 2 and document["finished"]
    assert document["measured"] <= 12 - before + 2  # the rule's own again, for comparison
    sound(logs)
    return document


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt(tmp_path, number):
    tuning = Tuning(tmp_path).wait_for(3)
    os.killpg(tuning.process.pid, number)  # as Ctrl-C does: all processes of the terminal get it
    status, _, err = tuning.end()
    assert status == (130 if number == signal.SIGINT else 143), err
    assert "what was measured is kept in" in err and "to go on: tvmc tune --target" in err
    sound(tmp_path)
    finish(tmp_path, 3)


@pytest.mark.parametrize("trials", [0, 1, 5])
def test_a_killed_main_process(tmp_path, trials):
    tuning = Tuning(tmp_path).wait_for(trials)
    time.sleep(0 if trials else 2)
    children = psutil.Process(tuning.process.pid).children(recursive=True)
    tuning.process.kill()
    tuning.end()
    _, alive = psutil.wait_procs(children, timeout=30)
    for child in alive:
        child.kill()
    assert alive == []  # workers do not outlive it
    finish(tmp_path, trials)


def test_a_killed_worker(tmp_path):
    """Whatever the process was at is a failure, and the rest goes on in a new one."""
    tuning = Tuning(tmp_path).wait_for(2)
    for child in psutil.Process(tuning.process.pid).children():
        with suppress(psutil.NoSuchProcess):
            child.kill()
    status, out, err = tuning.end()
    assert status == 0, err
    document = json.loads(out)
    assert len(document["records"]) == 2 and document["measured"] + len(document["failures"]) >= 11
    sound(tmp_path)


@pytest.mark.parametrize("room", [100, 60_000])
def test_a_full_disk(tmp_path, room):
    """``room`` bytes are left for the trials: it ends inside of the first workload, or of a later line."""
    driver = tmp_path / "driver.py"
    driver.write_text(FULL_DISK)
    logs = tmp_path / "logs"
    status, out, err = Tuning(logs, str(driver), str(room)).end()
    assert status == 2 and "No space left on device; what was measured before is kept" in err.splitlines()[-1], err
    assert json.loads(out)["error"]["exit_status"] == 2
    done = (logs / "llvm-x86-64-v3" / "trials" / RECORD_FILE).read_text().splitlines()
    finish(logs, len(done))
