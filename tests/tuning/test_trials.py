"""The database of trials: it survives what interrupts it, belongs to one process, and gives the best."""

from __future__ import annotations

import json
import math

import pytest
from tvm.s_tir import meta_schedule as ms

from rotquant_tvm.errors import UsageError
from rotquant_tvm.tuning.log_folders import RECORD_FILE, WORKLOAD_FILE
from rotquant_tvm.tuning.trials import best_entry, open_trials, trials_of, typical_seconds
from rotquant_tvm.tuning.tuning_task import tuning_tasks

from .conftest import trial


def commit(database, *trials):
    for entry in trials:
        workload = database.commit_workload(entry.record.workload.mod)
        record = entry.record
        database.commit_tuning_record(
            ms.database.TuningRecord(record.trace, workload, record.run_secs, record.target, record.args_info)
        )


def test_what_was_measured_is_there_again(task, tmp_path):
    with open_trials(tmp_path) as database:
        assert trials_of(task, database) == []
        commit(database, trial(task, {"splits": 4}, 2e-3), trial(task, {}, 1e-3), trial(task, {"splits": 1}, 1e10))
    with open_trials(tmp_path) as database:
        found = trials_of(task, database)
    assert [(entry.knobs, entry.seconds) for entry in found] == [
        ({}, pytest.approx(1e-3)),
        ({"splits": 4}, pytest.approx(2e-3)),
        ({"splits": 1}, math.inf),
    ]


def test_buckets_and_kernels_are_told_apart(task, definitions, llvm, tmp_path):
    other_bucket = tuning_tasks([definitions()["attention_decode"]], llvm)[1]
    other_kernel = tuning_tasks([definitions("hurwitz4")["attention_decode"]], llvm)[0]
    with open_trials(tmp_path) as database:
        commit(database, trial(task, {}, 1e-3))
        assert trials_of(other_bucket, database) == trials_of(other_kernel, database) == []
        assert len(trials_of(task, database)) == 1


def test_a_changed_kernel_has_no_trials(task, tmp_path):
    """Else a rule that was made faster would be judged by what it was."""
    changed = type(task)(task.definition, task.target, task.bucket)
    changed.__dict__["kernel_hash"] = "0" * 16
    with open_trials(tmp_path) as database:
        commit(database, trial(task, {}, 1e-3))
        assert trials_of(changed, database) == []


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_off_is_dropped(task, tmp_path, cut):
    with open_trials(tmp_path) as database:
        commit(database, trial(task, {}, 1e-3), trial(task, {"splits": 2}, 2e-3))
    path = tmp_path / RECORD_FILE
    path.write_text(path.read_text()[:-cut])
    with open_trials(tmp_path) as database:
        assert [entry.knobs for entry in trials_of(task, database)] == ([{}] if cut > 1 else [{}, {"splits": 2}])


def test_records_of_a_workload_that_was_cut_off_are_dropped(task, tmp_path):
    with open_trials(tmp_path) as database:
        commit(database, trial(task, {}, 1e-3))
    path = tmp_path / WORKLOAD_FILE
    path.write_text(path.read_text()[:1000])
    with open_trials(tmp_path) as database:
        assert len(database) == 0


def test_two_processes_do_not_share_a_folder(tmp_path):
    with open_trials(tmp_path), pytest.raises(UsageError, match="in use"), open_trials(tmp_path):
        pass
    with open_trials(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"), open_trials(tmp_path / "file" / "trials"):
        pass


def test_the_best_is_recorded_with_what_it_moves(task):
    trials = [trial(task, {}, 2e-3), trial(task, {"splits": 8}, 1e-3), trial(task, {"splits": 1}, math.inf)]
    entry = best_entry(task, trials, 1e9)
    record = entry.record
    assert (record.knobs, record.seconds, record.rule_seconds, record.trials) == ({"splits": 8}, 1e-3, 2e-3, 3)
    assert record.share == pytest.approx(task.measurement.moved_bytes() / 1e-3 / 1e9, rel=1e-4)
    assert (record.rule, record.kernel_hash) == ("attention_decode_llvm", task.kernel_hash)
    assert record.shape == task.shape and record.bucket == task.bucket
    json.dumps([vars(record), entry.workload, entry.tuning_record])


def test_a_kernel_that_is_hardly_faster_does_not_replace_the_rules_own(task):
    entry = best_entry(task, [trial(task, {}, 1e-3), trial(task, {"splits": 8}, 0.995e-3)], None)
    assert entry.record.knobs == {} and entry.record.seconds == 1e-3 and entry.record.share is None


def test_where_everything_failed_there_is_no_record(task):
    assert best_entry(task, [], 1e9) is None
    assert best_entry(task, [trial(task, {}, math.inf)], 1e9) is None
    only = best_entry(task, [trial(task, {"splits": 2}, 1e-3), trial(task, {}, math.inf)], 1e9).record
    assert only.knobs == {"splits": 2} and only.rule_seconds is None


def test_medians():
    assert typical_seconds([1.0, 9.0, 2.0]) == 2.0
    assert typical_seconds([]) == typical_seconds(None) == typical_seconds([1.0, 1e10]) == math.inf
