"""Knobs as a MetaSchedule design space: sampled, annotated, replayed, and read back."""

from __future__ import annotations

import itertools

import tvm
from rotquant_tvm.schedules.knobs import chosen_knobs
from tvm.s_tir import meta_schedule as ms

from rotquant_tvm.tuning.knob_space import chosen_definition, knob_space, knobs_in, replayed_knobs, schedule_with
from rotquant_tvm.tuning.tensor_intrinsics import load_tensor_intrinsics

VALUES = {"splits": (1, 2, 4), "odd": (3, 5)}


def space_of(mod):
    sch = tvm.s_tir.Schedule(mod)
    knob_space(VALUES)(sch)
    return sch.trace


def test_every_point_of_the_space_can_be_made_and_read_back(task):
    space = space_of(task.workload)
    for point in itertools.product(*VALUES.values()):
        knobs = dict(zip(VALUES, point, strict=True))
        sch = schedule_with(task.workload, space, dict(sorted(knobs.items())))  # in any order
        assert knobs_in(sch.mod["main"]) == knobs
        assert replayed_knobs(sch.trace, task.definition) == knobs
        assert chosen_knobs(chosen_definition(sch.mod["main"])) == knobs


def test_without_knobs_the_rule_decides(task):
    sch = schedule_with(task.workload, space_of(task.workload), {})
    assert len(sch.trace.insts) == 0 and knobs_in(sch.mod["main"]) == {}
    assert chosen_knobs(chosen_definition(sch.mod["main"])) == {}


def test_metaschedule_samples_the_space(task):
    """What its own generator makes of the function lies in the space."""
    space = ms.space_generator.ScheduleFn(knob_space(VALUES), sch_rules=[], postprocs=[], mutator_probs={})
    load_tensor_intrinsics()
    context = ms.TuneContext(task.workload, target=task.target, space_generator=space, num_threads=1, rand_state=1)
    (sch,) = context.generate_design_space()
    found = knobs_in(sch.mod["main"])
    assert set(found) == set(VALUES) and all(value in VALUES[name] for name, value in found.items())


def test_a_trace_survives_the_database(task, tmp_path):
    knobs = {"splits": 4, "odd": 3}
    sch = schedule_with(task.workload, space_of(task.workload), knobs)
    database = ms.database.JSONDatabase(work_dir=str(tmp_path))
    workload = database.commit_workload(task.workload)
    database.commit_tuning_record(
        ms.database.TuningRecord(sch.trace, workload, [1.0], task.target, task.args_info)
    )
    (record,) = ms.database.JSONDatabase(work_dir=str(tmp_path)).get_all_tuning_records()
    assert replayed_knobs(record.trace, task.definition) == knobs


def test_a_trace_is_replayed_on_another_definition(task, definitions):
    """Records are lent to shapes near theirs."""
    sch = schedule_with(task.workload, space_of(task.workload), {"splits": 2, "odd": 5})
    other = definitions("rq3")["attention_decode"]
    assert replayed_knobs(sch.trace, other) == {"splits": 2, "odd": 5}
