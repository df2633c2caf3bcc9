"""Schedule every PrimFunc that has no schedule yet for a GPU, with TVM's dlight rules."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.target import Target


class Tolerant(dlight.base.ScheduleRule):
    """A rule that declines where it would fail.

    Some dlight rules assert on shapes that they did not foresee (symbolic batch in a matrix-vector product); the next
    rule in the list then takes the function.
    """

    def __init__(self, rule: dlight.base.ScheduleRule) -> None:
        """Wrap ``rule``."""
        super().__init__()
        self.rule = rule

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        """The rule's schedule, or None."""
        try:
            return self.rule.apply(func, target, tunable)
        except (AssertionError, s_tir.ScheduleError, ValueError, IndexError):
            return None


def schedule_for_cuda() -> tvm.transform.Pass:
    """The pass; matrix products first, any loop nest last."""
    gpu = dlight.gpu
    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction()]
    return dlight.ApplyDefaultSchedule(*(Tolerant(rule) for rule in rules), gpu.Fallback())
