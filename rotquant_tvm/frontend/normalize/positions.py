"""Positions that a step computes by itself, or takes as it likes, replaced by the canonical parameter.

Walking from where tokens meet anything else down to the inputs, the first value on each way that *is* the tokens'
positions, or differs from them by one number at every case (the offset of a learned embedding), is replaced; a table's
angles are above it and stay. Under padding two conventions are accepted, each for all cases: positions that count
real tokens, and those that count slots. Both are the same for a sequence without padding, and that is how the
canonical form runs every sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.cases import SMALL, Case, StepInputs
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.input_roles import PADDING, PAST
from rotquant_tvm.frontend.normalize.lengths import cases_around, whole_numbers
from rotquant_tvm.frontend.normalize.live_graph import LiveGraph
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.size_arithmetic import same_size, size_vars
from rotquant_tvm.frontend.normalize.step_view import dims, dtype_of, op_name

COUNTING = {"arange", "cumsum", "cumprod", "eye", "tril", "triu"}
SIZES = ((0, 1), (0, 5), (4, 1), (3, 4), (6, 3))


@dataclass
class Positions:
    """What to put the positions in place of.

    ``values``: variables that are the positions plus a number, of any shape with the elements of [batch, seq] or of
    [seq] (variable to the number).
    ``rows``: slices of a table [past .. past + seq] along an axis, which become rows looked up by position (variable
    to axis). ``tables``: prefixes of a table, of all tokens so far, that are only looked up in: the table serves.
    ``longest``: how many positions the tables have that are looked up by position; None without any.
    """

    values: dict[relax.Var, int] = field(default_factory=dict)
    rows: dict[relax.Var, int] = field(default_factory=dict)
    tables: set[relax.Var] = field(default_factory=set)
    longest: int | None = None

    def replaced(self, step: StepInputs) -> dict[relax.Var, list[relax.Var]]:
        """The variables that get other values, to the variables that those are made of."""
        tables = {var: [step.view.values[var].args[0]] for var in [*self.rows, *self.tables]}
        return {var: [] for var in self.values} | tables


def find_positions(step: StepInputs, live: LiveGraph, source: str, capacity: int | None) -> Positions:
    """Find every value to replace. Raises ModelError for an input, or a length of the past, that is read otherwise."""
    return _Finder(step, live, source, capacity).find()


class _Finder:
    def __init__(self, step: StepInputs, live: LiveGraph, source: str, capacity: int | None) -> None:
        self.step, self.live, self.source = step, live, source
        self.found, self.capacity = Positions(), capacity
        cached = PAST in step.roles.kinds
        sizes = [(past if cached else 0, seq if cached else past + seq) for past, seq in SIZES]
        sizes = [size for size in sizes if capacity is None or sum(size) <= capacity]
        cases = [Case(past, seq) for past, seq in dict.fromkeys(sizes)]
        if PADDING in step.roles.kinds:
            cases += [Case(case.past, case.seq, side) for case in cases if case.total > 1 for side in ("left", "right")]
        self.evaluations: list[tuple[Case, Evaluation]] = [(case, step.evaluation(case)) for case in cases]

    def find(self) -> Positions:
        """Visit everything that tokens are computed with and that is no token itself."""
        waiting = [
            var
            for reader in [*self.live.order]
            if reader in self.live.tokens
            for var in self.live.operands(reader)
            if var not in self.live.tokens
        ]
        seen: set[relax.Var] = set()
        while waiting:
            var = waiting.pop()
            if var in seen:
                continue
            seen.add(var)
            if not self._is_fixed(var) and not self._replace(var):
                self._check_sizes(var)
                self._check_indices(var)
                waiting += self.live.operands(var)
        self._check_token_sizes()
        self.found.longest = min(self._table_lengths(), default=None)
        return self.found

    def _table_lengths(self) -> Iterator[int]:
        """For every table that is looked up by position, how many positions it serves."""
        for var in self.live.order:
            call = self.step.view.values[var]
            if var in self.found.rows:
                yield dims(call.args[0])[self.found.rows[var]]
            elif op_name(call) == "take" and isinstance(call.args[1], relax.Var):
                table, index = call.args
                shape = dims(table)
                served = table in self.found.tables or self._is_fixed(table)
                if not served or index in self.live.tokens or self._is_fixed(index) or call.attrs.axis is None:
                    continue
                if table in self.found.tables:
                    shape = dims(self.step.view.values[table].args[0])
                offset, length = self.offset(index), shape[int(call.attrs.axis)]
                if offset is not None and isinstance(length, int):
                    yield length - offset

    def _is_fixed(self, var: relax.Var) -> bool:
        """Whether a value depends on no call: on weights and constants alone."""
        return var in self.step.weights or self.live.weights_alone(var)

    def _replace(self, var: relax.Var) -> bool:
        offset = self.offset(var)
        if offset is not None:
            self.found.values[var] = offset
            return True
        call = self.step.view.value(var)
        if call is None:
            kinds = dict(zip(self.step.inputs, self.step.roles.kinds, strict=True))
            readers = [reader for reader in self.live.readers[var]]
            what = f"relax.{self.step.view.op(readers[0])} ({readers[0].name})" if readers else "the outputs"
            raise ModelError(
                f"{self.source}: the input {var.name} ({kinds.get(var, 'other')}) is read by {what}, outside of masks, "
                "in a way that token positions do not replace; it is not supported"
            )
        if op_name(call) == "strided_slice" and len(call.args) >= 4 and self.live.weights_alone(call.args[0]):
            return self._replace_slice(var, call)
        return False

    def _replace_slice(self, var: relax.Var, call: relax.Call) -> bool:
        """A slice of a table by lengths of the past."""
        axes, begins, ends = (list(arg.fields) for arg in call.args[1:4])
        strides = list(call.args[4].fields) if len(call.args) > 4 else []
        if len(axes) != 1 or any(not isinstance(s, tirx.IntImm) or int(s) != 1 for s in strides):
            return False
        axis, past, seq = int(axes[0]), self.step.roles.past, self.step.roles.seq
        start = past if PAST in self.step.roles.kinds else tirx.IntImm("int64", 0)
        if not same_size(ends[0], start + seq):
            return False
        # All tokens so far, looked up by position: the whole table serves as well.
        readers = [self.step.view.values[reader] for reader in self.live.readers[var]]
        if same_size(begins[0], tirx.IntImm("int64", 0)) and all(
            op_name(reader) == "take" and reader.args[0].same_as(var) and int(reader.attrs.axis or 0) == axis
            for reader in readers
        ):
            self.found.tables.add(var)
        elif same_size(begins[0], start):
            self.found.rows[var] = axis
        else:
            return False
        return True

    def offset(self, var: relax.Var) -> int | None:
        """What a value is more than the tokens' positions, the same at all cases; None if it is something else."""
        shape = dims(var)
        if shape is None or not dtype_of(var) or dtype_of(var) == "bool":
            return None
        if not any(isinstance(size, tirx.Var) and size.same_as(self.step.roles.seq) for size in shape):
            return None
        slots: set[float] = set()
        real: set[float] = set()
        for case, evaluation in self.evaluations:
            try:
                value = np.asarray(evaluation.value(var))
            except Unevaluable:
                return None
            rows = self.step.rows(case)
            if value.size == case.seq and rows != 1:
                value = np.broadcast_to(value.reshape(1, -1), (rows, case.seq))
            if value.size != rows * case.seq:
                return None
            value, mask = value.reshape(rows, case.seq), self.step.real(case)[:, case.past :]
            slots |= set((value - np.arange(case.past, case.total))[mask].tolist())
            real |= set((value - self.step.real_positions(case))[mask].tolist())
            if len(slots) > 1 and len(real) > 1:
                return None
        (offset,) = slots if len(slots) == 1 else real
        if not self._holds_at_length(var, offset):
            return None
        return int(offset) if np.isfinite(offset) and offset == int(offset) else None

    def _holds_at_length(self, var: relax.Var, offset: float) -> bool:
        """Whether a value is the positions plus a number also around every number that it is computed with."""
        numbers = whole_numbers(self.step, [var])
        for case in cases_around(numbers, PAST in self.step.roles.kinds, self.capacity, False):
            if case.total <= SMALL and case.seq <= 5 and case.past < 7:
                continue  # seen
            try:
                value = np.asarray(self.step.evaluation(case).value(var))
            except Unevaluable:
                return False
            wanted = np.arange(case.past, case.total) + offset
            if value.size % case.seq or not (value.reshape(-1, case.seq) == wanted).all():
                return False
        return True

    def _check_sizes(self, var: relax.Var) -> None:
        """Refuse a value that is made with the past's length."""
        if self._mentions_past(var):
            raise ModelError(
                f"{self.source}: relax.{self.step.view.op(var)} ({var.name}) depends on the past's length outside of "
                "masks, and is not the tokens' positions; it is not supported"
            )

    def _check_indices(self, var: relax.Var) -> None:
        """Refuse numbers that count tokens, in a step without a past: they would have to count on behind it."""
        name = self.step.view.op(var)
        if PAST not in self.step.roles.kinds and name in COUNTING and size_vars([self.step.view.values[var], var.ty]):
            raise ModelError(
                f"{self.source}: relax.{name} ({var.name}) counts tokens in a way that is not their positions, so the "
                "model cannot be given a cache; `simulate` measures its quality without one"
            )

    def _check_token_sizes(self) -> None:
        for var in self.live.order:
            if var in self.live.tokens and not self.live.is_attention(var):
                self._check_sizes(var)

    def _mentions_past(self, var: relax.Var) -> bool:
        value = self.step.view.values[var]
        if not isinstance(value, relax.Call):
            return False
        sizes = size_vars([arg for arg in value.args if not isinstance(arg.ty, relax.TensorType)])
        return any(size.same_as(self.step.roles.past) for size in sizes)
