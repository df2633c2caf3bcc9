"""Processes that tests start to be killed, limited or run side by side.

They are forks where nothing but files is touched, which costs nothing; what runs kernels is started anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(action: Callable[[], object]) -> int:
    """Run ``action`` in a fork; returns its process id. The fork ends with 1 if the action raises, else with 0."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(process: int) -> int:
    """Wait for a fork and return its exit status; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after(process: int, seconds: float) -> int:
    """Kill a fork without warning after so many seconds; returns its status."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return status_of(process)


def started(script: str, *arguments: object, runtime_only: bool = False) -> subprocess.Popen[str]:
    """Start Python on a script; runtime_only: with TVM's runtime alone."""
    environment = dict(os.environ)
    if runtime_only:
        environment["TVM_USE_RUNTIME_LIB"] = "1"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    folder = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
