"""The rule for loops over tensors on CPUs (norms, products, lookups): ``schedule_for_llvm``'s schedules with knobs.

A function is told by its structure alone, so a record serves the very same loops.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from .knobs import chosen_knobs
from .schedule_for_llvm import RULES, schedule
from .serial_when_small import SMALL, serial_when_small
from .vector_math import vectorizable_math
from .vector_target import VectorTarget

KNOBS: dict[str, tuple[int, ...]] = {"lanes": (4, 8, 16), "small": (0, SMALL, 64 * SMALL)}
"""``lanes`` of a vector, which may be less or more than a register has; ``small``: elements of output up to which one
thread does it all."""

_CPUS = {4: "x86-64", 8: "x86-64-v3", 16: "x86-64-v4"}
"""CPUs whose registers have so many lanes, as the schedule rules read it off a target."""


def loops_llvm(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Schedule a function with the knobs that it chose; None where no schedule rule takes it."""
    chosen = chosen_knobs(func)
    lanes = chosen.get("lanes", VectorTarget.of(target).lanes)
    seen = target if lanes == VectorTarget.of(target).lanes else Target({"kind": "llvm", "mcpu": _CPUS[lanes]})
    for rule in RULES:
        try:
            sch = rule.apply(func, seen)
        except s_tir.ScheduleError:  # as in schedule_for_llvm
            continue
        if sch is None:
            continue
        if not chosen:
            return schedule(func, target)
        scheduled = serial_when_small(vectorizable_math(sch.mod["main"]), chosen.get("small", SMALL))
        return scheduled.with_attr("tirx.is_scheduled", True)
    return None
