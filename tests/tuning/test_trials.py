"""The database of trials: it survives what interrupts it, belongs to one process, and gives the best."""

from __future__ import annotations

import json
import math

import pytest

from rotquant_tvm.tuning.roofline import Roofline
from rotquant_tvm.tuning.trace_document import typical_seconds
from rotquant_tvm.tuning.trial_files import open_trials
from rotquant_tvm.tuning.trials import best_entry, trials_of
from rotquant_tvm.tuning.tuning_task import tuning_tasks

from .conftest import trial


def commit(files, task, *trials):
    for entry in trials:
        files.add(task.workload_document, entry.record)


def test_what_was_measured_is_there_again(task, tmp_path):
    with open_trials(tmp_path) as files:
        assert trials_of(task, files) == []
        commit(files, task, trial(task, {"splits": 4}, 2e-3), trial(task, {}, 1e-3), trial(task, {"splits": 1}, 1e10))
    with open_trials(tmp_path) as files:
        found = trials_of(task, files)
    assert [(entry.knobs, entry.seconds) for entry in found] == [
        ({}, pytest.approx(1e-3)),
        ({"splits": 4}, pytest.approx(2e-3)),
        ({"splits": 1}, math.inf),
    ]


def test_buckets_and_kernels_are_told_apart(task, definitions, llvm, tmp_path):
    other_bucket = tuning_tasks([definitions()["attention_decode"]], llvm)[1]
    other_kernel = tuning_tasks([definitions("hurwitz4")["attention_decode"]], llvm)[0]
    with open_trials(tmp_path) as files:
        commit(files, task, trial(task, {}, 1e-3))
        assert trials_of(other_bucket, files) == trials_of(other_kernel, files) == []
        assert len(trials_of(task, files)) == 1


def test_a_changed_kernel_has_no_trials(task, tmp_path):
    """Else a rule that was made faster would be judged by what it was."""
    changed = type(task)(task.definition, task.target, task.bucket)
    changed.__dict__["kernel_hash"] = "0" * 16
    with open_trials(tmp_path) as files:
        commit(files, task, trial(task, {}, 1e-3))
        assert trials_of(changed, files) == []


def test_the_best_is_recorded_with_what_it_moves(task):
    trials = [trial(task, {}, 2e-3), trial(task, {"splits": 8}, 1e-3), trial(task, {"splits": 1}, math.inf)]
    entry = best_entry(task, trials, Roofline(1e9))
    record = entry.record
    assert (record.knobs, record.seconds, record.rule_seconds, record.trials) == ({"splits": 8}, 1e-3, 2e-3, 3)
    assert record.share == pytest.approx(task.measurement.moved_bytes() / 1e-3 / 1e9, rel=1e-4)
    assert (record.rule, record.kernel_hash) == ("attention_decode_llvm", task.kernel_hash)
    assert record.shape == task.shape and record.bucket == task.bucket
    json.dumps([vars(record), entry.workload, entry.tuning_record])


def test_a_kernel_that_is_hardly_faster_does_not_replace_the_rules_own(task):
    entry = best_entry(task, [trial(task, {}, 1e-3), trial(task, {"splits": 8}, 0.995e-3)], Roofline())
    assert entry.record.knobs == {} and entry.record.seconds == 1e-3 and entry.record.share is None


def test_where_everything_failed_there_is_no_record(task):
    assert best_entry(task, [], Roofline(1e9)) is None
    assert best_entry(task, [trial(task, {}, math.inf)], Roofline(1e9)) is None
    only = best_entry(task, [trial(task, {"splits": 2}, 1e-3), trial(task, {}, math.inf)], Roofline(1e9)).record
    assert only.knobs == {"splits": 2} and only.rule_seconds is None


def test_medians():
    assert typical_seconds([1.0, 9.0, 2.0]) == 2.0
    assert typical_seconds([]) == typical_seconds(None) == typical_seconds([1.0, 1e10]) == math.inf
