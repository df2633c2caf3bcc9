"""Checking a tuning log: that the files agree, that TVM reads them, and that the kernels are still those recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvm import tirx
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.database import TuningRecord, Workload
from tvm.target import Target

from ..errors import UsageError
from ..formats import VERSION as LAYOUT_VERSION
from ..schedules.knobs import knob_values, rule_of
from .kernel_hash import kernel_hash
from .kernel_shape import KernelShape
from .knob_space import replayed_knobs
from .log_folders import RECORD_FILE
from .log_store import LogEntry, TuningLog, read_log
from .shape_buckets import bucket_label
from .trials import typical_seconds
from .tuning_task import MAIN
from .worker_process import last_line

STALE = "the kernel has changed since; tune it again"


def log_problems(folder: Path) -> list[str]:
    """Say what is wrong with a log, in a line each; none if all is well."""
    try:
        log = read_log(folder)
    except UsageError as error:
        return [str(error)]
    problems = []
    if log.slug != folder.resolve().name:
        problems.append(f"the folder is called {folder.resolve().name}, and its device {log.slug}")
    if log.layout_version != LAYOUT_VERSION:
        problems.append(f"tuned for tile layout {log.layout_version}; this is {LAYOUT_VERSION}")
    problems += _database_problems(folder, log)
    for number, entry in enumerate(log.entries):
        record = entry.record
        name = f"record {number} ({record.operator} {record.shape.label} {bucket_label(record.bucket)})"
        problems += [f"{name}: {problem}" for problem in _entry_problems(entry, Target(dict(log.target)))]
    return problems


def is_stale(entry: LogEntry, target: Target) -> bool:
    """Whether the code of a record's kernel has changed, as far as there is a rule for it."""
    rule = rule_of(_definition(entry), target)
    return rule is None or rule.__name__ != entry.record.rule or kernel_hash(rule) != entry.record.kernel_hash


def _database_problems(folder: Path, log: TuningLog) -> list[str]:
    try:
        database = ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False)
    except Exception as error:  # whatever TVM makes of damaged files
        return [f"TVM cannot read the database: {last_line(error)}"]
    found = len(database)
    return [] if found == len(log.entries) else [f"TVM finds {found} records in {RECORD_FILE}, not {len(log.entries)}"]


def _entry_problems(entry: LogEntry, target: Target) -> list[str]:
    record = entry.record
    try:
        definition = _definition(entry)
        traced = TuningRecord.from_json(entry.tuning_record, Workload.from_json(entry.workload))
        knobs = replayed_knobs(traced.trace, definition)
        seconds = typical_seconds(traced.run_secs)
    except Exception as error:  # whatever TVM makes of a damaged line
        return [f"TVM cannot read it: {last_line(error)}"]
    problems = []
    if KernelShape.of(definition) != record.shape:
        problems.append("its workload is another kernel than the manifest says")
    if knobs != dict(record.knobs):
        problems.append(f"its trace chooses {knobs}, the manifest says {dict(record.knobs)}")
    if abs(seconds / record.seconds - 1) > 1e-3:
        problems.append(f"it took {seconds} s, the manifest says {record.seconds}")
    return [*problems, *_rule_problems(entry, target, knobs)]


def _rule_problems(entry: LogEntry, target: Target, knobs: dict[str, int]) -> list[str]:
    rule = rule_of(_definition(entry), target)
    if rule is None or rule.__name__ != entry.record.rule:
        return [f"there is no rule {entry.record.rule} any more"]
    values = knob_values(rule)
    unknown = [f"{name}={value}" for name, value in knobs.items() if value not in values.get(name, ())]
    if unknown:
        return [f"the rule does not know {', '.join(unknown)}"]
    return [STALE] if is_stale(entry, target) else []


def _definition(entry: LogEntry) -> tirx.PrimFunc:
    workload: Any = Workload.from_json(entry.workload)
    return workload.mod[MAIN]
