"""Attention spelled out computes what NumPy computes: grouped heads, windows, soft-capping, masks, over a past."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.spell_out_attention import SpellOutAttention
from tvm import relax
from tvm.relax import op

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.step_graph import SOFTCAPS

from ..sampling import sampled
from .simulated_function import calls

BATCH, SEQ, PAST, HEADS, KV_HEADS, HEAD_DIM = 2, 3, 4, 6, 2, 8
CASES = {
    "causal": {"causal_mask": "BottomRight"},
    "window": {"causal_mask": "BottomRight", "window_size": 3},
    "capped": {"causal_mask": "BottomRight", "cap": 0.7},
    "top-left": {"causal_mask": "TopLeft"},
    "all": {},
    "mask": {"bias": (BATCH, HEADS)},
    "broadcast-mask": {"bias": (1, 1), "cap": 1.5},
}


def module(case: str) -> tvm.IRModule:
    """Attention of queries over a past of symbolic length and new keys."""
    options = dict(CASES[case])
    cap, bias = options.pop("cap", 0.0), options.pop("bias", None)
    seq, past = (tvm.tirx.Var(name, "int64") for name in ("seq", "past"))
    shapes = {"q": [BATCH, seq, HEADS, HEAD_DIM]}
    for name in "kv":
        shapes |= {f"past_{name}": [BATCH, past, KV_HEADS, HEAD_DIM], name: [BATCH, seq, KV_HEADS, HEAD_DIM]}
    if bias:
        shapes["bias"] = [*bias, seq, past + seq]
    params = [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items()]
    q, past_k, k, past_v, v, *rest = params
    builder = relax.BlockBuilder()
    with builder.function("main", params, attrs={SOFTCAPS: [cap]}):
        with builder.dataflow():
            joined = [builder.emit(op.concat(pair, axis=1)) for pair in ((past_k, k), (past_v, v))]
            out = builder.emit(op.nn.attention(q, *joined, *rest, scale=0.6, **options))
            result = builder.emit_output(op.multiply(out, relax.const(2.0, "float32")))
        builder.emit_func_output(result)
    return builder.finalize()


@pytest.mark.parametrize("case", sampled(CASES, ["window", "broadcast-mask"]))
def test_spelled_out_attention_is_the_operators_definition(case):
    mod = SpellOutAttention()(module(case))
    assert not any("attention" in name for name in calls(mod["main"]))
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    arrays = [normal(BATCH, SEQ, HEADS, HEAD_DIM)]
    arrays += [normal(BATCH, n, KV_HEADS, HEAD_DIM) for n in (PAST, SEQ)] * 2
    options = CASES[case]
    bias = normal(*options["bias"], SEQ, PAST + SEQ) if "bias" in options else None
    arrays += [] if bias is None else [bias]
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    found = vm["main"](*(tvm.runtime.tensor(x) for x in arrays)).numpy()
    keys, values = (np.concatenate(arrays[i : i + 2], 1) for i in (1, 3))
    expected = definition(options, arrays[0], keys, values, bias)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-5, atol=1e-5)


def definition(options, q, k, v, bias) -> np.ndarray:
    k, v = (np.repeat(x.astype(np.float64), HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * 0.6
    cap = options.get("cap")
    scores = cap * np.tanh(scores / cap) if cap else scores
    scores = scores if bias is None else scores + bias
    if kind := options.get("causal_mask"):
        first = PAST if kind == "BottomRight" else 0
        distance = first + np.arange(SEQ)[:, None] - np.arange(PAST + SEQ)
        hidden = (distance < 0) | (distance >= options.get("window_size", np.inf))
        scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def test_caps_that_do_not_fit_are_refused():
    mod = module("causal")
    mod["main"] = mod["main"].with_attr(SOFTCAPS, [1.0, 2.0])
    with pytest.raises(ModelError, match="does not fit the model's 1 attentions"):
        SpellOutAttention()(mod)
