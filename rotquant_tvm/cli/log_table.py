"""Tuning records as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from rotquant_tvm.cli.output import table

if TYPE_CHECKING:
    from rich.table import Table

    from rotquant_tvm.tuning.log_diff import RecordChange
    from rotquant_tvm.tuning.log_store import LogRecord


def record_table(title: str, records: Sequence[LogRecord], notes: Sequence[str] = ()) -> Table:
    """Return one row per record, with the times before (the rule's own) and after; ``notes`` says something of each.

    Records come from anywhere: nothing in them is taken for markup.
    """
    from rotquant_tvm.tuning.shape_buckets import bucket_label

    rows = [
        [
            escape(record.operator),
            escape(record.shape.label),
            escape(bucket_label(record.bucket)),
            _knobs(record),
            note,
            "" if record.rule_seconds is None else f"{1e6 * record.rule_seconds:.4g}",
            f"{1e6 * record.seconds:.4g}",
            "" if record.gain is None else f"{record.gain:.2f}×",
            "" if record.share is None else f"{100 * record.share:.0f} %",
            record.trials,
        ]
        for record, note in zip(records, notes or [""] * len(records), strict=True)
    ]
    columns = ["operator", "shape", "bucket", "knobs", "", "rule's µs", "µs", "gain", "of roofline", "trials"]
    return table(escape(title), columns, rows, left=5)


def change_table(changes: Sequence[RecordChange]) -> Table:
    """Return one row per task that two logs say something different of."""
    from rotquant_tvm.tuning.shape_buckets import bucket_label

    rows = [
        [
            escape(change.record.operator),
            escape(change.record.shape.label),
            escape(bucket_label(change.record.bucket)),
            change.kind,
            _knobs(change.old),
            _knobs(change.new),
            _micro(change.old),
            _micro(change.new),
            "" if change.speedup is None else f"{change.speedup:.2f}×",
        ]
        for change in changes
    ]
    columns = ["operator", "shape", "bucket", "change", "old knobs", "new knobs", "old µs", "new µs", "faster"]
    return table("", columns, rows, left=6)


def _knobs(record: LogRecord | None) -> str:
    if record is None:
        return ""
    return escape(", ".join(f"{name}={value}" for name, value in record.knobs.items())) or "the rule's own"


def _micro(record: LogRecord | None) -> str:
    return "" if record is None else f"{1e6 * record.seconds:.4g}"
