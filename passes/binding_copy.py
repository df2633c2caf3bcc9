"""Copying a function's bindings into a builder while some variables are replaced."""

from __future__ import annotations

from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


@mutator
class _Substitute(PyExprMutator):
    def __init__(self, replaced: dict[relax.Var, relax.Expr]) -> None:
        super().__init__()
        self.replaced = replaced

    def visit_var_(self, op: relax.Var) -> relax.Expr:
        return self.replaced.get(op, op)

    def visit_dataflow_var_(self, op: relax.DataflowVar) -> relax.Expr:
        return self.replaced.get(op, op)


class BindingCopy:
    """Emits bindings of an old function into ``builder``; ``replace`` redirects the uses of an old variable."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        self._replaced: dict[relax.Var, relax.Expr] = {}

    def replace(self, old: relax.Var, new: relax.Expr) -> None:
        """From now on uses of ``old`` become ``new``."""
        self._replaced[old] = new

    def expr(self, value: relax.Expr) -> relax.Expr:
        """``value`` with the replaced variables substituted."""
        if isinstance(value, relax.Var):
            return self._replaced.get(value, value)
        return _Substitute(self._replaced).visit_expr(value)

    def emit(self, binding: relax.Binding) -> relax.Var:
        """Copy one binding; later uses of its variable refer to the copy."""
        value = self.expr(binding.value)
        if isinstance(binding, relax.MatchCast):
            new = self.builder.match_cast(value, binding.ty)
        else:
            new = self.builder.emit(value, binding.var.name)
        self.replace(binding.var, new)
        return new
