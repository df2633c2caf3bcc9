"""Schedule every PrimFunc that has no schedule yet for a CPU."""

from __future__ import annotations

import tvm
from tvm import relax, s_tir, tirx
from tvm.target import Target

from .elementwise_llvm import Elementwise
from .row_reduction_llvm import RowReduction
from .serial_when_small import serial_when_small
from .vector_math import vectorizable_math

RULES = (Elementwise(), RowReduction())
"""Tried in this order; a rule returns None for what it does not know."""

_SCHEDULED = "tirx.is_scheduled"


@tvm.transform.module_pass(opt_level=0, name="ScheduleForLLVM")
class ScheduleForLLVM:
    """Apply the rules to the unscheduled PrimFuncs of a module, for ``target`` or else the current target.

    A function that no rule takes is left as it is: correct, on one thread.
    """

    def __init__(self, target: Target | None = None) -> None:
        """Set the llvm target; None means the one that is current when the pass runs."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule the functions, mark them scheduled and replace their transcendental functions."""
        target = self.target or Target.current(allow_none=False)
        updated = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and _wants_schedule(func):
                updated[gvar] = schedule(func, target)
        for gvar, func in updated.items():
            mod[gvar] = func
        return mod


def _wants_schedule(func: tirx.PrimFunc) -> bool:
    """Leave reshapes as they are: RewriteDataflowReshape knows them by their loops and drops the copy."""
    return not (func.attrs and func.attrs.get(_SCHEDULED)) and not relax.analysis.has_reshape_pattern(func)


def schedule(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """Schedule one function with the first rule that takes it."""
    for rule in RULES:
        try:
            sch = rule.apply(func, target)
        except s_tir.ScheduleError:  # an unusual block structure: the next rule may do
            continue
        if sch is not None:
            scheduled = serial_when_small(vectorizable_math(sch.mod["main"]))
            return scheduled.with_attr(_SCHEDULED, True)
    return vectorizable_math(func)
