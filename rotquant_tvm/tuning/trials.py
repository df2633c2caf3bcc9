"""The trials of a tuning run: everything that was measured, and the best of it as an entry of a log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..schedules.knobs import Knobs
from .log_store import LogEntry, LogRecord
from .roofline import Roofline
from .trace_document import run_seconds, sizes, traced_knobs, typical_seconds
from .trial_files import TrialFiles
from .tuning_task import TuningTask

FOLDER = "trials"
"""In a device's log folder. Nothing but resuming needs it."""

_NO_BETTER = 0.01
"""A kernel has to be faster than the rule's own by this share to be recorded in its place: less is noise."""


@dataclass(frozen=True)
class Trial:
    """One measured candidate: its knobs (none: the rule's own), seconds (``math.inf``: it failed) and JSON record."""

    knobs: Knobs
    seconds: float
    record: Any


def trials_of(task: TuningTask, files: TrialFiles) -> list[Trial]:
    """What the files have of a task, fastest first."""
    wanted = sizes([None, None, None, task.sizes])
    found = [
        Trial(traced_knobs(record), typical_seconds(run_seconds(record)), record)
        for record in files.of(task.workload_document)
        if sizes(record) == wanted
    ]
    return sorted(found, key=lambda trial: trial.seconds)


def best_entry(task: TuningTask, trials: Sequence[Trial], roofline: Roofline) -> LogEntry | None:
    """The entry of a log for a task's trials; None if none succeeded."""
    valid = [trial for trial in trials if trial.seconds < math.inf]
    if not valid:
        return None
    rule = min((trial for trial in valid if not trial.knobs), key=lambda trial: trial.seconds, default=None)
    best = min(valid, key=lambda trial: trial.seconds)
    if rule is not None and best.seconds > (1 - _NO_BETTER) * rule.seconds:
        best = rule
    share = roofline.share(task.measurement, best.seconds)
    record = LogRecord(
        operator=task.shape.operator,
        properties=dict(task.shape.properties),
        bucket=dict(task.bucket),
        rule=task.rule,
        kernel_hash=task.kernel_hash,
        knobs=dict(best.knobs),
        seconds=_rounded(best.seconds),
        rule_seconds=None if rule is None else _rounded(rule.seconds),
        nbytes=task.measurement.moved_bytes(),
        share=None if share is None else _rounded(share),
        trials=len({tuple(sorted(trial.knobs.items())) for trial in trials}),
        date=datetime.now(UTC).date().isoformat(),
        flops=task.measurement.flops(),
    )
    return LogEntry(record, task.workload_document, best.record)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
