"""``tvmc logs``: lists, checks, compares and merges."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.target import resolve_target
from rotquant_tvm.tuning.bare_model import AttentionHeads, bare_model
from rotquant_tvm.tuning.log_folders import user_logs
from rotquant_tvm.tuning.log_store import LogEntry, read_log, write_log
from rotquant_tvm.tuning.task_sources import pass_definitions
from rotquant_tvm.tuning.tuning_task import tuning_tasks

from ..tuning.conftest import write_results


@pytest.fixture(autouse=True)
def only_these_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("rotquant_tvm.tuning.log_folders.packaged_logs", lambda: tmp_path / "packaged")


@pytest.fixture(scope="module")
def tasks():
    target = resolve_target("llvm -mcpu=x86-64-v3")
    definitions = pass_definitions(
        bare_model(AttentionHeads(4, 2, 64, "float32")), KVCacheConfig.parse("hurwitz3"), target
    )
    return tuning_tasks(definitions, target)


@pytest.fixture
def log(tasks, tmp_path) -> Path:
    return write_results(tmp_path / "logs", (tasks[0], {"splits": 2}, 0.5), (tasks[1], {}, 1.0))


def test_a_list_tells_devices_and_records(tvmc, log):
    ended = tvmc("logs", "list", log.parent)
    assert ended.status == 0 and "a CPU (x86-64-v3)" in ended.out
    line = next(line for line in ended.out.splitlines() if "splits=2" in line)
    assert "1x1K" in line and "2.00×" in line and "hurwitz3 4/2x64 float32" in line
    assert "the rule's own" in ended.out
    (document,) = tvmc("logs", "list", log, "--json").document["logs"]
    assert document["device"]["slug"] == "llvm-x86-64-v3" and len(document["records"]) == 2
    assert [record["stale"] for record in document["records"]] == [False, False]


def test_without_a_path_the_logs_that_a_compile_sees(tvmc, log, tmp_path):
    assert "tvmc tune makes one" in tvmc("logs", "list").out
    assert tvmc("logs", "check").status == 0
    shutil.copytree(log, user_logs() / log.name)
    shutil.copytree(log, tmp_path / "packaged" / log.name)
    folders = [entry["folder"] for entry in tvmc("logs", "list", "--json").document["logs"]]
    assert folders == [str(user_logs() / log.name), str(tmp_path / "packaged" / log.name)]


def test_stale_records_are_marked_and_fail_the_check(tvmc, log):
    found = read_log(log)
    first, *rest = found.entries
    old = replace(first, record=replace(first.record, kernel_hash="0" * 16))
    write_log(log, replace(found, entries=(old, *rest)))
    assert sum("stale" in line.split() for line in tvmc("logs", "list", log).out.splitlines()) == 1
    ended = tvmc("logs", "check", log)
    assert ended.status == 1 and "the kernel has changed since" in ended.out and ended.err == ""


def test_a_check_is_a_document_with_json(tvmc, log):
    ended = tvmc("logs", "check", log.parent, "--json")
    assert ended.status == 0 and ended.document == {"logs": [{"folder": str(log), "problems": []}]}
    (log / "database_workload.json").unlink()
    ended = tvmc("logs", "check", log.parent, "--json")
    assert ended.status == 1 and "no tuning log" in ended.document["logs"][0]["problems"][0]


def test_merging_keeps_the_faster(tvmc, log, tasks, tmp_path):
    other = write_results(tmp_path / "other", (tasks[0], {"splits": 8}, 0.25), (tasks[1], {"splits": 4}, 2.0))
    ended = tvmc("logs", "merge", log.parent, other, "-o", tmp_path / "merged", "--json")
    assert ended.status == 0, ended.err
    merged = read_log(tmp_path / "merged" / log.name)
    assert sorted((r.seconds, tuple(r.knobs.items())) for r in merged.records) == [(0.25, (("splits", 8),)), (1.0, ())]
    assert tvmc("logs", "check", tmp_path / "merged").status == 0
    assert ended.document["logs"] == [{"folder": str(tmp_path / "merged" / log.name), "records": 2, "stale": 0}]


def test_merging_takes_no_record_of_an_older_kernel(tvmc, log, tasks, tmp_path):
    """Faster or not: the times of a kernel that is no more say nothing. A check tells which ones those are."""
    found = read_log(log)
    past = {"kernel_hash": "0" * 16, "seconds": 1e-9, "date": "2999-01-01"}
    old = [
        LogEntry(replace(record, **past), entry.workload, [line[0], [1e-9], *line[2:]])
        for entry in found.entries
        for record, line in ((entry.record, entry.tuning_record),)
    ]
    other = write_results(tmp_path / "other", (tasks[0], {"splits": 8}, 0.25))
    write_log(other, replace(read_log(other), entries=tuple(old)))
    for order in ((other, log), (log, other)):
        ended = tvmc("logs", "merge", *order, "-o", tmp_path / "merged" / order[0].parent.name)
        assert ended.status == 0 and "changed since" not in ended.out
        assert read_log(tmp_path / "merged" / order[0].parent.name / log.name).records == found.records
    assert "2 of them of kernels that have changed since" in tvmc("logs", "merge", other, "-o", tmp_path / "old").out
    assert sum("the kernel has changed since" in line for line in tvmc("logs", "check", other).out.splitlines()) == 2
    kinds = {change["change"] for change in tvmc("logs", "diff", other, log, "--json").document["changes"]}
    assert kinds == {"kernel"}


HOSTILE = {
    "markup": {"device": {"name": "[/bold] [link=file:///etc]x[/link]"}},
    "escapes": {"device": {"name": "x\x1b]0;title\x07"}},
    "slug": {"device": {"slug": "../../escaped"}},
    "device": {"device": 7},
    "records": {"records": {}},
    "numbers": {"copy_bandwidth": -1},
}


@pytest.mark.parametrize("action", [("list",), ("check",), ("merge", "-o", "OUT"), ("diff", "LOG")])
@pytest.mark.parametrize("name", HOSTILE)
def test_logs_from_anywhere(tvmc, log, tmp_path, name, action):
    """They are shown, or refused in one line; nothing is written outside of the output folder."""
    hostile = tmp_path / "hostile" / log.name
    shutil.copytree(log, hostile)
    manifest = json.loads((hostile / "manifest.json").read_text())
    for key, value in HOSTILE[name].items():
        manifest[key] = manifest[key] | value if isinstance(value, dict) and value else value
    (hostile / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    paths = {"OUT": tmp_path / "out", "LOG": log}
    ended = tvmc("logs", action[0], hostile, *(paths.get(word, word) for word in action[1:]))
    assert ended.status in (0, 1, 2, 4) and "\x1b" not in ended.out + ended.err
    if name == "markup" and action[0] == "list":
        assert "[/bold]" in ended.out
    elif name != "markup":
        assert ended.status == (1 if action[0] == "check" else 4)
        assert "damaged tuning log" in (ended.out if action[0] == "check" else ended.error)
    outside = [str(path) for path in tmp_path.rglob("*") if not str(path).startswith(str(tmp_path / "out"))]
    assert sorted(outside) == before


def test_merging_into_a_folder_with_logs_adds_to_them(tvmc, log, tasks, tmp_path):
    other = write_results(tmp_path / "other", (tasks[0], {"splits": 8}, 0.25))
    assert tvmc("logs", "merge", other, "-o", log.parent).status == 0
    assert {record.seconds for record in read_log(log).records} == {0.25, 1.0}


def test_logs_of_two_devices_are_not_mixed(tvmc, log, tasks, tmp_path):
    other = write_results(tmp_path / "other", (tasks[0], {"splits": 8}, 0.25))
    manifest = other / "manifest.json"
    document = json.loads(manifest.read_text())
    document["device"]["name"] = "another CPU"
    manifest.write_text(json.dumps(document))
    before = (log / "manifest.json").read_text()
    ended = tvmc("logs", "merge", other, "-o", log.parent)
    assert ended.status == 2 and "another CPU" in ended.error and "do not compare" in ended.error
    assert (log / "manifest.json").read_text() == before


def test_a_diff_tells_what_changed(tvmc, log, tasks, tmp_path):
    other = write_results(tmp_path / "other", (tasks[0], {"splits": 8}, 0.25))
    ended = tvmc("logs", "diff", log, other, "--json")
    assert ended.status == 0, ended.err
    changes = {change["change"]: change for change in ended.document["changes"]}
    assert set(changes) == {"knobs", "removed"}
    assert changes["knobs"]["speedup"] == 2.0 and changes["knobs"]["new"]["knobs"] == {"splits": 8}
    assert changes["removed"]["new"] is None and changes["removed"]["speedup"] is None
    back = {change["change"] for change in tvmc("logs", "diff", other, log, "--json").document["changes"]}
    assert back == {"knobs", "added"}
    shown = tvmc("logs", "diff", log.parent, other).out
    assert "2.00×" in shown and "splits=2" in shown and "splits=8" in shown and "0 records are the same" in shown
    assert "2 records are the same" in tvmc("logs", "diff", log, log).out


def test_logs_of_two_devices_are_not_compared(tvmc, log, tasks, tmp_path):
    other = write_results(tmp_path / "other", (tasks[0], {}, 0.25))
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"a CPU"', '"another CPU"'))
    ended = tvmc("logs", "diff", log, other)
    assert ended.status == 2 and "another CPU" in ended.error and "do not compare" in ended.error


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("diff", "LOG"), "two logs"),
        (("diff", "LOG", "LOG", "-o", "OUT"), "takes no -o"),
        (("merge", "LOG"), "-o DIR"),
        (("merge", "-o", "OUT"), "the folders to merge"),
        (("merge", "LOG", "-o", "LOG"), "the log of one device"),
        (("list", "-o", "OUT"), "takes no -o"),
        (("forget",), "forget"),
        (("lst",), "invalid choice: 'lst'; did you mean list"),
        ((), "action"),
    ],
)
def test_bad_arguments(tvmc, log, tmp_path, arguments, fragment):
    paths = {"LOG": log, "OUT": tmp_path / "out"}
    ended = tvmc("logs", *(paths.get(word, word) for word in arguments))
    assert ended.status == 2 and fragment in ended.error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", [("list",), ("check",), ("merge", "-o", "OUT"), ("diff", "LOG")])
@pytest.mark.parametrize(("name", "fragment"), [("nothing", "no folder"), ("empty", "has no tuning log")])
def test_what_is_no_log_is_refused_as_a_file(tvmc, log, tmp_path, action, name, fragment):
    """As a model's path is."""
    (tmp_path / "empty").mkdir()
    paths = {"LOG": log, "OUT": tmp_path / "out"}
    ended = tvmc("logs", action[0], tmp_path / name, *(paths.get(word, word) for word in action[1:]))
    assert ended.status == 4 and fragment in ended.error and not (tmp_path / "out").exists()


UNSOUND = {
    "knobs outside of the space": lambda text: text.replace(",32]", ",77]").replace("[[1,1]]", "[[1,5]]"),
    "run times": lambda text: text.replace("[0.5]", "[-0.5]"),
    "NaN": lambda text: text.replace("[0.5]", "[NaN]"),
}


@pytest.mark.parametrize("name", UNSOUND)
@pytest.mark.parametrize("into", [False, True], ids=["from", "into"])
def test_merging_takes_nothing_that_a_check_rejects(tvmc, log, tasks, tmp_path, name, into):
    """Neither from another log nor beside what the output has; nothing is written."""
    path = log / "database_tuning_record.json"
    text = path.read_text()
    path.write_text(UNSOUND[name](text))
    assert path.read_text() != text and tvmc("logs", "check", log).status == 1
    other = write_results(tmp_path / "other", (tasks[0], {"splits": 8}, 0.25))
    given, output = (other, log.parent) if into else (log, other.parent)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    ended = tvmc("logs", "merge", given, "-o", output, "--json")
    assert ended.status == 4 and ended.document["error"]["kind"] == "LogError" and str(log) in ended.error
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["trials", "nbytes"])
def test_negative_counts_are_damage(tvmc, log, tmp_path, name):
    manifest = log / "manifest.json"
    document = json.loads(manifest.read_text())
    document["records"][1][name] = -1
    manifest.write_text(json.dumps(document))
    ended = tvmc("logs", "merge", log, "-o", tmp_path / "out")
    assert ended.status == 4 and f"'{name}' of record 1 is -1" in ended.error
    assert tvmc("logs", "check", log).status == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"version": 1}'])
def test_a_damaged_log_beside_sound_ones_is_told(tvmc, log, tmp_path, content):
    other = shutil.copytree(log, log.parent / "llvm-other")
    (other / "manifest.json").write_bytes(content)
    ended = tvmc("logs", "check", log.parent)
    assert ended.status == 1 and str(other) in ended.out.replace("\n", "") and "ok" in ended.out
    assert tvmc("logs", "merge", log.parent, "-o", tmp_path / "out").status == 4 and not (tmp_path / "out").exists()
    assert tvmc("logs", "list", other).status == tvmc("logs", "diff", log, other).status == 4
    shutil.copytree(log.parent, user_logs())
    ended = tvmc("logs", "list", "--json")  # what a compile finds: the others serve it
    assert [Path(entry["folder"]).name for entry in ended.document["logs"]] == [log.name]
    assert "llvm-other" in ended.err


def test_the_packaged_logs_are_sound(tvmc, monkeypatch):
    """Those in the repository: every file agrees, whether or not a kernel has changed since."""
    from rotquant_tvm.tuning.log_check import STALE, log_problems
    from rotquant_tvm.tuning.log_folders import log_folders

    root = Path(__file__).parents[2] / "tuning_logs"
    for folder in log_folders(root):
        assert [problem for problem in log_problems(folder) if not problem.endswith(STALE)] == []
