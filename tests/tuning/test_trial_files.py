"""The files of trials: whole lines whatever happens, and nothing but data in them."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest

from rotquant_tvm.errors import LogError, UsageError
from rotquant_tvm.tuning.isolated import call_isolated
from rotquant_tvm.tuning.log_folders import RECORD_FILE, WORKLOAD_FILE
from rotquant_tvm.tuning.trial_files import open_trials

WORKLOADS = [["11", "first"], ["22", "second"]]


def record(value, seconds=1e-3):
    """A record whose trace chooses one knob."""
    trace = [
        [
            ["SampleCategorical", [], [[1, 2, 4], [0.3, 0.3, 0.4]], ["v0"]],
            ["GetSBlock", [], ["root", "main"], ["b1"]],
            ["Annotate", ["b1", "v0"], ["rotquant.knob.splits"], []],
        ],
        [[0, [1, 2, 4].index(value)]],
    ]
    return [trace, [seconds], {"kind": "llvm"}, [["TENSOR", "float32", [2, 3]]]]


def filled(folder, count=3):
    with open_trials(folder) as files:
        for number in range(count):
            files.add(WORKLOADS[number % 2], record(1 << number % 3))
    return {name: (folder / name).read_text() for name in (WORKLOAD_FILE, RECORD_FILE)}


def test_what_was_written_is_there_again(tmp_path):
    filled(tmp_path)
    with open_trials(tmp_path) as files:
        assert len(files) == 3
        assert files.of(WORKLOADS[0]) == [record(1), record(4)] and files.of(WORKLOADS[1]) == [record(2)]
        assert files.of(["33", "first"]) == []


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    """Even one of which nothing but its end is missing: the next would be glued to it."""
    texts = filled(tmp_path)
    (tmp_path / RECORD_FILE).write_text(texts[RECORD_FILE][:-cut])
    with open_trials(tmp_path) as files:
        assert len(files) == 2
        files.add(WORKLOADS[0], record(4))
    assert (tmp_path / RECORD_FILE).read_text() == texts[RECORD_FILE]


def test_records_of_a_workload_that_was_cut_off_are_dropped(tmp_path):
    texts = filled(tmp_path)
    (tmp_path / WORKLOAD_FILE).write_text(texts[WORKLOAD_FILE][:-4])
    with open_trials(tmp_path) as files:
        assert files.of(WORKLOADS[0]) == [record(1)] and len(files) == 1  # nothing behind a damaged line is trusted


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "[]",
        '["0", []]',
        "[7, []]",
        "[true, []]",
        "[0, {}]",
        "[0, [[[], []], [0.0], {}, []]]",
        "[0, [[[], []], [NaN], {}, []]]",
        '[0, [[[["Unroll", [], [], []]], []], [1.0], {}, []]]',
        '[0, [[[["Annotate", ["b", "v"], ["unrolled"], []]], []], [1.0], {}, []]]',
        '[0, [[[["SampleCategorical", [], [[1]], ["v"]]], [[0, 9]]], [1.0], {}, []]]',
        "[" * 100_000,
    ],
)
def test_lines_of_anything_else(tmp_path, line):
    texts = filled(tmp_path, 1)
    (tmp_path / RECORD_FILE).write_text(texts[RECORD_FILE] + line + "\n")
    with open_trials(tmp_path) as files:
        assert len(files) == 1
    assert (tmp_path / RECORD_FILE).read_text() == texts[RECORD_FILE]


def test_two_processes_do_not_share_a_folder(tmp_path):
    with open_trials(tmp_path), pytest.raises(UsageError, match="in use"), open_trials(tmp_path):
        pass
    with open_trials(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"), open_trials(tmp_path / "file" / "trials"):
        pass


def test_a_disk_that_fills_in_the_middle_of_a_line(tmp_path, monkeypatch):
    texts, write = filled(tmp_path), os.write

    def full(descriptor, data):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(RECORD_FILE):
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data[: len(data) // 2])
        return write(descriptor, data)

    with open_trials(tmp_path) as files:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UsageError, match="No space left on device; what was measured before is kept"):
            files.add(WORKLOADS[1], record(4))
        assert len(files) == 3 and (tmp_path / RECORD_FILE).read_text() == texts[RECORD_FILE]
        monkeypatch.setattr(os, "write", write)  # there is room again
        files.add(WORKLOADS[1], record(4))
    with open_trials(tmp_path) as files:
        assert len(files) == 4


def test_trials_that_are_no_text_are_refused_with_what_to_do(tmp_path):
    (tmp_path / RECORD_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(LogError, match=r"damaged trials .* remove that folder"), open_trials(tmp_path):
        pass


def _write_to_the_limit(folder, limit):
    """In a process whose files may not grow beyond a limit: what could be written, and how it ended."""
    from pathlib import Path

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open_trials(Path(folder)) as files:
        try:
            while True:
                files.add(WORKLOADS[0], record(1))
        except UsageError as error:
            return [len(files), str(error)]


@pytest.mark.parametrize("limit", [1000, 1001, 1777])
def test_a_real_limit(tmp_path, limit):
    written, message = call_isolated(60, _write_to_the_limit, str(tmp_path), limit)
    assert written > 3 and "File too large" in message
    lines = (tmp_path / RECORD_FILE).read_text().splitlines()
    assert len(lines) == written and all(json.loads(line) == [0, record(1)] for line in lines)
    with open_trials(tmp_path) as files:
        assert len(files) == written


def test_what_a_process_that_was_ended_was_writing_is_cleared_away(tmp_path):
    filled(tmp_path)
    (tmp_path / f".{RECORD_FILE}.x7").write_text("[0,")
    with open_trials(tmp_path) as files:
        assert len(files) == 3
    assert not list(tmp_path.glob(".*.x7"))
