"""The shell of passes that rewrite the calls of every Relax function of a module."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator


class FunctionRewriter(PyExprMutator):
    """Base of mutators over all Relax functions of ``mod``; what they leave without a reader is removed.

    Subclasses override ``visit_call_`` and are decorated with ``relax.expr_functor.mutator``.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.mod = mod

    def transform(self) -> tvm.IRModule:
        """Return the rewritten module; raises TVM's own error if it is not well formed."""
        for gvar, func in self.mod.functions_items():
            if isinstance(func, relax.Function):
                self.builder_.update_func(gvar, self.visit_expr(func))
        result = relax.transform.DeadCodeElimination()(self.builder_.get())
        relax.analysis.well_formed(result)
        return result
