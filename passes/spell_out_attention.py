"""SpellOutAttention: every ``nn.attention*`` becomes products and a softmax.

TVM's own lowering of these operators knows no grouped heads and no windows, takes no length that is a sum of sizes, and
cannot know of soft-capping, which is an attribute of the function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.step_graph import SOFTCAPS

from .binding_copy import BindingCopy
from .find_attention import AttentionSite, find_attention

HIDDEN = float(np.finfo(np.float32).min)
"""The score of a token that is not seen."""


@tvm.transform.module_pass(opt_level=0, name="SpellOutAttention")
class SpellOutAttention:
    """Write the attentions of the function "main" as they are defined, in float32: for models that keep no cache.

    Raises ``ModelError`` as ``find_attention``.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite ``mod``."""
        func = mod["main"]
        sites = {site.output: site for site in find_attention(func)}
        rest = {g: f for g, f in mod.functions_items() if g.name_hint != "main"}
        builder = relax.BlockBuilder(tvm.IRModule(rest, attrs=mod.attrs))
        copy = BindingCopy(builder)
        attrs = {name: value for name, value in dict(func.attrs or {}).items() if name != SOFTCAPS}
        with builder.function("main", list(func.params), attrs=attrs):
            with builder.dataflow():
                for block in func.body.blocks:
                    for binding in block.bindings:
                        if binding.var in sites:
                            copy.replace(binding.var, _spelled_out(builder, copy, sites[binding.var]))
                        else:
                            copy.emit(binding)
                output = builder.emit_output(copy.expr(func.body.body))
            builder.emit_func_output(output)
        result = builder.finalize()
        relax.analysis.well_formed(result)
        return result


def _spelled_out(builder: relax.BlockBuilder, copy: BindingCopy, site: AttentionSite) -> relax.Var:
    """The output [batch, seq, heads, head_dim] of an attention."""
    emit = builder.emit
    call = site.call
    dtype = str(call.args[0].ty.dtype)
    q, k, v = (emit(R.astype(copy.expr(x), "float32")) for x in call.args[:3])
    (batch, seq, heads, head_dim), length = q.ty.shape.values, k.ty.shape.values[1]
    group = site.heads // site.kv_heads
    # Query heads that share a kv head stand beside each other.
    q = emit(R.permute_dims(emit(R.reshape(q, [batch, seq, site.kv_heads, group, head_dim])), [0, 2, 3, 1, 4]))
    k = emit(R.expand_dims(emit(R.permute_dims(k, [0, 2, 3, 1])), 2))
    v = emit(R.expand_dims(emit(R.permute_dims(v, [0, 2, 1, 3])), 2))
    scores = emit(R.multiply(emit(R.matmul(q, k)), relax.const(site.scale, "float32")))
    if site.softcap:
        cap = relax.const(site.softcap, "float32")
        scores = emit(R.multiply(emit(R.tanh(emit(R.divide(scores, cap)))), cap))
    if len(call.args) > 3:
        bias = emit(R.astype(copy.expr(call.args[3]), "float32"))
        bias = emit(R.broadcast_to(bias, [batch, heads, seq, length]))
        scores = emit(R.add(scores, emit(R.reshape(bias, [batch, site.kv_heads, group, seq, length]))))
    seen = _seen(emit, call, seq, length)
    if seen is not None:
        scores = emit(R.where(seen, scores, relax.const(HIDDEN, "float32")))
    out = emit(R.permute_dims(emit(R.matmul(emit(R.nn.softmax(scores, -1)), v)), [0, 3, 1, 2, 4]))
    return emit(R.astype(emit(R.reshape(out, [batch, seq, heads, head_dim])), dtype))


def _seen(emit: Any, call: relax.Call, seq: Any, length: Any) -> relax.Var | None:
    """Which keys the operator's attributes let queries see: bool [seq, length], or None for all."""
    kind = str(call.attrs.causal_mask) if call.attrs.causal_mask is not None else ""
    if not kind:
        return None
    first = length - seq if kind == "BottomRight" else tvm.tirx.const(0, "int64")
    first = tvm.sym.Analyzer().simplify(first)
    queries = emit(R.expand_dims(emit(R.arange(first, first + seq, 1, "int64")), 1))
    keys = emit(R.expand_dims(emit(R.arange(0, length, 1, "int64")), 0))
    seen = emit(R.less_equal(keys, queries))
    if call.attrs.window_size is None:
        return seen
    window = relax.const(int(call.attrs.window_size), "int64")
    return emit(R.logical_and(seen, emit(R.greater(keys, emit(R.subtract(queries, window))))))
