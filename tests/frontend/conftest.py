"""A small executor of canonical modules: attention in NumPy, all else compiled by TVM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

_NUMBER = itertools.count()


def reference_attention(q, k, v, scale, window):
    """BSHD attention with grouped heads; the last query sees the last key."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    distance = np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - np.arange(k.shape[1])
    hidden = (distance < 0) | ((distance >= window) if window else False)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@mutator
class _AttentionToNumpy(PyExprMutator):
    """Replace each attention by a call of a NumPy function."""

    def visit_call_(self, call):
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") != "relax.nn.attention":
            return call
        attrs = call.attrs
        scale = float(attrs.scale.value if hasattr(attrs.scale, "value") else attrs.scale)
        window = None if attrs.window_size is None else int(attrs.window_size)
        assert attrs.causal_mask == "BottomRight"

        def attend(q, k, v, out):
            result = reference_attention(q.numpy(), k.numpy(), v.numpy(), scale, window)
            out.copyfrom(result.astype(str(out.dtype)))

        name = f"rotquant.test.attention_{next(_NUMBER)}"
        tvm.register_global_func(name, attend, override=True)
        return relax.op.call_dps_packed(name, relax.Tuple(list(call.args)), out_ty=call.args[0].ty)


@dataclass
class CanonicalRunner:
    """A compiled canonical module with its weights; ``step`` keeps the past."""

    imported: object

    def __post_init__(self):
        mod = self.imported.mod
        changer = _AttentionToNumpy(mod)
        function = changer.visit_expr(mod["main"])
        mod = tvm.IRModule({"main": function})
        with tvm.target.Target("llvm"):
            executable = tvm.compile(relax.get_pipeline("zero")(mod), "llvm")
        self.vm = relax.VirtualMachine(executable, tvm.cpu())
        self.weights = [tvm.runtime.tensor(w) for w in self.imported.weights]
        self.dtype = self.imported.weights[0].dtype

    def empty_past(self, batch):
        past = []
        for kv_heads, _, head_dim in self.imported.config["layers"]:
            past += [np.zeros((batch, kv_heads, 0, head_dim), self.dtype) for _ in range(2)]
        return past

    def step(self, ids, past, last=None):
        """ids [batch, seq] → (logits of token ``last`` of each row, presents)."""
        batch, seq = ids.shape
        start = past[0].shape[2]
        positions = np.broadcast_to(np.arange(start, start + seq), (batch, seq))
        last = np.full(batch, seq - 1) if last is None else np.asarray(last)
        inputs = [np.ascontiguousarray(x, dtype=np.int32) for x in (ids, positions, last)]
        out = self.vm["main"](*(tvm.runtime.tensor(x) for x in [*inputs, *past]), *self.weights)
        logits, *presents = (x.numpy() for x in out)
        return logits, presents


@pytest.fixture
def runner():
    return CanonicalRunner
