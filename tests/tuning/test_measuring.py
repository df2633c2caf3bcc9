"""The measuring process's work: equal arguments whenever a task comes, wrong results refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import numpy as np
import pytest
import tvm

from rotquant_tvm.benchmark.device import MOST_SETS, open_device
from rotquant_tvm.errors import DeviceError
from rotquant_tvm.linker import linker_command
from rotquant_tvm.process_locks import locked_file
from rotquant_tvm.tuning.kernel_builder import Candidate, build_candidate
from rotquant_tvm.tuning.kernel_runner import MeasuringProcess
from rotquant_tvm.tuning.kernel_timer import Timing
from rotquant_tvm.tuning.knob_space import ANNOTATION
from rotquant_tvm.tuning.measuring import Bench, _agree, measure_candidate, open_bench, turn_file
from rotquant_tvm.tuning.roofline import Roofline
from rotquant_tvm.tuning.tuning_task import tuning_tasks

TIMING = Timing(2, 2, 0)


def scheduled(task, **knobs):
    """A task's workload with knobs written on it, as a schedule would."""
    sch = tvm.s_tir.Schedule(task.workload)
    for name, value in knobs.items():
        sch.annotate(sch.get_sblock("root"), ANNOTATION + name, value)
    return sch.mod


def args_info(task):
    return [info.as_json() for info in task.args_info]


def built(task, folder, **knobs):
    linker_command()
    return build_candidate(scheduled(task, **knobs), task.target, str(folder), False)


@pytest.fixture
def bench(llvm, tmp_path):
    return Bench(open_device(llvm, 1), tmp_path)


def test_arguments_are_the_same_when_a_task_comes_back(bench, task, definitions, llvm):
    other = tuning_tasks([definitions("hurwitz4")["attention_decode"]], llvm)[0]
    bench.prepare(task.measurement)
    first = [array.numpy() for array in bench.sets[0]]
    bench.prepare(other.measurement)
    bench.prepare(task.measurement)
    for before, array in zip(first, bench.sets[0], strict=True):
        np.testing.assert_array_equal(before, array.numpy())


def test_results_are_wiped_between_candidates(bench, task):
    """Else a kernel that writes nothing would pass with what the one before it wrote."""
    bench.prepare(task.measurement)
    (index,) = task.measurement.results
    bench.sets[0][index].copyfrom(np.ones(bench.sets[0][index].shape, "float32"))
    bench.check(task.measurement)  # the first candidate: its results are what others are compared with
    bench.prepare(task.measurement)
    assert not bench.sets[0][index].numpy().any()
    with pytest.raises(DeviceError, match="wrong result: out differs"):
        bench.check(task.measurement)


def test_enough_sets_to_leave_the_cache(bench, task):
    bench.prepare(task.measurement)
    assert len(bench.sets) * task.measurement.nbytes > bench.device.cache_bytes or len(bench.sets) == MOST_SETS


@pytest.mark.parametrize(
    ("result", "wanted", "before", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.001], [0.0, 0.0], True),
        ([1.0, 2.0], [1.0, 2.5], [0.0, 0.0], False),
        ([1.0, np.nan], [1.0, np.nan], [0.0, 0.0], True),
        ([1.0, np.nan], [1.0, 2.0], [0.0, 0.0], False),
        ([1.0, np.inf], [1.0, np.nan], [0.0, 0.0], True),  # neither is finite
    ],
)
def test_float_results(result, wanted, before, agrees):
    assert _agree(*(np.array(x, "float32") for x in (result, wanted, before))) == agrees


def test_packed_results_are_compared_by_what_changes():
    """One word of a hundred that the kernel writes may differ; a cache's other words count for nothing."""
    before, wanted = np.zeros(10_000, np.uint32), np.zeros(10_000, np.uint32)
    wanted[:100] = 7
    found = wanted.copy()
    found[0] = 6
    assert _agree(found, wanted, before)
    found[:5] = 6
    assert not _agree(found, wanted, before) and not _agree(before, wanted, before)


def test_a_candidate_is_what_its_folder_says(task, tmp_path):
    library = built(task, tmp_path, splits=2)
    candidate = Candidate.read(library, args_info(task))
    assert candidate.measurement == task.measurement and candidate.counters == 0
    arrays = [object() for _ in task.measurement.parameters]
    assert candidate.arguments(arrays, None) == arrays


def test_counters_stand_before_the_output(bench, task):
    candidate = Candidate("", task.measurement, 5)
    first, counters, out = candidate.arguments(["q", "out"], bench.device)
    assert (first, out) == ("q", "out") and counters.numpy().tolist() == [0] * 5


def test_candidates_are_timed_and_agree(task, llvm, tmp_path):
    for knobs in ({}, {"splits": 1}, {"splits": 8}):
        library = built(task, tmp_path, **knobs)
        seconds = measure_candidate(llvm, str(tmp_path), library, args_info(task), TIMING)
        assert len(seconds) == 2 and all(1e-6 < value < 1 for value in seconds)


def test_a_rule_without_a_kernel_is_an_error(task, tmp_path, monkeypatch):
    monkeypatch.setattr("rotquant_tvm.schedules.knobs.kernel_for", lambda *_: None)
    with pytest.raises(DeviceError, match="no kernel for these knobs"):
        build_candidate(scheduled(task, splits=2), task.target, str(tmp_path), False)


@pytest.mark.full
@pytest.mark.slow
def test_a_process_that_fails_is_replaced(task, llvm, tmp_path):
    process = MeasuringProcess(llvm, tmp_path, TIMING, timeout=60)
    try:
        with pytest.raises(DeviceError):
            process.measure(str(tmp_path / "nothing.so"), args_info(task))
        roofline = process.roofline
        seconds = process.measure(built(task, tmp_path), args_info(task))
        assert len(seconds) == 2 and 1e9 < process.roofline.bandwidth and process.roofline == roofline
        process.timeout = 1e-3
        with pytest.raises(DeviceError, match=r"more than 0\.001 s"):
            process.measure(built(task, tmp_path), args_info(task))
    finally:
        process.close()



def test_measurements_on_a_device_take_turns(llvm, tmp_path, monkeypatch):
    """Another tuning has the device: this one's candidate begins when that has ended, and its time only then."""
    process, file = MeasuringProcess(llvm, tmp_path, TIMING, 60.0), turn_file(open_device(llvm, 1))
    called = []

    def call(_seconds, function, *_arguments):
        called.append(function)
        return (Roofline(1.0, 1.0), file) if function is open_bench else [1.0]

    monkeypatch.setattr(process._worker, "call", call)
    process.open()
    with ThreadPoolExecutor(1) as thread:
        with locked_file(file, lambda: None):
            waiting = thread.submit(process.measure, "kernel.so", [])
            with pytest.raises(NotYet):
                waiting.result(0.2)
            assert open_bench in called and measure_candidate not in called
        assert waiting.result(60) == [1.0]
    assert called[-1] is measure_candidate


def test_a_bench_tells_which_file_its_turns_are_kept_by(llvm, tmp_path):
    roofline, file = open_bench(llvm, str(tmp_path), known=True)
    assert roofline == Roofline() and file == turn_file(open_device(llvm, 1)) and " " not in file.name
