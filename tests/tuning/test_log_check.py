"""Checking a log finds every way in which its files can disagree."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from rotquant_tvm.errors import LogError
from rotquant_tvm.tuning import log_check
from rotquant_tvm.tuning.log_check import STALE, is_stale, log_problems, read_sound_log
from rotquant_tvm.tuning.log_folders import MANIFEST_FILE, RECORD_FILE, WORKLOAD_FILE
from rotquant_tvm.tuning.log_store import read_log, write_log


@pytest.fixture
def folder(log_of, task, tmp_path):
    return log_of(tmp_path, (task, {"splits": 4}, 0.5))


def edit(folder, **changes):
    """Change the one record in the manifest."""
    path = folder / MANIFEST_FILE
    document = json.loads(path.read_text())
    document["records"][0] |= changes
    path.write_text(json.dumps(document))


def test_a_log_as_tuning_leaves_it_has_no_problem(folder):
    assert log_problems(folder) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knobs": {"splits": 8}}, "its trace chooses {'splits': 4}, the manifest says {'splits': 8}"),
        ({"seconds": 0.25}, "the manifest says 0.25"),
        ({"operator": "attention_prefill"}, "another kernel than the manifest says"),
        ({"rule": "attention_decode_gpu"}, "no rule attention_decode_gpu any more"),
        ({"kernel_hash": "0" * 16}, STALE),
    ],
)
def test_what_disagrees_is_named(folder, changes, message):
    edit(folder, **changes)
    problems = log_problems(folder)
    assert any(message in problem for problem in problems)
    assert all(problem.startswith("record 0 (") for problem in problems)


def test_knobs_that_the_rule_has_no_more(folder, monkeypatch):
    monkeypatch.setattr(log_check, "knob_values", lambda rule: {"splits": (1, 2)})
    (problem,) = log_problems(folder)
    assert "does not know splits=4" in problem


def test_a_sound_log_is_read_as_it_is(folder):
    assert read_sound_log(folder) == read_log(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"knobs": {"splits": 8}},
        {"seconds": 0.25},
        {"operator": "attention_prefill"},
    ],
)
def test_a_log_that_is_at_odds_with_itself_is_unsound(folder, changes):
    edit(folder, **changes)
    problems = log_problems(folder)
    with pytest.raises(LogError, match="tune again") as error:
        read_sound_log(folder)
    assert str(error.value).startswith(f"{folder}: {problems[0]}") and error.value.exit_status == 4


@pytest.mark.parametrize("times", ["-0.5", "0", "1e10, -1"])
def test_times_that_are_none_are_unsound(folder, times):
    path = folder / RECORD_FILE
    line = json.loads(path.read_text())
    line[1][1] = json.loads(f"[{times}]")
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(LogError, match=r"record 0 .*: it cannot be read: a record's times"):
        read_sound_log(folder)


def test_knobs_outside_of_the_space_are_unsound(folder, monkeypatch):
    """Of the kernel that there is; an older one may have had another space."""
    monkeypatch.setattr(log_check, "knob_values", lambda rule: {"splits": (1, 2)})
    with pytest.raises(LogError, match=r"record 0 .*: the rule does not know splits=4"):
        read_sound_log(folder)
    edit(folder, kernel_hash="0" * 16)
    problems = [problem.partition("): ")[2] for problem in log_problems(folder)]
    assert problems == ["the rule does not know splits=4", STALE]
    assert read_sound_log(folder) == read_log(folder)


@pytest.mark.parametrize("changes", [{"kernel_hash": "0" * 16}, {"rule": "attention_decode_gpu"}])
def test_a_log_of_another_version_is_sound(folder, changes):
    edit(folder, **changes)
    write_log(folder, replace(read_log(folder), layout_version=0))
    moved = folder.rename(folder.parent / "old")
    assert len(log_problems(moved)) == 3 and len(read_sound_log(moved).entries) == 1


def test_a_folder_by_another_name(folder):
    moved = folder.parent / "nvidia-h100"
    folder.rename(moved)
    assert "called nvidia-h100, and its device llvm-x86-64-v3" in log_problems(moved)[0]


def test_another_layout(folder):
    write_log(folder, replace(read_log(folder), layout_version=0))
    assert "layout 0" in log_problems(folder)[0]


def test_a_line_that_tvm_cannot_read(folder):
    path = folder / RECORD_FILE
    path.write_text(path.read_text().replace("Annotate", "Anotate"))
    problems = log_problems(folder)
    assert any("cannot read" in problem for problem in problems)


def test_a_folder_that_is_no_log(tmp_path):
    (problem,) = log_problems(tmp_path)
    assert str(tmp_path) in problem


def test_staleness(folder):
    log = read_log(folder)
    (entry,) = log.entries
    assert not is_stale(entry.record, "llvm")
    assert is_stale(replace(entry.record, kernel_hash="0" * 16), "llvm")
    assert is_stale(replace(entry.record, rule="other"), "llvm")
    assert is_stale(entry.record, "cuda")  # where the rule is another one


def workload_graph(folder):
    """The graph of objects in a log's workload, and a function that puts another one in its place."""
    path = folder / WORKLOAD_FILE
    key, text = json.loads(path.read_text())
    graph = json.loads(base64.b64decode(text)[8:])

    def write():
        data = json.dumps(graph).encode()
        whole = base64.b64encode(len(data).to_bytes(8, "little") + data).decode()
        path.write_text(json.dumps([key, whole]) + "\n")

    return graph, write


@pytest.mark.parametrize("damage", ["cycle", "nothing", "index"])
def test_a_workload_that_would_end_the_process(folder, damage):
    """TVM follows such objects until it crashes; a check says so and lives."""
    graph, write = workload_graph(folder)
    number, node = next((n, node) for n, node in enumerate(graph["nodes"]) if node["type"] == "tirx.For")
    node["data"] |= {"cycle": {"body": number}, "nothing": {"loop_var": 0}, "index": {"body": -3}}[damage]
    write()
    problems = log_problems(folder)
    assert problems and "TVM cannot read" in problems[0]
    (record,) = read_log(folder).records  # whoever only looks records up never has TVM read it
    assert record.knobs == {"splits": 4}
