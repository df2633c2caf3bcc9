"""Inputs of a step at concrete sizes, as a caller of the source would give them, to evaluate parts of the step with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.input_roles import (
    IDS,
    MASK,
    OTHER,
    PADDING,
    PAST,
    PAST_LENGTH,
    POSITIONS,
    TOTAL_LENGTH,
    InputRoles,
)  # fmt: skip
from rotquant_tvm.frontend.normalize.operator_table import Array
from rotquant_tvm.frontend.normalize.size_arithmetic import number
from rotquant_tvm.frontend.normalize.step_view import StepView, dims, dtype_of

ROWS = 3
"""Rows of a case where the batch is open: padded by none, one and two tokens."""
SMALL = 300
MAX_ELEMENTS = 1 << 24
"""Larger inputs than any decoder's mask are refused: no file shall make us allocate them."""


@dataclass(frozen=True)
class Case:
    """A call with ``seq`` new tokens after ``past``; ``padding`` "" or, in rows from the second on, "left", "right"."""

    past: int
    seq: int
    padding: str = ""

    @property
    def total(self) -> int:
        """Tokens in all."""
        return self.past + self.seq

    def describe(self) -> str:
        """The case in words, for messages."""
        text = f"{self.seq} new tokens after {self.past}"
        return f"{text} with {self.padding} padding" if self.padding else text


@dataclass(frozen=True)
class StepInputs:
    """What evaluations of one step share: its ``view``, the ``roles`` of its inputs, the values of its weights."""

    view: StepView
    roles: InputRoles
    weights: dict[relax.Var, Array]

    @cached_property
    def inputs(self) -> list[relax.Var]:
        """The parameters that are inputs."""
        return list(self.view.function.params[: len(self.roles.kinds)])

    def rows(self, case: Case) -> int:
        """How many rows the batch of a case has; large cases without padding have one."""
        if not isinstance(self.roles.batch, tirx.Var):
            return int(self.roles.batch)
        return ROWS if case.padding or case.total <= SMALL else 1

    def real(self, case: Case) -> Array:
        """Which tokens of a case are real: bool [rows, total]."""
        rows = self.rows(case)
        real = np.ones((rows, case.total), bool)
        for row in range(rows):
            count = min(row if rows > 1 else 1, case.total - 1)
            if case.padding == "left":
                real[row, :count] = False
            elif case.padding == "right":
                real[row, case.total - min(count, case.seq - 1) :] = False
        return real

    def real_positions(self, case: Case) -> Array:
        """How many real tokens are before each new one: int64 [rows, seq]."""
        positions: Array = np.maximum(np.cumsum(self.real(case), axis=1) - 1, 0)[:, case.past :]
        return positions

    def sizes(self, case: Case) -> dict[tirx.Var, int]:
        """Numbers for the symbolic sizes."""
        found = {self.roles.seq: case.seq, self.roles.past: case.past}
        if isinstance(self.roles.batch, tirx.Var):
            found[self.roles.batch] = self.rows(case)
        return found

    def evaluation(self, case: Case) -> Evaluation:
        """Begin to evaluate the step for a case."""
        sizes = self.sizes(case)
        known: dict[relax.Var, Any] = dict(self.weights)
        for param, kind in zip(self.inputs, self.roles.kinds, strict=True):
            value = self._input(param, kind, case, sizes)
            if value is not None:
                known[param] = value
        return Evaluation(self.view, known, sizes)

    def _input(self, param: relax.Var, kind: str, case: Case, sizes: dict[tirx.Var, int]) -> Array | None:
        if kind in (IDS, PAST, OTHER):
            return None
        shape = dims(param)
        if "float" not in dtype_of(param) and math.prod(number(size, sizes) for size in shape) > MAX_ELEMENTS:
            raise ModelError(f"the input {param.name!r} has the shape {shape}; that is too large")
        if kind == POSITIONS:
            slots = np.arange(case.past, case.total)
            per_row = len(shape) == 2 and is_same_size(shape[0], self.roles.batch)
            value = self.real_positions(case) if per_row else slots.reshape([1] * (len(shape) - 1) + [-1])
        elif kind == PADDING:
            value = _widened(self.real(case), number(shape[1], sizes))
        elif kind == MASK:
            value = self._mask(param, case, sizes)
        elif kind in (PAST_LENGTH, TOTAL_LENGTH):
            value = np.full([1] * len(shape), case.past if kind == PAST_LENGTH else case.total)
        else:
            value = self.real(case).sum(1) - 1  # LAST_INDEX
        return value.astype(dtype_of(param))

    def _mask(self, param: relax.Var, case: Case, sizes: dict[tirx.Var, int]) -> Array:
        """A causal mask with the padding hidden: booleans and integers are true where a token is seen."""
        rows, _, _, width = (number(size, sizes) for size in dims(param))
        visible = causal(case, None)[None, None] & self.real(case)[:rows, None, None]
        visible = _widened(visible, width)
        if "float" not in dtype_of(param):
            return visible
        return np.where(visible, 0.0, -65504.0 if dtype_of(param) == "float16" else np.finfo(np.float32).min)


def causal(case: Case, window: int | None) -> Array:
    """Which tokens a new one sees, bool [seq, total]: itself and the ``window`` - 1 before it (None: all)."""
    distance = np.arange(case.past, case.total)[:, None] - np.arange(case.total)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _widened(flags: Array, width: int) -> Array:
    """Flags with more of the last axis, false."""
    if flags.shape[-1] == width:
        return flags
    widths = [(0, 0)] * (flags.ndim - 1) + [(0, max(width - flags.shape[-1], 0))]
    return np.pad(flags, widths)[..., :width]


def is_same_size(one: Any, other: Any) -> bool:
    """Whether two dimensions are the same number or the same symbolic size."""
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return isinstance(one, tvm.ir.Expr) and bool(one.same_as(other))
