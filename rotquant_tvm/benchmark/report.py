"""Figures of one benchmark: rows of cases, each with its floor and its rivals, as a document."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from rotquant_tvm.errors import FormatError

from .contender import failure

ERROR_BAR = 1e-3
"""The largest error that passes: relative to float64, or the share of codes that differ (``Row.error``)."""


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that this device reached in this run: read and written by the fastest copy, and only read."""

    copy: float
    read: float


@dataclass(frozen=True)
class Point:
    """One measurement in the roofline picture."""

    series: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Rival:
    """Another implementation's time for the same work; None where it could not run, ``note`` says why.

    nbytes  what it must read and write at least; None if that is what our call must.
    """

    name: str
    seconds: float | None
    note: str = ""
    nbytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One case of one configuration.

    seconds  median per call, None if it failed (``note`` says why). nbytes  what the call must read and write at
    least. bound  which bandwidth its floor is taken at, None where memory is not what bounds it. flops  of the
    call's products, 0 if nobody asks. error  against float64: relative L2 of an attention's output, share of codes
    that differ for operators that quantize. kernel  the hand-laid kernel's rule, "definition" if there is none.
    refused  there is no such format.
    """

    case: str
    subject: str
    seconds: float | None
    nbytes: int
    bound: Literal["copy", "read"] | None
    rivals: tuple[Rival, ...] = ()
    error: float | None = None
    kernel: str = ""
    flops: float = 0.0
    note: str = ""
    refused: bool = False

    @classmethod
    def without_time(cls, case: str, subject: str, error: Exception) -> Row:
        """The row of a case that could not be prepared: refused if there is no such format, else failed."""
        refused = isinstance(error, FormatError)
        return cls(case, subject, None, 0, None, refused=refused, note=str(error) if refused else failure(error).note)

    @property
    def passed(self) -> bool:
        """Whether the case ran, its error within the bar, or is refused because there is no such format."""
        return self.refused or (self.seconds is not None and (self.error is None or self.error <= ERROR_BAR))

    def ratio(self, rival: Rival) -> float | None:
        """How many times faster than a rival."""
        return rival.seconds / self.seconds if rival.seconds and self.seconds else None


@dataclass
class Report:
    """Everything that one operation's benchmark measured: what ``rotquant_tvm.benchmark.*.run`` returns."""

    operation: str
    device: str
    bandwidth: Bandwidth
    clock: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every case ran within the error bar."""
        return all(row.passed for row in self.rows)

    def floor(self, row: Row) -> float | None:
        """Seconds that the row's bytes take at the bandwidth that bounds it."""
        return row.nbytes / getattr(self.bandwidth, row.bound) if row.bound else None

    def share(self, row: Row) -> float | None:
        """The row's bytes per second as a share of the bandwidth that bounds it."""
        floor = self.floor(row)
        return floor / row.seconds if floor is not None and row.seconds else None

    def points(self) -> list[Point]:
        """Every time in the report whose bytes are known, by configuration or rival, each once."""
        points = [Point(row.subject, row.nbytes, row.seconds) for row in self.rows if row.seconds]
        for row in self.rows:
            for rival in row.rivals:
                if rival.seconds:
                    nbytes = row.nbytes if rival.nbytes is None else rival.nbytes
                    points.append(Point(rival.name, nbytes, rival.seconds))
        return list(dict.fromkeys(point for point in points if point.nbytes))

    def summary(self) -> list[dict[str, Any]]:
        """Geometric mean, least and greatest of the ratios to each rival, by configuration where several were run."""
        ratios: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for row in self.rows:
            for rival in row.rivals:
                ratio = row.ratio(rival)
                if ratio is not None:
                    ratios[row.subject, rival.name].append(ratio)
        return [
            {
                "subject": subject,
                "rival": rival,
                "cases": len(values),
                "geometric_mean": math.exp(sum(map(math.log, values)) / len(values)),
                "least": min(values),
                "greatest": max(values),
            }
            for (subject, rival), values in ratios.items()
        ]

    def document(self) -> dict[str, Any]:
        """Every figure as plain numbers, in SI units but for microseconds."""
        return {
            "operation": self.operation,
            "device": self.device,
            "clock": self.clock,
            "copy_bandwidth": self.bandwidth.copy,
            "read_bandwidth": self.bandwidth.read,
            "rows": [self._record(row) for row in self.rows],
            "summary": self.summary(),
            "notes": self.notes,
            "passed": self.passed,
        }

    def _record(self, row: Row) -> dict[str, Any]:
        return {
            "case": row.case,
            "subject": row.subject,
            "kernel": row.kernel,
            "microseconds": _micro(row.seconds),
            "bytes": row.nbytes,
            "bound": row.bound,
            "floor_microseconds": _micro(self.floor(row)),
            "share": self.share(row),
            "teraflops": row.flops / row.seconds / 1e12 if row.flops and row.seconds else None,
            "error": row.error,
            "note": row.note,
            "rivals": [
                {"name": r.name, "microseconds": _micro(r.seconds), "ratio": row.ratio(r), "note": r.note}
                for r in row.rivals
            ],
        }


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds
