"""Tuning for real on this CPU: measure, keep, go on, and compile with what was found."""

from __future__ import annotations

import errno
import json
import sys
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
from rotquant_tvm.schedules.knobs import chosen_knobs
from tvm.s_tir import meta_schedule as ms

from rotquant_tvm.errors import DeviceError, UsageError
from rotquant_tvm.tuning import kernel_runner, search_run, trial_files
from rotquant_tvm.tuning.apply_records import with_record
from rotquant_tvm.tuning.kernel_runner import MeasuringProcess
from rotquant_tvm.tuning.kernel_timer import Timing
from rotquant_tvm.tuning.log_check import log_problems
from rotquant_tvm.tuning.log_store import read_log
from rotquant_tvm.tuning.record_lookup import TuningRecords
from rotquant_tvm.tuning.roofline import Roofline
from rotquant_tvm.tuning.shape_buckets import WantedSizes
from rotquant_tvm.tuning.trials import FOLDER
from rotquant_tvm.tuning.tune import TuningOptions, tune
from rotquant_tvm.tuning.tuning_task import TuningTask, tuning_tasks

OPTIONS = TuningOptions(trials_per_task=4, parallel=1, timing=Timing(2, 2, 1))
CPU_SECONDS = {1: 3e-3, 2: 2e-3, 4: 4e-3, 8: 5e-3, 16: 1e-3, 32: 6e-3}
"""What the fake device takes, by the number of splits."""


class SplitsTask(TuningTask):
    """A task with one knob, whatever others the rule has."""

    @property
    def knobs(self):
        return {"splits": (1, 2, 4, 8, 16, 32)}


@pytest.fixture(scope="module")
def tasks(definitions, llvm):
    found = tuning_tasks([definitions()["attention_decode"]], llvm)
    return [SplitsTask(task.definition, task.target, task.bucket) for task in found]


@pytest.fixture
def fake_device(monkeypatch):
    """Candidates are compiled but not run; the answer depends on the compiled knob alone."""
    measured = []

    class Fake(MeasuringProcess):
        def open(self):
            self.roofline = Roofline(1e11)

        def measure(self, library, args_info):
            splits = Fake.splits_of(library)
            measured.append(splits)
            if splits == 8:
                raise DeviceError("wrong result: out")
            return [CPU_SECONDS[splits]] * 2

        @staticmethod
        def splits_of(library):
            """Read off the scratch that the kernel allocates."""
            return int(json.loads((kernel_runner.Path(library).parent / "knobs.json").read_text()))

    def build(mod, target, folder, portable):
        from rotquant_tvm.schedules.knobs import kernel_for

        from rotquant_tvm.ops.site_shape import SiteShape
        from rotquant_tvm.tuning.knob_space import chosen_definition

        kernel = kernel_for(chosen_definition(mod["main"]), target)
        place = kernel_runner.Path(kernel_runner.tempfile.mkdtemp(dir=folder))
        (place / "knobs.json").write_text(json.dumps(SiteShape.of(kernel).splits))
        return str(place / "kernel.so")

    class Pool:
        """Compiles in this process."""

        def __init__(self, *_):
            pass

        def submit(self, _seconds, function, *arguments):
            future = Future()
            future.set_result(function(*arguments) if arguments else None)
            return future

        def close(self):
            pass

    import tempfile

    monkeypatch.setattr(kernel_runner, "tempfile", tempfile, raising=False)
    monkeypatch.setattr("rotquant_tvm.tuning.tune.MeasuringProcess", Fake)
    monkeypatch.setattr("rotquant_tvm.tuning.kernel_builder.WorkerPool", Pool)
    monkeypatch.setattr("rotquant_tvm.tuning.kernel_builder.build_candidate", build)
    return measured


def test_the_best_of_all_trials_is_kept(tasks, fake_device, tmp_path):
    told = []
    options = replace(OPTIONS, trials_per_task=16)
    result = tune(tasks, tmp_path, options, told.append)
    assert result.folder == tmp_path / "llvm-x86-64-v3" and result.device.slug == "llvm-x86-64-v3"
    for record, task in zip(result.records, tasks, strict=True):
        assert record.bucket == task.bucket
        assert (record.knobs, record.seconds, record.rule_seconds) == ({"splits": 16}, 1e-3, 4e-3)
        assert record.trials == 6
    assert told[-1].done == len(fake_device) == 12 <= told[-1].total <= 14  # two choices are the rule's own
    assert result.measured == 10 and result.finished
    assert {step.task for step in told} == {task.name for task in tasks}
    last = told[-1]
    assert (last.number, last.tasks, last.best, last.rule) == (2, 2, 1e-3, 4e-3)
    assert last.share == pytest.approx(tasks[1].measurement.moved_bytes() / 1e-3 / 1e11)
    assert [step.done for step in told] == sorted(step.done for step in told) and told[0].left > 0
    assert len(result.failures) == 2 and all("wrong result" in failure for failure in result.failures)
    assert log_problems(result.folder) == []


def test_nothing_is_measured_twice(tasks, fake_device, tmp_path):
    first = tune(tasks, tmp_path, OPTIONS)
    count = len(fake_device)
    again = tune(tasks, tmp_path, OPTIONS)
    assert len(fake_device) == count and again.records == first.records and again.measured == 0
    more = tune(tasks, tmp_path, replace(OPTIONS, trials_per_task=16))
    assert len(fake_device) == count + 2 * (6 - 4 + 1)  # the rule's own again, for comparison
    assert {record.knobs["splits"] for record in more.records} == {16}


def test_an_interrupted_run_keeps_what_it_had(tasks, fake_device, tmp_path):
    def interrupt(_step):
        raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        tune(tasks, tmp_path, replace(OPTIONS, trials_per_task=16), interrupt)
    before = len(fake_device)
    assert 0 < before < 12
    log = read_log(tmp_path / "llvm-x86-64-v3")
    assert len(log.entries) == 1 and log_problems(log.path) == []
    tune(tasks, tmp_path, replace(OPTIONS, trials_per_task=16))
    assert len(read_log(log.path).entries) == 2
    assert len(fake_device) <= 12 + 2


def test_a_time_budget(tasks, fake_device, monkeypatch, tmp_path):
    """What is under way when it is over is abandoned, the rest is kept, and the same call goes on."""
    monkeypatch.setattr("rotquant_tvm.tuning.tune.MeasuringProcess.splits_of", _slow_splits)
    options = replace(OPTIONS, trials_per_task=16)
    result = tune(tasks[:1], tmp_path, replace(options, time_budget=0.5))
    assert not result.finished and len(fake_device) < 6
    told = []
    again = tune(tasks[:1], tmp_path, replace(options, time_budget=600), told.append)
    assert again.finished and len(again.records) == 1 and all(0 <= step.left <= 600 for step in told)
    assert len(fake_device) <= 6 + 2  # the rule's own twice, and what was under way


def _slow_splits(library):
    time.sleep(0.2)
    return int(json.loads((kernel_runner.Path(library).parent / "knobs.json").read_text()))


def test_a_full_disk(tasks, fake_device, monkeypatch, tmp_path):
    """The run ends with what is wrong; what was measured before is in the log, and there the next one goes on."""
    append, room = trial_files.append_line, iter(range(3))

    def full(path, line):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, line)

    monkeypatch.setattr(trial_files, "append_line", full)
    options = replace(OPTIONS, trials_per_task=16)
    with pytest.raises(UsageError, match=r"cannot write the trials in .*No space left on device"):
        tune(tasks[:1], tmp_path, options)
    assert log_problems(tmp_path / "llvm-x86-64-v3") == []
    monkeypatch.setattr(trial_files, "append_line", append)
    measured = len(fake_device)
    result = tune(tasks[:1], tmp_path, options)
    assert result.finished and {record.knobs["splits"] for record in result.records} == {16}
    assert len(fake_device) - measured < 6


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_a_limit_over_all_tasks(tasks, fake_device, tmp_path, trials):
    result = tune(tasks, tmp_path, replace(OPTIONS, trials=trials))
    assert len(fake_device) == result.measured == trials and not result.finished


def test_a_lost_device_is_no_fault_of_a_kernel(tasks, fake_device, tmp_path, monkeypatch):
    """What had been measured is kept; the same call measures the rest as if nothing had been tried."""
    fake = sys.modules["rotquant_tvm.tuning.tune"].MeasuringProcess
    measure = fake.measure

    def measure_two(process, library, args_info):
        if len(fake_device) == 2:
            process.lost = DeviceError("no server of the key 'cpu'")
            raise DeviceError("connection reset")
        return measure(process, library, args_info)

    monkeypatch.setattr(fake, "measure", measure_two)
    options = replace(OPTIONS, trials_per_task=4)
    with pytest.raises(DeviceError, match="no server of the key 'cpu'; what was measured is kept"):
        tune(tasks[:1], tmp_path, options)
    assert len(read_log(tmp_path / "llvm-x86-64-v3").entries) == 1
    monkeypatch.setattr(fake, "measure", measure)
    result = tune(tasks[:1], tmp_path, options)
    assert result.finished and result.records[0].trials == 4
    assert all("wrong result" in failure for failure in result.failures)  # as the fake device says of one kernel


def test_records_of_other_tasks_stay(tasks, fake_device, tmp_path):
    tune(tasks[:1], tmp_path, OPTIONS)
    tune(tasks[1:], tmp_path, OPTIONS)
    assert len(read_log(tmp_path / "llvm-x86-64-v3").entries) == 2


def test_without_tasks_there_is_nothing_to_do(tmp_path):
    with pytest.raises(UsageError, match="nothing to tune"):
        tune([], tmp_path)


def test_where_nothing_could_be_measured(tasks, fake_device, monkeypatch, tmp_path):
    monkeypatch.setattr("rotquant_tvm.tuning.tune.MeasuringProcess.splits_of", lambda _library: 8)
    with pytest.raises(DeviceError, match=r"no candidate could be measured: .*wrong result"):
        tune(tasks, tmp_path, OPTIONS)
    assert not (tmp_path / "llvm-x86-64-v3" / "manifest.json").exists()


@pytest.mark.slow
def test_from_measuring_to_the_compiled_kernel(tasks, definitions, llvm, tmp_path):
    """No fakes: workers compile and measure, and a compile then uses what they found."""
    result = tune(tasks[:1], tmp_path, OPTIONS)
    (record,) = result.records
    assert result.failures == () and record.trials == 4 and 1e-6 < record.seconds < 1
    assert record.share is not None and record.share > 0 and log_problems(result.folder) == []
    trials = ms.database.JSONDatabase(work_dir=str(result.folder / FOLDER))  # TVM reads the files
    assert len(trials) == 4
    records = TuningRecords(llvm, tmp_path)
    tuned = with_record(definitions()["attention_decode"], records, WantedSizes(1, 1024))
    assert chosen_knobs(tuned) == record.knobs and records.warnings == []


@pytest.mark.parametrize("alone", [True, False])
def test_candidates_are_compiled_ahead_where_it_disturbs_no_measurement(
    tasks, fake_device, monkeypatch, tmp_path, alone
):
    """On a CPU the compiler would take time from the kernel that is measured."""
    begins, strategy, runner = [], search_run.KnobStrategy, search_run.KernelRunner

    def noting(search, batch, begin, allowance):
        begins.append(begin)
        return strategy(search, batch, begin, allowance)

    def running(process):
        made = runner(process)
        made.alone = alone
        return made

    monkeypatch.setattr(search_run, "KnobStrategy", noting)
    monkeypatch.setattr(search_run, "KernelRunner", running)
    result = tune(tasks, tmp_path, OPTIONS)
    assert [begin is None for begin in begins] == [alone] * len(tasks)
    assert len(result.records) == len(tasks) and result.finished and len(fake_device) == 8
