"""A step that returns the logits after every token becomes one that returns those after the token ``last`` of each row.

The token is chosen before the output layer, if the logits are computed from each token by itself there; else at the
logits themselves, which costs the output layer for every token.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm_ffi import structural_equal, structural_walk

from .binding_copy import BindingCopy

_UNARY = ("relax.astype", "relax.tanh", "relax.negative")
_BINARY = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


def returns_every_logit(func: relax.Function) -> bool:
    """Whether a canonical step returns logits [batch, seq, vocab]."""
    return len(func.ret_ty.fields[0].shape) == 3


def with_last_logits(func: relax.Function) -> relax.Function:
    """Return the canonical step with logits [batch, vocab] in place of [batch, seq, vocab]."""
    func = relax.utils.copy_with_new_vars(func)
    builder = relax.BlockBuilder()
    copy = BindingCopy(builder)
    output = _Output(func)
    with builder.function("main", list(func.params), attrs=dict(func.attrs)):
        with builder.dataflow():
            for block in func.body.blocks:
                for binding in block.bindings:
                    if not binding.var.same_as(func.body.body):
                        copy.emit(binding)
            logits = output.emit(builder, copy, func.params[2])
            presents = [copy.expr(field) for field in output.result.fields[1:]]
            result = builder.emit_output(relax.Tuple([logits, *presents]))
        builder.emit_func_output(result)
    return builder.finalize()["main"]


class _Output:
    """The last operators of a step: ``chain`` computes the logits from ``hidden`` [batch, seq, width] by token."""

    def __init__(self, func: relax.Function) -> None:
        self.values = {binding.var: binding.value for block in func.body.blocks for binding in block.bindings}
        self.inputs = set(func.params[: int(func.attrs["num_input"])])
        self.result = self.values.get(func.body.body, func.body.body)
        logits = self.result.fields[0]
        self.hidden, self.chain = self._from_product(logits) or (logits, [])

    def _from_product(self, logits: relax.Var) -> tuple[relax.Expr, list[relax.Var]] | None:
        """What the output layer takes, and the variables from its product to the logits."""
        chain = [logits]
        while (before := self._before(chain[0])) is not None:
            if self.values[chain[0]].op.name == "relax.matmul":
                return before, chain
            chain.insert(0, before)
        return None

    def emit(self, builder: relax.BlockBuilder, copy: BindingCopy, last: relax.Var) -> relax.Expr:
        """Emit the choice of a token and the chain on it."""
        hidden, op = copy.expr(self.hidden), relax.op
        batch, _, width = hidden.ty.shape.values
        index = builder.emit(op.expand_dims(builder.emit(op.astype(last, "int64")), 1))  # gather_nd takes int64 only
        chosen = builder.emit(op.gather_nd(hidden, index, batch_dims=1))
        if not self.chain:
            return chosen
        local = {self.hidden: builder.emit(op.reshape(chosen, [batch, 1, width]))}
        for var in self.chain:
            call = self.values[var]
            args = [local[arg] if arg in local else copy.expr(arg) for arg in call.args]
            local[var] = builder.emit(relax.Call(call.op, args, call.attrs, call.ty_args))
        logits = local[self.chain[-1]]
        return builder.emit(op.reshape(logits, [batch, logits.ty.shape[2]]))

    def _before(self, var: relax.Expr) -> relax.Expr | None:
        """The one operand from which a value is computed token by token; None if it is computed otherwise."""
        call = self.values.get(var)
        name = getattr(call.op, "name", "") if isinstance(call, relax.Call) else ""
        if name in _UNARY:
            return call.args[0]
        if name == "relax.matmul":
            return call.args[0] if len(call.args[1].ty.shape) == 2 and self._fixed(call.args[1]) else None
        if name in _BINARY:
            tokens = [arg for arg in call.args if not self._fixed(arg)]
            if len(tokens) == 1 and structural_equal(tokens[0].ty.shape, var.ty.shape):
                return tokens[0]
        return None

    def _fixed(self, expr: relax.Expr) -> bool:
        """Whether a value is made of weights and constants alone, and has no axis of tokens."""
        sizes: list[tvm.tirx.Var] = []
        structural_walk(expr.ty, (tvm.tirx.Var, sizes.append))
        return not sizes and not self._reads_input(expr)

    def _reads_input(self, expr: relax.Expr) -> bool:
        used: set[relax.Var] = set()
        pending = [expr]
        while pending:
            new = set(relax.analysis.free_vars(pending.pop())) - used
            used |= new
            pending += [self.values[var] for var in new if var in self.values]
        return not used.isdisjoint(self.inputs)
