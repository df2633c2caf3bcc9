"""Checking a tuning log: that the files agree, that TVM reads them, and that the kernels are still those recorded.

What is *unsound* no tuning can have left: files that disagree, times that are none, knobs that the kernel never had. A
log of another version of a kernel or of the tile layout, or in a folder by another name, has a problem and is sound.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.database import TuningRecord, Workload

from ..errors import DeviceError, LogError
from ..formats import VERSION as LAYOUT_VERSION
from ..schedules.knobs import knob_values, rule_named
from .isolated import call_isolated
from .kernel_hash import kernel_hash
from .kernel_shape import KernelShape
from .knob_space import replayed_knobs
from .log_document import MalformedLogError
from .log_folders import RECORD_FILE
from .log_store import LogEntry, LogRecord, TuningLog, read_log
from .shape_buckets import bucket_label
from .trace_document import run_seconds, traced_knobs, typical_seconds
from .tuning_task import MAIN
from .worker_process import last_line

_SECONDS = 120.0
"""For TVM to read a log; it takes a hundredth of that."""
STALE = "the kernel has changed since; tune it again"


def log_problems(folder: Path) -> list[str]:
    """Say what is wrong with a log, in a line each; none if all is well."""
    try:
        log = read_log(folder)
    except LogError as error:
        return [str(error)]
    problems = []
    if log.slug != folder.resolve().name:
        problems.append(f"the folder is called {folder.resolve().name}, and its device {log.slug}")
    if log.layout_version != LAYOUT_VERSION:
        problems.append(f"tuned for tile layout {log.layout_version}; this is {LAYOUT_VERSION}")
    return problems + _unsound(folder, log) + _of_records(log, _version_problems)


def read_sound_log(folder: Path) -> TuningLog:
    """Read a log whose records may go into another one. Raises ``LogError`` for an unsound one, too."""
    log = read_log(folder)
    if problems := _unsound(folder, log):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LogError(f"{folder}: {problems[0]}{more}; tvmc logs check {folder} names all; tune again")
    return log


def is_stale(record: LogRecord, kind: str) -> bool:
    """Whether the code of a record's kernel has changed on a kind of target, or there is no rule for it any more."""
    rule = rule_named(record.operator, kind)
    return rule is None or rule.__name__ != record.rule or kernel_hash(rule) != record.kernel_hash


def _unsound(folder: Path, log: TuningLog) -> list[str]:
    return _tvm_problems(folder, log) + _of_records(log, _entry_problems)


def _of_records(log: TuningLog, find: Callable[[LogEntry, str], list[str]]) -> list[str]:
    """What ``find`` says of a log's entries on its kind of target, with the names of the records."""
    return [
        f"{_name(number, entry.record)}: {problem}"
        for number, entry in enumerate(log.entries)
        for problem in find(entry, log.device["kind"])
    ]


def _name(number: int, record: LogRecord) -> str:
    return f"record {number} ({record.operator} {record.shape.label} {bucket_label(record.bucket)})"


def _tvm_problems(folder: Path, log: TuningLog) -> list[str]:
    """What TVM says of the database. It trusts what it reads, so it reads in a process that may crash."""
    try:
        return list(call_isolated(_SECONDS, _read_by_tvm, folder, log))
    except DeviceError as error:
        return [f"TVM cannot read the database: {error}"]


def _read_by_tvm(folder: Path, log: TuningLog) -> list[str]:
    try:
        database = ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False)
    except Exception as error:  # whatever TVM makes of damaged files
        return [f"TVM cannot read the database: {last_line(error)}"]
    found, problems = len(database), []
    if found != len(log.entries):
        problems.append(f"TVM finds {found} records in {RECORD_FILE}, not {len(log.entries)}")
    for number, entry in enumerate(log.entries):
        problem = _workload_problem(entry)
        problems += [f"{_name(number, entry.record)}: {problem}"] if problem else []
    return problems


def _workload_problem(entry: LogEntry) -> str:
    record = entry.record
    try:
        workload: Any = Workload.from_json(entry.workload)
        definition = workload.mod[MAIN]
        knobs = replayed_knobs(TuningRecord.from_json(entry.tuning_record, workload).trace, definition)
    except Exception as error:  # whatever TVM makes of a damaged line
        return f"TVM cannot read it: {last_line(error)}"
    if KernelShape.of(definition) != record.shape:
        return "its workload is another kernel than the manifest says"
    return "" if knobs == traced_knobs(entry.tuning_record) else f"TVM reads the knobs {knobs} in its trace"


def _entry_problems(entry: LogEntry, kind: str) -> list[str]:
    """What no version of the kernel can have left."""
    record = entry.record
    try:
        knobs, seconds = traced_knobs(entry.tuning_record), typical_seconds(run_seconds(entry.tuning_record))
    except MalformedLogError as error:
        return [f"it cannot be read: {error}"]
    problems = []
    if knobs != dict(record.knobs):
        problems.append(f"its trace chooses {knobs}, the manifest says {dict(record.knobs)}")
    if abs(seconds / record.seconds - 1) > 1e-3:
        problems.append(f"it took {seconds} s, the manifest says {record.seconds}")
    return problems if is_stale(record, kind) else problems + _unknown_knobs(record, kind)


def _version_problems(entry: LogEntry, kind: str) -> list[str]:
    """What is wrong with a record because its kernel is another one by now."""
    record, rule = entry.record, rule_named(entry.record.operator, kind)
    if rule is None or rule.__name__ != record.rule:
        return [f"there is no rule {record.rule} any more"]
    return [*_unknown_knobs(record, kind), STALE] if is_stale(record, kind) else []


def _unknown_knobs(record: LogRecord, kind: str) -> list[str]:
    """Knobs of a record that the rule of its operator, which there is, does not have or does not take."""
    rule = rule_named(record.operator, kind)
    values = {} if rule is None else knob_values(rule)
    unknown = [f"{name}={value}" for name, value in record.knobs.items() if value not in values.get(name, ())]
    return [f"the rule does not know {', '.join(unknown)}"] if unknown else []
