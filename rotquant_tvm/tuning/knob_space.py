"""The design space of a kernel: knobs sampled one by one, and written on the definition's root block.

MetaSchedule schedules TensorIR made of blocks. Kernels laid out by hand are not, so what it schedules is their
definition, and all that a schedule does is annotate it. Whoever compiles the scheduled function reads the annotations
and has the rule build the kernel with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import IRModule, s_tir, tirx

from ..schedules.knobs import Knobs, with_knobs

ANNOTATION = "rotquant.knob."
"""What the names of such annotations begin with."""

_SAMPLE = "SampleCategorical"


def knob_space(values: Mapping[str, Sequence[int]]) -> Callable[[s_tir.Schedule], None]:
    """The space in which every knob has one of its values, as MetaSchedule's ``ScheduleFn`` takes it."""

    def sample(sch: s_tir.Schedule) -> None:
        root = sch.get_sblock("root")
        for name, choices in values.items():
            value = sch.sample_categorical(list(choices), [1 / len(choices)] * len(choices))
            sch.annotate(root, ANNOTATION + name, value)

    return sample


def schedule_with(mod: IRModule, space: s_tir.schedule.Trace, knobs: Mapping[str, int]) -> s_tir.Schedule:
    """Apply a trace of a ``knob_space`` to a workload with these knobs; without knobs, leave all to the rule."""
    sch = s_tir.Schedule(mod)
    if not knobs:
        return sch
    sampled, decided = None, []
    for instruction in space.insts:
        if str(instruction.kind.name) == _SAMPLE:
            sampled = instruction
        elif sampled is not None and instruction.attrs:
            decided.append((sampled, knobs[str(instruction.attrs[0]).removeprefix(ANNOTATION)]))
            sampled = None
    for instruction, knob in decided:
        choices = [int(value) for value in instruction.attrs[0]]
        space = space.with_decision(instruction, choices.index(knob), remove_postproc=False)
    space.apply_to_schedule(sch, remove_postproc=False)
    return sch


def knobs_in(func: tirx.PrimFunc) -> Knobs:
    """Read the knobs that a schedule wrote on a function; empty where it leaves them to the rule."""
    annotations = _root(func).annotations
    return {
        str(name).removeprefix(ANNOTATION): int(value)
        for name, value in annotations.items()
        if str(name).startswith(ANNOTATION)
    }


def replayed_knobs(trace: s_tir.schedule.Trace, definition: tirx.PrimFunc) -> Knobs:
    """The knobs that a record's trace writes on a definition, which need not be the one it was made for."""
    sch = s_tir.Schedule(IRModule({"main": definition.with_attr("global_symbol", "main")}))
    trace.apply_to_schedule(sch, remove_postproc=False)
    return knobs_in(sch.mod["main"])


def chosen_definition(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A scheduled function as a definition that has chosen the knobs written on it, and has them in its attribute."""
    knobs = knobs_in(func)
    sch = s_tir.Schedule(IRModule({"main": func.with_attr("global_symbol", "main")}))
    for name in knobs:
        sch.unannotate(sch.get_sblock("root"), ANNOTATION + name)
    return with_knobs(sch.mod["main"], knobs)


def _root(func: tirx.PrimFunc) -> Any:
    return func.body.block
