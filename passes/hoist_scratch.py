"""HoistScratch: memory that a GPU kernel needs for itself becomes the caller's.

Global memory that a kernel allocates comes from a pool of its thread, which moves it when a larger kernel comes: a
recorded graph of launches would go on using the old place. As a result of the call that nobody reads, it is part of the
caller's memory plan. Counters, which are 0 between launches, are a constant of the function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import mutator
from tvm_ffi import structural_map

from rotquant_tvm.codegen import COUNTERS_ATTR

from .function_rewriter import FunctionRewriter

_CALLS = ("relax.call_tir", "relax.call_tir_inplace")


@tvm.transform.module_pass(opt_level=0, name="HoistScratch")
class HoistScratch:
    """Give calls of TIRx kernels a result for each global array that they allocate, and the counters that they take."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        needs = {gvar: _Needs.of(mod[gvar]) for gvar in _called(mod) if isinstance(mod[gvar], tirx.PrimFunc)}
        needs = {gvar: need for gvar, need in needs.items() if need.scratch or need.counters}
        if not needs:
            return mod
        # A variable of another signature is another variable, under the same name.
        kernels = {gvar: relax.BlockBuilder().add_func(need.func, gvar.name_hint) for gvar, need in needs.items()}
        functions = {gvar: func for gvar, func in mod.functions_items() if gvar not in needs}
        functions |= {kernels[gvar]: need.func for gvar, need in needs.items()}
        return _Hoist(tvm.IRModule(functions, attrs=mod.attrs), needs, kernels).transform()


class _Needs:
    """What a kernel needs beside its arguments and results."""

    def __init__(self, func: tirx.PrimFunc, scratch: list[Any], rest: list[Any]) -> None:
        self.scratch = scratch
        self.counters = int(func.attrs[COUNTERS_ATTR]) if COUNTERS_ATTR in (func.attrs or {}) else 0
        self.func = func
        if scratch:
            body = rest[0] if len(rest) == 1 else tirx.SeqStmt(rest)
            self.func = tirx.PrimFunc([*func.params, *scratch], body, func.ret_type, func.attrs)

    @classmethod
    def of(cls, func: tirx.PrimFunc) -> _Needs:
        """Look for the arrays that a function allocates before anything else."""
        scratch, rest = [], []
        for statement in func.body.seq if isinstance(func.body, tirx.SeqStmt) else [func.body]:
            hoisted = isinstance(statement, tirx.AllocBuffer) and statement.buffer.scope() == "global"
            (scratch if hoisted else rest).append(statement.buffer if hoisted else statement)
        return cls(func, scratch, rest)


def _called(mod: tvm.IRModule) -> list[tvm.ir.GlobalVar]:
    """Kernels that Relax functions call."""
    called: dict[tvm.ir.GlobalVar, None] = {}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") in _CALLS:
            called[expr.args[0]] = None

    for func in mod.functions.values():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return list(called)


@mutator
class _Hoist(FunctionRewriter):
    def __init__(
        self,
        mod: tvm.IRModule,
        needs: dict[tvm.ir.GlobalVar, _Needs],
        kernels: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar],
    ) -> None:
        super().__init__(mod)
        self.needs, self.kernels = needs, kernels
        most = max(need.counters for need in needs.values())
        self.counters = relax.const(np.zeros(most, np.int32)) if most else None

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        name = getattr(call.op, "name", "")
        need = self.needs.get(call.args[0]) if name in _CALLS else None
        if need is None:
            return call
        kernel, single = self.kernels[call.args[0]], isinstance(call.ty, relax.TensorType)
        results = [call.ty] if single else list(call.ty.fields)
        arguments = [*call.args[1], *([self.counters] if need.counters else [])]
        if name == "relax.call_tir":
            results += _types(need, [*(argument.ty for argument in arguments), *results])
            new = relax.call_tir(kernel, arguments, results if len(results) > 1 else results[0])
        else:
            indices = [int(index) for index in call.attrs.inplace_indices]
            fresh = [result for index, result in zip(indices, results, strict=True) if index < 0]
            results += _types(need, [*(argument.ty for argument in arguments), *fresh])
            indices += [-1] * (len(results) - len(indices))
            types = results if len(results) > 1 else results[0]
            new = relax.op.call_tir_inplace(kernel, relax.Tuple(arguments), indices, types)
        return relax.TupleGetItem(self.builder_.emit(new), 0) if single and need.scratch else new


def _types(need: _Needs, types: list[relax.TensorType]) -> list[relax.TensorType]:
    """Types of a call's scratch, in the sizes of its arguments and results (``types``)."""
    sizes: dict[tirx.Var, Any] = {}
    for param, type_ in zip(need.func.params, types, strict=False):
        for size, known in zip(param.shape, type_.shape, strict=True):
            if isinstance(size, tirx.Var):
                sizes.setdefault(size, known)

    def actual(size: tirx.Var) -> Any:
        return sizes[size]

    return [
        relax.TensorType([structural_map(n, (tirx.Var, actual)) for n in buffer.shape], str(buffer.dtype))
        for buffer in need.scratch
    ]
