"""The trials of a tuning run: MetaSchedule's database of everything that was measured, kept so that tuning goes on."""

from __future__ import annotations

import fcntl
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tvm.s_tir import meta_schedule as ms

from ..errors import UsageError
from ..schedules.knobs import Knobs
from .knob_space import replayed_knobs
from .log_folders import RECORD_FILE, WORKLOAD_FILE
from .log_store import LogEntry, LogRecord
from .tuning_task import TuningTask

FOLDER = "trials"
"""In a device's log folder. Nothing but resuming needs it."""

FAILED_SECONDS = 1e10
"""What a candidate that failed is recorded with, as MetaSchedule does."""
_NO_BETTER = 0.01
"""A kernel has to be faster than the rule's own by this share to be recorded in its place: less is noise."""


@dataclass(frozen=True)
class Trial:
    """One measured candidate: its knobs (none: the rule's own), seconds (``math.inf``: it failed) and record."""

    knobs: Knobs
    seconds: float
    record: Any


@contextmanager
def open_trials(folder: Path) -> Iterator[Any]:
    """Open the trials in a folder, or begin them; raises ``UsageError`` if another process has them open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"cannot write the tuning log {folder}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{folder} is in use by another tuning; choose another output") from error
        _drop_damage(folder)
        yield ms.database.JSONDatabase(work_dir=str(folder))


def _drop_damage(folder: Path) -> None:
    """Cut off the line that an interrupted process left unfinished; what refers to it goes too."""
    workloads = _whole_lines(folder / WORKLOAD_FILE)
    records = [line for line in _whole_lines(folder / RECORD_FILE) if json.loads(line)[0] < len(workloads)]
    for name, lines in ((WORKLOAD_FILE, workloads), (RECORD_FILE, records)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _whole_lines(path: Path) -> list[str]:
    whole: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            json.loads(line)
        except ValueError:
            break
        whole.append(line)
    return whole


def trials_of(task: TuningTask, database: Any) -> list[Trial]:
    """What the database has of a task, fastest first."""
    if not database.has_workload(task.workload):
        return []
    wanted = [info.as_json() for info in task.args_info]
    workload = database.commit_workload(task.workload)
    found = [
        Trial(replayed_knobs(record.trace, task.definition), typical_seconds(record.run_secs), record)
        for record in database.get_all_tuning_records()
        if record.workload.same_as(workload) and [info.as_json() for info in record.args_info or ()] == wanted
    ]
    return sorted(found, key=lambda trial: trial.seconds)


def typical_seconds(run_secs: Any) -> float:
    """The median of a record's times, which other work on the machine does not move; ``math.inf`` for a failure."""
    times = [float(seconds) for seconds in run_secs or ()]
    return statistics.median(times) if times and max(times) < FAILED_SECONDS else math.inf


def best_entry(task: TuningTask, trials: list[Trial], bandwidth: float | None) -> LogEntry | None:
    """The entry of a log for a task's trials; None if none succeeded."""
    valid = [trial for trial in trials if trial.seconds < math.inf]
    if not valid:
        return None
    rule = min((trial for trial in valid if not trial.knobs), key=lambda trial: trial.seconds, default=None)
    best = min(valid, key=lambda trial: trial.seconds)
    if rule is not None and best.seconds > (1 - _NO_BETTER) * rule.seconds:
        best = rule
    nbytes = task.measurement.moved_bytes()
    record = LogRecord(
        operator=task.shape.operator,
        properties=dict(task.shape.properties),
        bucket=dict(task.bucket),
        rule=task.rule,
        kernel_hash=task.kernel_hash,
        knobs=dict(best.knobs),
        seconds=_rounded(best.seconds),
        rule_seconds=None if rule is None else _rounded(rule.seconds),
        nbytes=nbytes,
        share=None if bandwidth is None else _rounded(nbytes / best.seconds / bandwidth),
        trials=len({tuple(sorted(trial.knobs.items())) for trial in trials}),
        date=datetime.now(UTC).date().isoformat(),
    )
    return LogEntry(record, best.record.workload.as_json(), best.record.as_json())


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
