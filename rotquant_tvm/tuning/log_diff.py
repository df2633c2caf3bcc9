"""What two tuning logs of one device say differently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UsageError
from .log_store import LogRecord, TuningLog


@dataclass(frozen=True)
class RecordChange:
    """One task in two logs: ``old`` and ``new`` are its records, None where a log has none."""

    old: LogRecord | None
    new: LogRecord | None

    @property
    def record(self) -> LogRecord:
        """The record that names the task: the new one if there is one."""
        found = self.new or self.old
        assert found is not None
        return found

    @property
    def speedup(self) -> float | None:
        """How many times faster the new record is; None if one is missing or has no time."""
        if self.old is None or self.new is None or not self.new.seconds > 0:
            return None
        return self.old.seconds / self.new.seconds

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``same``; or what differs first: ``kernel`` (its code), ``knobs``, ``time``."""
        if self.old is None:
            return "added"
        if self.new is None:
            return "removed"
        if self.old.kernel_hash != self.new.kernel_hash:
            return "kernel"
        if dict(self.old.knobs) != dict(self.new.knobs):
            return "knobs"
        return "same" if self.old.seconds == self.new.seconds else "time"


def check_same_device(old: TuningLog, new: TuningLog) -> None:
    """Raise ``UsageError`` unless the logs are of devices of one name and architecture: other times do not compare."""
    if (old.device["name"], old.device["arch"]) != (new.device["name"], new.device["arch"]):
        names = " and ".join(f"{log.device['name']} ({log.device['arch']}) in {log.path}" for log in (old, new))
        raise UsageError(f"the logs are of two devices, {names}; their times do not compare")


def log_changes(old: TuningLog, new: TuningLog) -> Iterator[RecordChange]:
    """Yield every task of the two logs once, by operator. Raises ``UsageError`` for logs of two devices."""
    check_same_device(old, new)
    before = {record.key: record for record in old.records}
    after = {record.key: record for record in new.records}
    for key in sorted(before | after, key=lambda key: ((after.get(key) or before[key]).operator, key)):
        yield RecordChange(before.get(key), after.get(key))
