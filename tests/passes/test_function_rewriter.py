"""FunctionRewriter: every Relax function is visited, what nobody reads goes, and a broken result is refused."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.function_rewriter import FunctionRewriter
from tvm import relax
from tvm.relax.expr_functor import mutator

X = relax.TensorType([3], "float32")


def module(*names: str) -> tvm.IRModule:
    """Functions that return sin(cos(x))."""
    builder = relax.BlockBuilder()
    for name in names:
        x = relax.Var("x", X)
        with builder.function(name, [x]):
            with builder.dataflow():
                y = builder.emit(relax.op.cos(x))
                out = builder.emit_output(relax.op.sin(y))
            builder.emit_func_output(out)
    return builder.finalize()


@mutator
class _SinOfTheArgument(FunctionRewriter):
    """sin(cos(x)) becomes sin(x), so that cos has no reader left."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if call.op.name != "relax.sin":
            return call
        return relax.op.sin(self.lookup_binding(call.args[0]).args[0])


@mutator
class _Stranger(FunctionRewriter):
    """sin reads a variable that nothing defines."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        return relax.op.sin(relax.Var("stranger", X)) if call.op.name == "relax.sin" else call


def operators(func: relax.Function) -> list[str]:
    return [binding.value.op.name for block in func.body.blocks for binding in block.bindings]


def test_every_function_is_rewritten_and_dead_code_goes():
    before = module("first", "second")
    after = _SinOfTheArgument(before).transform()
    for name in ("first", "second"):
        assert operators(before[name]) == ["relax.cos", "relax.sin"] and operators(after[name]) == ["relax.sin"]


def test_a_result_that_is_not_well_formed_is_refused():
    with pytest.raises(Exception, match="stranger"):
        _Stranger(module("main")).transform()
