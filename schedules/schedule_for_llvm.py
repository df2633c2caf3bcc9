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

    Reshapes become views first, since TVM recognizes them by their loops. A function that no rule takes keeps
    its loops: correct, on one thread.
    """

    def __init__(self, target: Target | None = None) -> None:
        """Set the llvm target; None means the one that is current when the pass runs."""
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule the functions, mark them scheduled and replace their transcendental functions."""
        target = self.target or Target.current(allow_none=False)
        mod = _reshapes_as_views(mod)
        updated = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not (func.attrs and func.attrs.get(_SCHEDULED)):
                updated[gvar] = schedule(func, target)
        for gvar, func in updated.items():
            mod[gvar] = func
        return mod


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


def _reshapes_as_views(mod: tvm.IRModule) -> tvm.IRModule:
    try:
        return relax.transform.RewriteDataflowReshape()(mod)
    except tvm.error.InternalError:  # it fails on symbolic shapes that it cannot prove divisible
        return mod
