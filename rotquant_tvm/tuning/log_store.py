"""Tuning logs: a folder per device with MetaSchedule's two database files and a manifest.

Record n of the manifest describes line n of ``database_tuning_record.json``; ``tuning_logs/README.md`` has the format.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .kernel_shape import KernelShape
from .log_document import MalformedLogError, check_manifest, read_json, read_json_lines
from .log_folders import FORMAT, MANIFEST_FILE, RECORD_FILE, VERSION, WORKLOAD_FILE


@dataclass(frozen=True)
class LogRecord:
    """The best of one task's trials.

    operator, properties  what the kernel is specialized on (``KernelShape``). bucket  the symbolic sizes that it was
    measured at. rule, kernel_hash  what laid the kernel out. knobs  chosen ones; none if the rule's own were best.
    seconds, rule_seconds  per run: of the kernel, and of the rule's own, None if that failed. nbytes  what a run must
    move. share  those bytes per second, as a share of the device's copy bandwidth. trials  kernels that were measured.
    date  ISO, of the day.
    """

    operator: str
    properties: Mapping[str, Any]
    bucket: Mapping[str, int]
    rule: str
    kernel_hash: str
    knobs: Mapping[str, int]
    seconds: float
    rule_seconds: float | None
    nbytes: int
    share: float | None
    trials: int
    date: str

    @property
    def shape(self) -> KernelShape:
        """The operator and its properties."""
        return KernelShape(self.operator, self.properties)

    @property
    def key(self) -> str:
        """What two records of one task have in common."""
        return json.dumps([self.operator, self.shape.essence(), dict(self.bucket)], sort_keys=True)


@dataclass(frozen=True)
class LogEntry:
    """A record with the lines that stand for it in the database, as JSON data."""

    record: LogRecord
    workload: Any
    tuning_record: Any


@dataclass(frozen=True)
class TuningLog:
    """The log of one device: ``device`` is ``DeviceIdentity.document()``, ``target`` TVM's attributes of the target.

    ``copy_bandwidth`` in bytes per second, read and written; ``tvm`` and ``layout_version`` are versions.
    """

    device: Mapping[str, Any]
    target: Mapping[str, Any]
    tvm: str
    layout_version: int
    copy_bandwidth: float | None
    entries: tuple[LogEntry, ...] = ()
    path: Path | None = field(default=None, compare=False)

    @property
    def slug(self) -> str:
        """The folder's name."""
        return str(self.device["slug"])

    @property
    def records(self) -> list[LogRecord]:
        """The records in order."""
        return [entry.record for entry in self.entries]

    def merged(self, entries: Iterable[LogEntry]) -> TuningLog:
        """Return the log with more records; of one task's, those of the kernel that came last win, then the fastest."""
        best: dict[str, LogEntry] = {}
        for entry in (*self.entries, *entries):
            old = best.get(entry.record.key)
            if old is None or _supersedes(entry.record, old.record):
                best[entry.record.key] = entry
        order = sorted(best.values(), key=lambda entry: (entry.record.operator, entry.record.key))
        return replace(self, entries=tuple(order))


def _supersedes(new: LogRecord, old: LogRecord) -> bool:
    if new.kernel_hash != old.kernel_hash:
        return new.date >= old.date
    return new.seconds < old.seconds


def read_log(folder: Path) -> TuningLog:
    """Read a log. Raises ``UsageError`` naming what is damaged, or a version that this one cannot read."""
    manifest = folder / MANIFEST_FILE
    try:
        document = read_json(manifest)
        if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')} {document.get('version')}" if isinstance(document, dict) else "none"
            raise UsageError(f"{manifest}: version {VERSION} of {FORMAT} is read, this is {found:.60}; tune again")
        check_manifest(document)
        records = [LogRecord(**record) for record in document["records"]]
        workloads, lines = (read_json_lines(folder / name) for name in (WORKLOAD_FILE, RECORD_FILE))
        if len(lines) != len(records):
            raise UsageError(f"{folder}: {len(records)} records in {MANIFEST_FILE}, {len(lines)} in {RECORD_FILE}")
        entries = [_entry(*pair, workloads) for pair in zip(records, lines, strict=True)]
        names = ("device", "target", "tvm", "layout_version", "copy_bandwidth")
        return TuningLog(**{name: document[name] for name in names}, entries=tuple(entries), path=folder)
    except OSError as error:
        raise UsageError(f"{folder} is no tuning log: {error.strerror or error} ({error.filename})") from error
    except MalformedLogError as error:
        raise UsageError(f"{folder} is a damaged tuning log ({error}); tune again") from error


def _entry(record: LogRecord, line: Any, workloads: Sequence[Any]) -> LogEntry:
    """The record with its line [workload's number, …] of the database and that workload."""
    if not isinstance(line, list) or len(line) != 2 or type(line[0]) is not int or not 0 <= line[0] < len(workloads):
        raise MalformedLogError(f"a line of {RECORD_FILE} names no workload")
    return LogEntry(record, workloads[line[0]], line[1])


def write_log(folder: Path, log: TuningLog) -> None:
    """Write a log, the manifest last; every file appears whole or not at all. Raises ``UsageError``."""
    workloads: list[Any] = []
    lines = []
    for entry in log.entries:
        if entry.workload not in workloads:
            workloads.append(entry.workload)
        lines.append([workloads.index(entry.workload), entry.tuning_record])
    document = {
        "format": FORMAT,
        "version": VERSION,
        "device": log.device,
        "target": log.target,
        "tvm": log.tvm,
        "layout_version": log.layout_version,
        "copy_bandwidth": log.copy_bandwidth,
        "records": [asdict(record) for record in log.records],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WORKLOAD_FILE, _text(workloads))
        _write(folder / RECORD_FILE, _text(lines))
        _write(folder / MANIFEST_FILE, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write the tuning log {folder}: {error.strerror or error}") from error


def _text(lines: Sequence[Any]) -> str:
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
