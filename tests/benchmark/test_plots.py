from __future__ import annotations

import io

import pytest

from rotquant_tvm.benchmark import plots
from rotquant_tvm.benchmark.plots import check_plot, draw_roofline
from rotquant_tvm.benchmark.report import Bandwidth, Report, Rival, Row
from rotquant_tvm.errors import UsageError

pytest.importorskip("matplotlib")


def drawn(*rows: Row) -> str:
    file = io.BytesIO()
    draw_roofline(Report("decode", "a device", Bandwidth(2e9, 4e9), "a clock", list(rows)), file, ".SVG")
    return file.getvalue().decode()


def test_the_picture_names_every_series_and_the_floors():
    rows = [Row(f"1x{n}", "iso3", n * 1e-6, 4000 * n, "read", (Rival("other", n * 3e-6),)) for n in (1, 8)]
    text = drawn(*rows)
    for label in ("iso3", "other", "copy at 2 GB/s", "read at 4 GB/s", "decode on a device"):
        assert f"<!-- {label}" in text, label


def test_a_report_without_times_is_drawn_too():
    assert "read at 4 GB/s" in drawn(Row("1x1", "iso3", None, 0, "read"))


def test_what_cannot_be_drawn_is_refused_before_the_work(tmp_path, monkeypatch):
    check_plot(tmp_path / "picture.png")
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        check_plot(tmp_path / "picture.txt")
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"rotquant-tvm\[plots\]"):
        check_plot(tmp_path / "picture.png")
