"""A benchmark's report as one table: ratios, microseconds and shares of the floor's bandwidth."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

from rotquant_tvm.cli.output import table

if TYPE_CHECKING:
    from rich.table import Table

    from rotquant_tvm.benchmark.report import Report, Rival, Row


NOTE_WIDTH = 60
"""A note's beginning; the document has all of it."""


def shown(report: Report) -> list[Table | str]:
    """The device with its bandwidth, the table, a line per summary entry, and the notes."""
    rates = f"copy {report.bandwidth.copy / 1e9:,.0f} GB/s, read {report.bandwidth.read / 1e9:,.0f} GB/s"
    head = f"{report.device}; {rates}; medians, {report.clock}"
    return [head, "", report_table(report), "", *summary_lines(report), *report.notes]


def report_table(report: Report) -> Table:
    """One row per case and configuration; each rival has a column with the ratio to it and its time."""
    names = list(dict.fromkeys(rival.name for row in report.rows for rival in row.rivals))
    products, errors = any(row.flops for row in report.rows), any(row.error is not None for row in report.rows)
    columns = ["case", "what", "kernel", "µs", "MB"]
    columns += ["TFLOP/s"] if products else ["floor µs", "of floor"]
    columns += [*(f"× {name} (µs)" for name in names), *(["error"] if errors else []), "note"]
    rows = []
    for row in report.rows:
        rivals = {rival.name: rival for rival in row.rivals}
        cells = [
            row.case,
            row.subject,
            row.kernel,
            time_cell(row.seconds),
            f"{row.nbytes / 1e6:.2f}" if row.nbytes else "",
        ]
        cells += [_rate(row)] if products else [time_cell(report.floor(row)), share_cell(report.share(row))]
        cells += [_ratio(row, rivals.get(name)) for name in names]
        cells += [] if not errors else ["" if row.error is None else f"{row.error:.1e}"]
        rows.append([*cells, shorten(row.note, NOTE_WIDTH, placeholder="…")])
    return table(report.operation, columns, rows, left=3)


def summary_lines(report: Report) -> list[str]:
    """One line per configuration and rival that several cases have in common: how many times faster."""
    return [
        f"{entry['subject']} against {entry['rival']}: geometric mean {entry['geometric_mean']:.2f}×, "
        f"least {entry['least']:.2f}×, greatest {entry['greatest']:.2f}× over {entry['cases']} cases"
        for entry in report.summary()
        if entry["cases"] > 1
    ]


def time_cell(seconds: float | None) -> str:
    """Microseconds, with three significant digits where they are few."""
    if seconds is None:
        return "–"
    micro = 1e6 * seconds
    return f"{micro:.2f}" if micro < 100 else f"{micro:,.0f}" if micro >= 1000 else f"{micro:.1f}"


def share_cell(share: float | None) -> str:
    """A share of a bandwidth, in percent."""
    return "" if share is None else f"{100 * share:.1f} %"


def _rate(row: Row) -> str:
    return f"{row.flops / row.seconds / 1e12:.3g}" if row.flops and row.seconds else ""


def _ratio(row: Row, rival: Rival | None) -> str:
    if rival is None:
        return ""
    ratio = row.ratio(rival)
    return (
        shorten(rival.note, NOTE_WIDTH, placeholder="…") or "–"
        if ratio is None
        else f"{ratio:.2f} ({time_cell(rival.seconds)})"
    )
