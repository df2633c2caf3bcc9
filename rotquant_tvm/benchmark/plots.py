"""The roofline picture: time against bytes, with the floor that the measured bandwidth sets."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

from rotquant_tvm.errors import UsageError

from .report import Point, Report

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Raise ``UsageError`` if the picture could not be drawn here, or not of that kind."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {file}: the name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs the package matplotlib: pip install 'rotquant-tvm[plots]'")


def draw_roofline(report: Report, file: BinaryIO, suffix: str) -> None:
    """Draw every time in the report over the bytes of its case, log-log, as the picture that ``suffix`` names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    series: defaultdict[str, list[Point]] = defaultdict(list)
    for point in report.points():
        series[point.series].append(point)
    ours = {row.subject for row in report.rows}
    for name, points in series.items():
        points.sort(key=lambda point: point.nbytes)
        marker, fill = ("o", "full") if name in ours else ("s", "none")
        x, y = [p.nbytes / 1e6 for p in points], [1e6 * p.seconds for p in points]
        axes.plot(x, y, marker=marker, fillstyle=fill, markersize=5, linewidth=0.8, label=name)
    sizes = sorted(point.nbytes for points in series.values() for point in points)
    for kind, style in (("copy", "--"), ("read", "-")):
        rate = getattr(report.bandwidth, kind)
        ends = [sizes[0] / 1.5, sizes[-1] * 1.5] if sizes else [1e5, 1e9]
        label = f"{kind} at {rate / 1e9:,.0f} GB/s"
        axes.plot([n / 1e6 for n in ends], [1e6 * n / rate for n in ends], style, color="#555555", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB read and written, at least")
    axes.set_ylabel("µs per call")
    axes.set_title(f"{report.operation} on {report.device} (median, {report.clock})", loc="left", fontsize=10)
    axes.grid(True, which="both", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, format=suffix.removeprefix(".").lower(), dpi=160)
