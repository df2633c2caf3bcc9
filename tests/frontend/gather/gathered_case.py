"""Relax functions before and after gathering, run side by side from one build."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R
from tvm.relax.expr_functor import PyExprMutator, mutator

from rotquant_tvm.frontend.gather import gather_attention

ATTENTION = ("relax.nn.attention", "relax.nn.attention_bias")


@dataclass(frozen=True)
class Attention:
    """What a gathered attention is, as plain data."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    masked: bool
    softcap: float


def function_of(arguments: dict[str, tuple], body: Callable[..., Any], dtype: str = "float32") -> tvm.IRModule:
    """A module whose "main" is ``body(*variables)``; an argument is a shape, or a shape and its dtype."""
    variables = []
    for name, shape in arguments.items():
        own = dtype
        if isinstance(shape[-1], str) and isinstance(shape[0], tuple):
            shape, own = shape
        variables.append(relax.Var(name, relax.TensorType(list(shape), own)))
    builder = relax.BlockBuilder()
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(body(builder.emit, *variables)))
        builder.emit_func_output(result)
    mod = builder.get()
    relax.analysis.well_formed(mod)
    return mod


def attentions(mod: tvm.IRModule) -> list[Attention]:
    """The gathered attentions of a module."""
    function = mod["main"]
    calls = [
        value
        for value in relax.analysis.get_var2val(function).values()
        if isinstance(value, relax.Call) and getattr(value.op, "name", "") in ATTENTION
    ]
    caps = function.attrs["rotquant.softcaps"] if "rotquant.softcaps" in (function.attrs or {}) else [0.0] * len(calls)
    assert len(caps) == len(calls)
    return [
        Attention(
            int(call.args[0].ty.shape[2]),
            int(call.args[1].ty.shape[2]),
            int(call.args[0].ty.shape[3]),
            float(call.attrs.scale),
            len(call.args) == 4,
            float(cap),
        )
        for call, cap in zip(calls, caps, strict=True)
    ]


@mutator
class _SpellOut(PyExprMutator):
    """Attention calls as their definition, for TVM has no kernel for grouped heads and soft-capping."""

    def __init__(self, caps: list[float]) -> None:
        super().__init__()
        self.caps = iter(caps)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") not in ATTENTION:
            return call
        emit = self.builder_.emit
        q, k, v = (emit(R.permute_dims(emit(R.astype(x, "float32")), [0, 2, 1, 3])) for x in call.args[:3])
        group = int(q.ty.shape[1]) // int(k.ty.shape[1])
        if group > 1:
            k, v = (emit(R.repeat(x, group, 1)) for x in (k, v))
        scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
        scores = emit(R.multiply(scores, relax.const(float(call.attrs.scale), "float32")))
        cap = next(self.caps)
        if cap:
            bounded = emit(R.tanh(emit(R.divide(scores, relax.const(cap, "float32")))))
            scores = emit(R.multiply(bounded, relax.const(cap, "float32")))
        if len(call.args) == 4:
            scores = emit(R.add(scores, emit(R.astype(call.args[3], "float32"))))
        out = emit(R.permute_dims(emit(R.matmul(emit(R.nn.softmax(scores, -1)), v)), [0, 2, 1, 3]))
        return R.astype(out, call.args[0].ty.dtype.dtype)


def spell_out(mod: tvm.IRModule) -> relax.Function:
    """The function "main" with attention calls as products and a softmax."""
    caps = [attention.softcap for attention in attentions(mod)]
    return _SpellOut(caps).visit_expr(mod["main"])


def run_both(cases: dict[str, tuple[tvm.IRModule, tvm.IRModule, list[np.ndarray]]]) -> dict[str, tuple[list, list]]:
    """The results of (module, gathered module) of each case on its inputs, all from one build."""
    functions = {}
    for name, (before, after, _) in cases.items():
        for kind, function in (("before", before["main"]), ("after", spell_out(after))):
            symbol = f"{name}_{kind}"
            functions[symbol] = relax.utils.copy_with_new_vars(function).with_attr("global_symbol", symbol)
    mod = tvm.IRModule({tvm.ir.GlobalVar(symbol): function for symbol, function in functions.items()})
    with tvm.transform.PassContext(opt_level=0, disabled_pass=["RewriteDataflowReshape"]):
        machine = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    results = {}
    for name, (_, _, inputs) in cases.items():
        tensors = [tvm.runtime.tensor(array) for array in inputs]
        results[name] = tuple(_arrays(machine[f"{name}_{kind}"](*tensors)) for kind in ("before", "after"))
    return results


def _arrays(result: Any) -> list[np.ndarray]:
    return [result.numpy()] if hasattr(result, "numpy") else [array for part in result for array in _arrays(part)]


def causal(queries: int, keys: int, low: float = -math.inf) -> np.ndarray:
    """An additive causal mask [queries, keys], the last query at the last key."""
    return np.where(np.tri(queries, keys, keys - queries, dtype=bool), 0, low).astype("float32")


def gathered(mod: tvm.IRModule) -> tuple[tvm.IRModule, list[Attention]]:
    """The module after gathering, checked to be well formed, and its attentions."""
    after = gather_attention(mod)
    relax.analysis.well_formed(after)
    return after, attentions(after)
