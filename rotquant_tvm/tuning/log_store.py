"""Tuning logs: a folder per device with MetaSchedule's two database files and a manifest.

Record n of the manifest describes line n of ``database_tuning_record.json``; ``tuning_logs/README.md`` has the format.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..durable import make_folder, replace_file
from ..errors import LogError, UsageError
from .kernel_shape import KernelShape
from .log_document import MalformedLogError, check_manifest, parse, parse_lines, read_text
from .log_folders import FORMAT, MANIFEST_FILE, PENDING_FILE, RECORD_FILE, VERSION, WORKLOAD_FILE

_FILES = (WORKLOAD_FILE, RECORD_FILE, MANIFEST_FILE)


@dataclass(frozen=True)
class LogRecord:
    """The best of one task's trials.

    operator, properties  what the kernel is specialized on (``KernelShape``). bucket  the symbolic sizes that it was
    measured at. rule, kernel_hash  what laid the kernel out. knobs  chosen ones; none if the rule's own were best.
    seconds, rule_seconds  per run: of the kernel, and of the rule's own, None if that failed. nbytes  what a run must
    move. share  of the roofline: the time that those bytes take at the device's copy bandwidth, or ``flops`` at its
    rate of products if that is more, over ``seconds``. trials  kernels that were measured. date  ISO, of the day.
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
    flops: int = 0

    @property
    def shape(self) -> KernelShape:
        """The operator and its properties."""
        return KernelShape(self.operator, self.properties)

    @property
    def gain(self) -> float | None:
        """How many times faster than with the rule's own knobs it is; None where those failed."""
        return None if self.rule_seconds is None else self.rule_seconds / self.seconds

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

    ``copy_bandwidth`` in bytes per second, read and written; ``product_rate`` in multiplications and additions per
    second of a large matrix product; ``tvm`` and ``layout_version`` are versions.
    """

    device: Mapping[str, Any]
    target: Mapping[str, Any]
    tvm: str
    layout_version: int
    copy_bandwidth: float | None
    entries: tuple[LogEntry, ...] = ()
    product_rate: float | None = None
    path: Path | None = field(default=None, compare=False)

    @property
    def slug(self) -> str:
        """The folder's name."""
        return str(self.device["slug"])

    @property
    def records(self) -> list[LogRecord]:
        """The records in order."""
        return [entry.record for entry in self.entries]

    def merged(
        self, entries: Iterable[LogEntry], stale: Callable[[LogRecord], bool] = lambda _record: False
    ) -> TuningLog:
        """Return the log with more records, one for each task.

        Those of the kernel that there is now win over ``stale`` ones, then those of the kernel that came last, then the
        fastest.
        """
        best: dict[str, LogEntry] = {}
        for entry in (*self.entries, *entries):
            old = best.get(entry.record.key)
            if old is None or _supersedes(entry.record, old.record, stale):
                best[entry.record.key] = entry
        order = sorted(best.values(), key=lambda entry: (entry.record.operator, entry.record.key))
        return replace(self, entries=tuple(order))


def _supersedes(new: LogRecord, old: LogRecord, stale: Callable[[LogRecord], bool]) -> bool:
    if new.kernel_hash == old.kernel_hash:
        return new.seconds < old.seconds
    return new.date >= old.date if stale(new) == stale(old) else stale(old)


def read_log(folder: Path) -> TuningLog:
    """Read a log. Raises ``LogError`` naming what is damaged, or a version that this one cannot read."""
    manifest = folder / MANIFEST_FILE
    try:
        texts = _texts(folder)
        document = parse(texts[MANIFEST_FILE], MANIFEST_FILE)
        if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')} {document.get('version')}" if isinstance(document, dict) else "none"
            raise LogError(f"{manifest}: version {VERSION} of {FORMAT} is read, this is {found:.60}; tune again")
        check_manifest(document)
        records = [_checked(LogRecord(**record), number) for number, record in enumerate(document["records"])]
        workloads, lines = (parse_lines(texts[name], name) for name in (WORKLOAD_FILE, RECORD_FILE))
        if len(lines) != len(records):
            raise LogError(f"{folder}: {len(records)} records in {MANIFEST_FILE}, {len(lines)} in {RECORD_FILE}")
        entries = [_entry(*pair, workloads) for pair in zip(records, lines, strict=True)]
        names = ("device", "target", "tvm", "layout_version", "copy_bandwidth")
        given = {name: document[name] for name in names} | {"product_rate": document.get("product_rate")}
        return TuningLog(**given, entries=tuple(entries), path=folder)
    except OSError as error:
        raise LogError(f"{folder} is no tuning log: {error.strerror or error} ({error.filename})") from error
    except MalformedLogError as error:
        raise LogError(f"{folder} is a damaged tuning log ({error}); tune again") from error


def _texts(folder: Path) -> dict[str, str]:
    """The contents of the log's files, by name: of those that a write which was cut short was about to put there."""
    try:
        found = parse(read_text(folder / PENDING_FILE), PENDING_FILE)
    except FileNotFoundError:
        return {name: read_text(folder / name) for name in _FILES}
    if isinstance(found, dict) and all(isinstance(found.get(name), str) for name in _FILES):
        return {name: found[name] for name in _FILES}
    raise MalformedLogError(f"{PENDING_FILE} lacks a file")


def _checked(record: LogRecord, number: int) -> LogRecord:
    """A record whose properties make sense to whoever compares kernels. Raises MalformedLogError."""
    try:
        shape, _ = record.shape, (record.key, record.shape.label)
        sound = shape.distance(shape) == 0
    except (TypeError, ValueError, ArithmeticError, KeyError, AttributeError, IndexError) as error:
        raise MalformedLogError(f"the properties of record {number} make no sense: {error}") from error
    if not sound:
        raise MalformedLogError(f"the properties of record {number} make no sense")
    return record


def _entry(record: LogRecord, line: Any, workloads: Sequence[Any]) -> LogEntry:
    """The record with its line [workload's number, …] of the database and that workload."""
    if not isinstance(line, list) or len(line) != 2 or type(line[0]) is not int or not 0 <= line[0] < len(workloads):
        raise MalformedLogError(f"a line of {RECORD_FILE} names no workload")
    return LogEntry(record, workloads[line[0]], line[1])


def write_log(folder: Path, log: TuningLog) -> None:
    """Write a log, all of it or nothing, whenever the process is ended. Raises ``UsageError``.

    The contents of the three files are put into one first, which counts as long as it is there.
    """
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
        "product_rate": log.product_rate,
        "records": [asdict(record) for record in log.records],
    }
    manifest = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    texts = {WORKLOAD_FILE: _text(workloads), RECORD_FILE: _text(lines), MANIFEST_FILE: manifest}
    try:
        make_folder(folder)
        write_whole(folder / PENDING_FILE, json.dumps(texts))
        _put(folder, texts)
    except OSError as error:
        raise UsageError(f"cannot write the tuning log {folder}: {error.strerror or error}") from error


def finish_write(folder: Path) -> None:
    """Finish what a process that was ended had begun to write; damaged files stay.

    Raises ``LogError`` for these, ``UsageError`` if it cannot.
    """
    remove_leftovers(folder)
    if (folder / PENDING_FILE).exists():
        write_log(folder, read_log(folder))


def _put(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        write_whole(folder / name, text)
    (folder / PENDING_FILE).unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove files that a process which was ended was writing; only whoever holds the folder may."""
    for path in folder.glob(".*.json.*"):
        path.unlink(missing_ok=True)


def _text(lines: Sequence[Any]) -> str:
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name.lstrip('.')}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        replace_file(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)  # it may have got its final name before an interrupt came
        raise
