"""Compiling candidates: what has begun ahead of its batch is not compiled again."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import tvm
import tvm_ffi
from tvm.s_tir import meta_schedule as ms

from rotquant_tvm.errors import DeviceError
from rotquant_tvm.tuning import kernel_builder
from rotquant_tvm.tuning.kernel_builder import KernelBuilder, build_candidate
from rotquant_tvm.tuning.knob_search import KnobSearch, KnobStrategy
from rotquant_tvm.tuning.knob_space import ANNOTATION, knob_space


class Pool:
    """Compiles at once; the second kernel cannot be."""

    def __init__(self, *_options):
        Pool.compiled = []

    def submit(self, _seconds, function, *arguments):
        job = Future()
        if function is not build_candidate:
            job.set_result(None)
            return job
        Pool.compiled.append(arguments[0])
        if len(Pool.compiled) == 2:
            job.set_exception(DeviceError("no"))
        else:
            job.set_result(f"library {len(Pool.compiled)}")
        return job

    def close(self):
        """Nothing to end."""


@pytest.fixture
def builder(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_builder, "WorkerPool", Pool)
    return KernelBuilder(tmp_path, 2, 1.0)


def scheduled(task, splits):
    sch = tvm.s_tir.Schedule(task.workload)
    sch.annotate(sch.get_sblock("root"), ANNOTATION + "splits", splits)
    return sch.mod


def test_what_has_begun_is_compiled_once(builder, task, llvm):
    mods = [scheduled(task, splits) for splits in (1, 2, 4)]
    builder.begin(mods[:2], llvm)
    again = [scheduled(task, splits) for splits in (4, 1, 2)]  # equal, not the same
    results = builder.build([ms.builder.BuilderInput(mod, llvm) for mod in again])
    assert len(Pool.compiled) == 3
    assert [result.artifact_path for result in results] == ["library 3", "library 1", None]
    assert str(results[2].error_msg) == "compiling: no"
    builder.build([ms.builder.BuilderInput(mods[0], llvm)])
    assert len(Pool.compiled) == 4  # taken once


def test_the_first_candidates_begin_when_the_task_is_opened(task):
    begun = []
    strategy = KnobStrategy(KnobSearch(task, 4), 3, lambda mods, target: begun.extend((mod, target) for mod in mods))
    spaces = ms.space_generator.ScheduleFn(knob_space(task.knobs), sch_rules=[], postprocs=[], mutator_probs={})
    context = ms.TuneContext(task.workload, target=task.target, space_generator=spaces)
    strategy.pre_tuning(4, 3, context.generate_design_space())
    assert [target for _, target in begun] == [task.target] * 3
    first = strategy.generate_measure_candidates()
    assert [tvm_ffi.structural_equal(c.sch.mod, mod) for c, (mod, _) in zip(first, begun, strict=True)] == [True] * 3
    assert len(strategy.generate_measure_candidates()) == 1 and len(begun) == 3
    assert strategy.generate_measure_candidates() is None
