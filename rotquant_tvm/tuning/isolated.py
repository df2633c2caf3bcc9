"""Run a function in a child process that may crash: for readers that trust their input."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
from collections.abc import Callable
from typing import Any

from ..errors import DeviceError

_MOST_BYTES = 1 << 20
"""Of a result."""


def call_isolated(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function(*arguments)``, plain JSON data, gives in a copy of this process.

    Raises DeviceError if that took more than ``seconds``, crashed or raised. Where processes cannot be copied the
    function runs in this one.
    """
    if not hasattr(os, "fork"):
        return function(*arguments)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(writer, function, arguments)
    os.close(writer)
    try:
        text = _read(reader, seconds)
    finally:
        os.close(reader)
        if not _ends(child):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not text:
        raise DeviceError("it crashed or took too long")
    document = json.loads(text)
    if "error" in document:
        raise DeviceError(document["error"])
    return document["result"]


def _run(writer: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child: it writes its result and is gone, without any of what a Python process does at its end."""
    try:
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        try:
            document = {"result": function(*arguments)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            document = {"error": lines[-1][:500]}
        data = json.dumps(document).encode()
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def _read(reader: int, seconds: float) -> bytes:
    """All that comes, until the writer is gone; nothing if that takes too long."""
    poll = select.poll()
    poll.register(reader, select.POLLIN | select.POLLHUP)
    data = b""
    while poll.poll(1000 * seconds):
        piece = os.read(reader, 1 << 16)
        if not piece:
            return data
        data += piece
        if len(data) > _MOST_BYTES:
            break
    return b""


def _ends(child: int) -> bool:
    """Whether a child whose pipe is closed is gone within a moment."""
    for _ in range(100):
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        select.select([], [], [], 0.005)
    return False
