"""Results kept in a file as they come, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotquant_tvm.durable import make_folder
from rotquant_tvm.errors import UsageError

FILE = "evaluation.jsonl"


class ResultStore:
    """Values by key, both plain data: one JSON line per value in ``folder/evaluation.jsonl``, only ever appended to.

    A key holds all that decides its value. Of equal keys the last counts; a line that was cut short is ignored. Raises
    UsageError if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._values: dict[str, Any] = {}
        try:
            make_folder(folder)
            with self.path.open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                if lines[-1]:  # the next line must not be joined to one cut short
                    file.write(b"\n")
        except OSError as error:
            raise UsageError(f"cannot keep results in {folder}: {error.strerror or error}") from error
        for line in lines:
            try:
                entry = json.loads(line)
                self._values[_text(entry["key"])] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: Mapping[str, Any]) -> Any:
        """Return the value of ``key``, or None."""
        return self._values.get(_text(key))

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a value, in the file too. Raises UsageError if it cannot be written."""
        self._values[_text(key)] = value
        line = json.dumps({"key": dict(key), "value": value}, separators=(",", ":")) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise UsageError(f"cannot keep results in {self.path}: {error.strerror or error}") from error


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))
