"""Values that a source computes for one row of positions, recomputed for every row of a batch.

A source that numbers its tokens by itself has positions [seq], and what it makes of them (angles, learned positions)
has no batch. Rows of different lengths need values of their own. What is made of positions alone is made token by
token, so it is made for batch * seq tokens at once, by the same operators, and its token axis is then split.
"""

from __future__ import annotations

import math

import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.binding_emitter import emit_copy
from rotquant_tvm.frontend.normalize.cases import StepInputs
from rotquant_tvm.frontend.normalize.live_graph import LiveGraph
from rotquant_tvm.frontend.normalize.positions import Positions
from rotquant_tvm.frontend.normalize.scalar_operators import ELEMENTWISE
from rotquant_tvm.frontend.normalize.size_arithmetic import same_size, substitute
from rotquant_tvm.frontend.normalize.step_view import StepView, dims, dtype_of


class Batchless:
    """The values computed from positions without a batch.

    Attributes: ``region``, all of them; they are not to be emitted otherwise.
    """

    def __init__(self, step: StepInputs, live: LiveGraph, positions: Positions, source: str) -> None:
        self.step, self.live, self.positions, self.source = step, live, positions, source
        roots = [var for var in [*positions.values, *positions.rows] if not self._has_batch(var)]
        self.region = set() if step.roles.batch == 1 else live.reached(roots) - live.tokens
        self._made: dict[relax.Var, relax.Expr] = {}

    def _has_batch(self, var: relax.Var) -> bool:
        return var not in self.positions.rows and not same_size(math.prod(dims(var)), self.step.roles.seq)

    def value(
        self, builder: relax.BlockBuilder, var: relax.Var, reader: relax.Var, copies: dict[relax.Var, relax.Expr],
        canonical: relax.Expr,
    ) -> relax.Expr:  # fmt: skip
        """Emit a value of the region for every row, in a shape that broadcasts to the result of ``reader``.

        ``copies``: what is emitted already; ``canonical``: the positions int32 [batch, seq].
        """
        op = self.step.view.op(reader)
        if op not in ELEMENTWISE:
            raise ModelError(
                f"{self.source}: relax.{op} ({reader.name}) reads {var.name}, which is computed from positions without "
                "a batch; give the model position_ids [batch, seq]"
            )
        made = self._make(builder, var, copies, canonical)
        return builder.emit(R.reshape(self._batch_first(builder, made, var), self._broadcast_shape(var, reader)))

    def _make(
        self, builder: relax.BlockBuilder, var: relax.Var, copies: dict[relax.Var, relax.Expr], canonical: relax.Expr
    ) -> relax.Expr:
        """Emit a value for batch * seq tokens in the place of seq."""
        if var in self._made:
            return self._made[var]
        batch, seq = self.step.roles.batch, self.step.roles.seq
        view: StepView = self.step.view
        if var in self.positions.values or var in self.positions.rows:
            flat = builder.emit(R.reshape(canonical, [batch * seq]))
            if var in self.positions.rows:
                table = copies[view.values[var].args[0]]
                made = builder.emit(R.take(table, flat, axis=self.positions.rows[var], mode="clip"))
            else:
                shape = [self._more_tokens(size) for size in dims(var)]
                made = builder.emit(R.reshape(flat, shape))
                made = shifted(builder, made, self.positions.values[var], dtype_of(var))
        elif var not in view.values or var in self.positions.tables or self.live.weights_alone(var):
            made = copies[var]
        else:
            for used in self.live.operands(var):
                self._make(builder, used, copies, canonical)
            made = emit_copy(builder, view.bindings[var], lambda used: self._made[used], {seq: batch * seq})
        self._made[var] = made
        return made

    def _more_tokens(self, size: int | tvm.ir.Expr) -> int | tvm.ir.Expr:
        roles = self.step.roles
        return size if isinstance(size, int) else substitute(size, {roles.seq: roles.batch * roles.seq})

    def _token_axis(self, var: relax.Var) -> int:
        axes = [axis for axis, size in enumerate(dims(var)) if same_size(size, self.step.roles.seq)]
        if len(axes) != 1:
            raise ModelError(f"{self.source}: {var.name} is computed from positions and has no axis of tokens")
        return axes[0]

    def _batch_first(self, builder: relax.BlockBuilder, made: relax.Expr, var: relax.Var) -> relax.Expr:
        """Split the token axis of batch * seq and bring the batch to the front."""
        axis, shape = self._token_axis(var), dims(var)
        split = [*shape[:axis], self.step.roles.batch, self.step.roles.seq, *shape[axis + 1 :]]
        made = builder.emit(R.reshape(made, split))
        order = [axis, *(place for place in range(len(split)) if place != axis)]
        return made if axis == 0 else builder.emit(R.permute_dims(made, order))

    def _broadcast_shape(self, var: relax.Var, reader: relax.Var) -> list[int | tvm.ir.Expr]:
        """The value's shape aligned with the reader's result, the batch in its first axis."""
        shape, result = dims(var), dims(reader)
        padded = [1] * (len(result) - len(shape)) + list(shape)
        place = len(result) - len(shape) + self._token_axis(var)
        fits = place > 0 and padded[0] == 1 and same_size(result[0], self.step.roles.batch)
        if not fits or not same_size(result[place], self.step.roles.seq):
            raise ModelError(
                f"{self.source}: {reader.name} joins {var.name}, computed from positions without a batch, with tokens "
                f"of the shape {result}; give the model position_ids [batch, seq]"
            )
        return [self.step.roles.batch, *padded[1:]]


def shifted(builder: relax.BlockBuilder, positions: relax.Expr, offset: int, dtype: str) -> relax.Expr:
    """Positions plus a number in a dtype."""
    if dtype != dtype_of(positions):
        positions = builder.emit(R.astype(positions, dtype))
    return builder.emit(R.add(positions, relax.const(offset, dtype))) if offset else positions

