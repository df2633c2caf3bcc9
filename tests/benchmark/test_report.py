from __future__ import annotations

import json
import math

import pytest

from rotquant_tvm.benchmark.report import ERROR_BAR, Bandwidth, Point, Report, Rival, Row
from rotquant_tvm.cli.bench_table import NOTE_WIDTH, report_table, share_cell, shown, summary_lines, time_cell
from rotquant_tvm.errors import FormatError


def made(*rows: Row) -> Report:
    return Report("decode", "a device", Bandwidth(2e9, 4e9), "a clock", list(rows))


def row(case="1x8", seconds=2e-6, bound="read", **options) -> Row:
    return Row(case, "iso3", seconds, 4000, bound, **options)


def test_floor_and_share_are_of_the_bandwidth_that_bounds():
    report = made()
    assert report.floor(row()) == pytest.approx(1e-6) and report.share(row()) == pytest.approx(0.5)
    assert report.floor(row(bound="copy")) == pytest.approx(2e-6)
    assert report.share(row(bound="copy")) == pytest.approx(1)
    assert report.floor(row(bound=None)) is None and report.share(row(bound=None)) is None
    assert report.share(row(seconds=None)) is None


def test_a_ratio_says_how_many_times_faster_we_are():
    assert row().ratio(Rival("other", 6e-6)) == pytest.approx(3)
    assert row().ratio(Rival("other", None, "failed")) is None
    assert row(seconds=None).ratio(Rival("other", 6e-6)) is None


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ({}, True),
        ({"error": ERROR_BAR}, True),
        ({"error": 1.01 * ERROR_BAR}, False),
        ({"error": math.inf}, False),
        ({"seconds": None}, False),
        ({"seconds": None, "refused": True}, True),
    ],
)
def test_a_report_passes_if_every_case_ran_right_or_does_not_exist(options, passed):
    assert made(row(), row(**options)).passed == passed


def test_a_case_that_could_not_be_prepared_is_refused_or_failed():
    refused = Row.without_time("c", "iso3", FormatError("no such dim"))
    failed = Row.without_time("c", "iso3", RuntimeError("first\n  last line"))
    assert refused.passed and refused.note == "no such dim"
    assert not failed.passed and failed.note == "failed: first last line"


def test_the_summary_is_a_geometric_mean_over_cases():
    report = made(row(rivals=(Rival("other", 2e-6),)), row("1x9", rivals=(Rival("other", 8e-6), Rival("slow", None))))
    assert report.summary() == [
        {"subject": "iso3", "rival": "other", "cases": 2, "geometric_mean": pytest.approx(2), "least": 1, "greatest": 4}
    ]
    assert summary_lines(report) == [
        "iso3 against other: geometric mean 2.00×, least 1.00×, greatest 4.00× over 2 cases"
    ]
    assert summary_lines(made(row(rivals=(Rival("other", 2e-6),)))) == []


def test_points_are_ours_and_each_rival_once_at_its_own_bytes():
    rival = Rival("other", 6e-6, nbytes=16000)
    report = made(row(rivals=(rival, Rival("none", None))), row("1x9", 3e-6, rivals=(rival,)))
    assert report.points() == [
        *(Point("iso3", 4000, seconds) for seconds in (2e-6, 3e-6)),
        Point("other", 16000, 6e-6),
    ]


def test_the_document_holds_plain_figures():
    document = made(row(rivals=(Rival("other", 6e-6),), error=1e-4, flops=4e6, kernel="rule")).document()
    assert json.loads(json.dumps(document)) == document
    (record,) = document["rows"]
    assert record["microseconds"] == pytest.approx(2) and record["floor_microseconds"] == pytest.approx(1)
    assert record["share"] == pytest.approx(0.5) and record["teraflops"] == pytest.approx(2)
    assert record["rivals"][0]["ratio"] == pytest.approx(3) and document["passed"]


def test_the_table_has_a_column_per_rival():
    report = made(row(rivals=(Rival("a", 6e-6),)), row("1x9", rivals=(Rival("b", None, "failed: " + "very " * 40),)))
    columns = {column.header: list(column.cells) for column in report_table(report).columns}
    assert columns["× a (µs)"] == ["3.00 (6.00)", ""]
    assert columns["× b (µs)"][1].startswith("failed") and len(columns["× b (µs)"][1]) <= NOTE_WIDTH
    assert columns["of floor"] == ["50.0 %"] * 2 and "error" not in columns and "TFLOP/s" not in columns
    assert "TFLOP/s" in {column.header for column in report_table(made(row(flops=1e6))).columns}
    assert "copy 2 GB/s, read 4 GB/s" in shown(report)[0]


def test_cells():
    assert [time_cell(s) for s in (None, 1.234e-6, 123.4e-6, 5.678e-3)] == ["–", "1.23", "123.4", "5,678"]
    assert share_cell(None) == "" and share_cell(0.9) == "90.0 %"
