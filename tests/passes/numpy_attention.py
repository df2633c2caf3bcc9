"""Running a function "main" that still holds ``R.nn.attention``, which TVM cannot legalize over a symbolic past."""

from __future__ import annotations

import itertools

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .tiny_model import TinyModel

_NUMBER = itertools.count()


@mutator
class _AttentionInNumpy(PyExprMutator):
    """Replaces each attention by a call of the model's own reference."""

    def __init__(self, model: TinyModel) -> None:
        super().__init__()
        self.model = model

    def visit_call_(self, call):
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") != "relax.nn.attention":
            return call

        def attend(q, k, v, out):
            rows = zip(*(x.numpy().astype(np.float64) for x in (q, k, v)), strict=True)
            results = [self.model.attention(q, k.swapaxes(0, 1), v.swapaxes(0, 1), len(k) - len(q)) for q, k, v in rows]
            out.copyfrom(np.stack(results).astype(np.float32))

        name = f"rotquant.test.tiny_attention_{next(_NUMBER)}"
        tvm.register_global_func(name, attend, override=True)
        return relax.op.call_dps_packed(name, relax.Tuple(list(call.args)), out_ty=call.args[0].ty)


def run_main(model: TinyModel, mod: tvm.IRModule, ids: np.ndarray) -> np.ndarray:
    """Logits of the last tokens of ids [batch, seq], without a past."""
    rest = {g: f for g, f in mod.functions_items() if g.name_hint != "main"}
    compiled = tvm.compile(tvm.IRModule({**rest, "main": _AttentionInNumpy(model).visit_expr(mod["main"])}), "llvm")
    batch, seq = ids.shape
    positions = np.broadcast_to(np.arange(seq), ids.shape)
    inputs = [np.ascontiguousarray(x, np.dtype(model.index_dtype)) for x in (ids, positions, np.full(batch, seq - 1))]
    pasts = [np.zeros((batch, model.kv_heads, 0, model.head_dim), np.float32)] * (2 * model.layers)
    vm = relax.VirtualMachine(compiled, tvm.cpu())
    return vm["main"](*(tvm.runtime.tensor(x) for x in (*inputs, *pasts, *model.weights)))[0].numpy()
