"""The files of a tuning run's trials: MetaSchedule's database format, written line by line, whole lines only.

TVM's own ``JSONDatabase`` appends without looking whether the disk took the line; the next one would then be glued to
what is left of it. Here a line is on the disk or it is not, and who wrote it is told.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..durable import make_folder
from ..errors import LogError, UsageError
from .log_document import MalformedLogError, parse, read_text
from .log_folders import RECORD_FILE, WORKLOAD_FILE
from .log_store import remove_leftovers, write_whole
from .trace_document import check_record, check_workload


class TrialFiles:
    """The trials in a folder, as the JSON data of workloads and records. Writing raises ``UsageError``."""

    def __init__(self, folder: Path) -> None:
        """Read them; lines from the first damaged one on go, and so do records of workloads that are not there.

        Raises OSError and MalformedLogError.
        """
        self.folder = folder
        remove_leftovers(folder)
        self.workloads: list[Any] = []
        self.records: list[tuple[int, Any]] = []
        self._numbers: dict[str, int] = {}
        kept = _sound_lines(folder / WORKLOAD_FILE, self._read_workload)
        records = _sound_lines(folder / RECORD_FILE, self._read_record)
        for name, lines in ((WORKLOAD_FILE, kept), (RECORD_FILE, records)):
            path, text = folder / name, "".join(f"{line}\n" for line in lines)
            if not path.exists() or path.read_bytes() != text.encode():
                write_whole(path, text)

    def _read_workload(self, document: Any) -> None:
        check_workload(document)
        self._numbers.setdefault(document[0], len(self.workloads))
        self.workloads.append(document)

    def _read_record(self, document: Any) -> None:
        if not isinstance(document, list) or len(document) != 2 or type(document[0]) is not int:
            raise MalformedLogError(f"a line of {RECORD_FILE} names no workload")
        if not 0 <= document[0] < len(self.workloads):
            raise MalformedLogError(f"a line of {RECORD_FILE} names no workload")
        check_record(document[1])
        self.records.append((document[0], document[1]))

    def of(self, workload: Any) -> list[Any]:
        """The records of a workload (``Workload.as_json``, whose first entry is its hash)."""
        number = self._numbers.get(str(workload[0]))
        return [record for index, record in self.records if index == number]

    def add(self, workload: Any, record: Any) -> None:
        """Write a record, and its workload where it is the first."""
        key = str(workload[0])
        if key not in self._numbers:
            self._append(WORKLOAD_FILE, workload)
            self._numbers[key] = len(self.workloads)
            self.workloads.append(workload)
        self._append(RECORD_FILE, [self._numbers[key], record])
        self.records.append((self._numbers[key], record))

    def __len__(self) -> int:
        return len(self.records)

    def _append(self, name: str, document: Any) -> None:
        try:
            append_line(self.folder / name, (json.dumps(document, separators=(",", ":")) + "\n").encode())
        except OSError as error:
            raise UsageError(
                f"cannot write the trials in {self.folder}: {error.strerror or error}; what was measured before is "
                "kept, and the same command goes on from there"
            ) from error


def append_line(path: Path, line: bytes) -> None:
    """Append a line; a failure leaves the file as it was. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _sound_lines(path: Path, read: Callable[[Any], None]) -> list[str]:
    """The whole lines up to the first that cannot be read."""
    sound: list[str] = []
    for line in read_text(path).split("\n")[:-1] if path.exists() else ():
        try:
            read(parse(line, path.name))
        except MalformedLogError:
            break
        sound.append(line)
    return sound


@contextmanager
def open_trials(folder: Path) -> Iterator[TrialFiles]:
    """Open the trials in a folder, or begin them.

    Raises ``UsageError`` if another process has them open or they cannot be written, ``LogError`` for damaged ones.
    """
    try:
        make_folder(folder)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"cannot write the tuning log {folder}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{folder} is in use by another tuning; choose another output") from error
        try:
            found = TrialFiles(folder)
        except OSError as error:
            raise UsageError(f"cannot open the trials in {folder}: {error}") from error
        except MalformedLogError as error:
            raise LogError(f"{folder} holds damaged trials ({error}); remove that folder and tune again") from error
        yield found
