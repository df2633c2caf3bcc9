"""A device's log: written whole, read back, merged, and refused when damaged."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from tvm.s_tir import meta_schedule as ms

from rotquant_tvm.errors import LogError, UsageError
from rotquant_tvm.tuning.log_folders import MANIFEST_FILE, PENDING_FILE, RECORD_FILE, WORKLOAD_FILE, is_log, log_folders
from rotquant_tvm.tuning.log_store import finish_write, read_log, write_log
from rotquant_tvm.tuning.tuning_task import tuning_tasks


@pytest.fixture(scope="module")
def tasks(definitions, llvm):
    functions = [definitions(name)["attention_decode"] for name in ("hurwitz3", "hurwitz4")]
    return tuning_tasks(functions, llvm)


@pytest.fixture
def folder(log_of, tasks, tmp_path):
    return log_of(tmp_path, *((task, {"splits": 2}, 0.5) for task in tasks))


def test_a_log_is_read_as_it_was_written(folder, tasks):
    log = read_log(folder)
    assert {record.key for record in log.records} == {
        json.dumps([t.shape.operator, t.shape.essence(), t.bucket], sort_keys=True) for t in tasks
    }
    write_log(folder.parent / "again", log)
    assert read_log(folder.parent / "again") == log
    for name in (MANIFEST_FILE, WORKLOAD_FILE, RECORD_FILE):
        assert (folder / name).read_text() == (folder.parent / "again" / name).read_text()


def test_the_database_is_metaschedules_own(folder, tasks):
    """Any user of TVM can open it, and find the workload."""
    database = ms.database.JSONDatabase(work_dir=str(folder), allow_missing=False)
    assert len(database) == len(tasks) == 4
    assert all(database.has_workload(task.workload) for task in tasks)
    assert len((folder / WORKLOAD_FILE).read_text().splitlines()) == 2  # buckets of one kernel share theirs
    best = database.query_tuning_record(tasks[0].workload, tasks[0].target, "main")
    assert [float(seconds) for seconds in best.run_secs] == [0.5]


def test_nothing_but_the_three_files_is_left(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST_FILE, WORKLOAD_FILE, RECORD_FILE])


def test_of_two_records_of_one_task_the_faster_is_kept(log_of, tasks, tmp_path):
    one = read_log(log_of(tmp_path / "a", (tasks[0], {"splits": 2}, 0.5), (tasks[1], {"splits": 2}, 0.5)))
    other = read_log(log_of(tmp_path / "b", (tasks[1], {"splits": 4}, 0.4), (tasks[2], {"splits": 8}, 0.3)))
    for log in (one.merged(other.entries), other.merged(one.entries)):
        assert sorted((r.seconds, r.knobs["splits"]) for r in log.records) == [(0.3, 8), (0.4, 4), (0.5, 2)]


def test_records_of_a_newer_kernel_replace_faster_ones_of_an_older(log_of, tasks, tmp_path):
    log = read_log(log_of(tmp_path, (tasks[0], {"splits": 2}, 0.5)))
    (entry,) = log.entries
    newer = replace(entry, record=replace(entry.record, kernel_hash="1" * 16, seconds=0.9, date="2999-01-01"))
    assert log.merged([newer]).records == [newer.record]
    assert replace(log, entries=(newer,)).merged([entry]).records == [newer.record]


def test_folders(folder, tmp_path):
    assert log_folders(folder) == [folder] and log_folders(tmp_path) == [folder]
    assert log_folders(tmp_path / "nowhere") == [] and not is_log(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (MANIFEST_FILE, lambda text: text[: len(text) // 2], "damaged"),
        (MANIFEST_FILE, lambda text: text.replace('"version": 1', '"version": 2'), "version 1 of"),
        (MANIFEST_FILE, lambda text: text.replace('"knobs"', '"nobs"'), "damaged"),
        (RECORD_FILE, lambda text: "\n".join(text.splitlines()[:-1]), "4 records in manifest.json, 3 in"),
        (RECORD_FILE, lambda text: text.replace("[0,", "[7,", 1), "damaged"),
        (WORKLOAD_FILE, lambda text: text[:100], "damaged"),
        (WORKLOAD_FILE, None, "no tuning log"),
    ],
)
def test_a_damaged_log_is_refused_by_name(folder, name, change, message):
    path = folder / name
    path.write_text(change(path.read_text())) if change else path.unlink()
    with pytest.raises(LogError, match=message) as error:
        read_log(folder)
    assert str(folder) in str(error.value)


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the tuning log"):
        write_log(tmp_path / "file" / "x", read_log(folder))


@pytest.fixture
def two_logs(folder):
    """A log, and one with half of its records."""
    log = read_log(folder)
    return log, replace(log, entries=log.entries[:2])


@pytest.mark.parametrize("step", range(5))
def test_a_write_that_is_cut_short(folder, two_logs, step, monkeypatch):
    """After it there is the old log or the new one, whole; who tunes next finishes what was begun."""
    old, new = two_logs
    replace_file, left = os.replace, iter(range(step))

    def cut(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with suppress(KeyboardInterrupt):
        write_log(folder, new)
    monkeypatch.setattr(os, "replace", replace_file)
    assert read_log(folder) == (new if step else old)
    (folder / f".{MANIFEST_FILE}.x").write_text("{")
    finish_write(folder)
    assert read_log(folder) == (new if step else old)
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST_FILE, WORKLOAD_FILE, RECORD_FILE])
    assert len((folder / RECORD_FILE).read_text().splitlines()) == len((new if step else old).entries)


def test_a_process_that_is_killed_while_it_writes(folder, two_logs):
    rng = random.Random(0)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for log in two_logs:
                        write_log(folder, log)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert read_log(folder) in two_logs
        finish_write(folder)
        assert read_log(folder) in two_logs and len(list(folder.iterdir())) == 3


def test_a_full_disk_leaves_the_old_log(folder, two_logs, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot write the tuning log .*No space left on device"):
        write_log(folder, two_logs[1])
    assert read_log(folder) == two_logs[0] and len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"manifest.json": 7}'])
def test_a_damaged_pending_write(folder, text):
    (folder / PENDING_FILE).write_text(text)
    with pytest.raises(LogError, match="damaged"):
        read_log(folder)
