"""What two logs say differently."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.tuning.log_diff import RecordChange, log_changes
from rotquant_tvm.tuning.log_store import LogEntry, LogRecord, TuningLog

RECORD = LogRecord("append", {}, {"batch": 1}, "rule", "hash", {"warps": 4}, 2.0, None, 8, None, 1, "2026-01-01")
DEVICE = {"slug": "gpu", "name": "GPU", "arch": "sm_90a", "kind": "cuda"}


def log(*records: LogRecord, **device) -> TuningLog:
    return TuningLog(DEVICE | device, {}, "0.27", 1, None, tuple(LogEntry(record, {}, {}) for record in records))


@pytest.mark.parametrize(
    ("kind", "old", "new", "speedup"),
    [
        ("same", RECORD, RECORD, 1.0),
        ("time", RECORD, replace(RECORD, seconds=1.0), 2.0),
        ("knobs", RECORD, replace(RECORD, knobs={"warps": 8}, seconds=4.0), 0.5),
        ("kernel", RECORD, replace(RECORD, knobs={"warps": 8}, kernel_hash="new"), 1.0),
        ("added", None, RECORD, None),
        ("removed", RECORD, None, None),
        ("time", RECORD, replace(RECORD, seconds=0.0), None),
    ],
)
def test_what_became_of_a_task(kind, old, new, speedup):
    change = RecordChange(old, new)
    assert (change.kind, change.speedup) == (kind, speedup)
    assert change.record is (new or old)


def test_every_task_once_by_operator():
    larger = replace(RECORD, bucket={"batch": 8})
    decode = replace(RECORD, operator="attention_decode")
    changes = list(log_changes(log(RECORD, larger), log(decode, larger)))
    assert [(change.kind, change.record.operator) for change in changes] == [
        ("removed", "append"),
        ("same", "append"),
        ("added", "attention_decode"),
    ]


@pytest.mark.parametrize("other", [{"name": "another"}, {"arch": "sm_80"}])
def test_logs_of_two_devices_are_refused(other):
    with pytest.raises(UsageError, match="two devices"):
        list(log_changes(log(RECORD), log(RECORD, **other)))
