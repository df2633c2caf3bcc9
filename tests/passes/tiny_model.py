"""A tiny decoder as a canonical Relax module, and the same decoder in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

VOCAB, HIDDEN, POSITIONS = 19, 24, 256


@dataclass(frozen=True)
class TinyModel:
    """Embeddings of ids and positions, attention layers with a residual, an output layer; no norms.

    Tests override ``join`` and ``attend`` for modules that are nearly canonical.
    """

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    scale: float = 0.3
    window: int | None = None
    index_dtype: str = "int32"
    softcap: float | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the weights, in parameter order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = [(HIDDEN, q), (HIDDEN, kv), (HIDDEN, kv), (q, HIDDEN)]
        return [(VOCAB, HIDDEN), (POSITIONS, HIDDEN), *layer * self.layers, (HIDDEN, VOCAB)]

    @cached_property
    def weights(self) -> list[np.ndarray]:
        """Random float32 weights."""
        rng = np.random.default_rng(7)
        spread = [1.0, 1.0, *(rows**-0.5 for rows, _ in self.shapes[2:])]
        return [
            (s * rng.standard_normal(shape)).astype(np.float32) for s, shape in zip(spread, self.shapes, strict=True)
        ]

    def module(self) -> tvm.IRModule:
        """The canonical module."""
        batch, seq, past = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq", "past"))
        tensor, index = relax.TensorType, self.index_dtype
        inputs = [
            relax.Var("ids", tensor([batch, seq], index)),
            relax.Var("positions", tensor([batch, seq], index)),
            relax.Var("last", tensor([batch], index)),
        ]
        cache = self.past_shape(batch, past)
        pasts = [relax.Var(f"past_{r}_{i}", tensor(cache, "float32")) for i in range(self.layers) for r in "kv"]
        weights = [relax.Var(f"w{i}", tensor(shape, "float32")) for i, shape in enumerate(self.shapes)]
        names = {name: name for name in ("ids", "positions", "last")}
        attrs = {"num_input": 3 + len(pasts), "rotquant.inputs": names}
        if self.softcap:
            attrs["rotquant.softcaps"] = [self.softcap] * self.layers
        bb = relax.BlockBuilder()
        with bb.function("main", [*inputs, *pasts, *weights], attrs=attrs):
            with bb.dataflow():
                outputs = self._body(bb, inputs, pasts, weights)
                result = bb.emit_output(relax.Tuple(outputs))
            bb.emit_func_output(result)
        mod = bb.finalize()
        relax.analysis.well_formed(mod)
        return mod

    def _body(self, bb, inputs, pasts, weights):
        ids, positions, last = inputs
        embedded = bb.emit(op.take(weights[0], ids, axis=0, mode="clip"))
        x = bb.emit(op.add(embedded, bb.emit(op.take(weights[1], positions, axis=0, mode="clip"))))
        presents = []
        for layer in range(self.layers):
            wq, wk, wv, wo = weights[2 + 4 * layer : 6 + 4 * layer]
            q = self._heads(bb, bb.emit(op.matmul(x, wq)), self.heads)
            split = [self._heads(bb, bb.emit(op.matmul(x, w)), self.kv_heads) for w in (wk, wv)]
            new = [bb.emit(op.permute_dims(part, [0, 2, 1, 3])) for part in split]
            joined = [self.join(bb, p, n) for p, n in zip(pasts[2 * layer : 2 * layer + 2], new, strict=True)]
            presents += joined
            out = self.attend(bb, q, *joined)
            flat = bb.emit(op.reshape(out, [*out.ty.shape.values[:2], self.heads * self.head_dim]))
            x = bb.emit(op.add(x, bb.emit(op.matmul(flat, wo))))
        return [self.logits(bb, x, positions, last, weights[-1]), *presents]

    def logits(self, bb, x, positions, last, weight):
        """Logits [batch, vocab] of token ``last`` of x [batch, seq, hidden]."""
        batch = last.ty.shape[0]
        index = op.broadcast_to(bb.emit(op.reshape(last, [batch, 1, 1])), [batch, 1, HIDDEN])
        chosen = bb.emit(op.gather_elements(x, bb.emit(op.astype(bb.emit(index), "int64")), axis=1))
        return bb.emit(op.matmul(bb.emit(op.reshape(chosen, [batch, HIDDEN])), weight))

    def _heads(self, bb, x, heads):
        return bb.emit(op.reshape(x, [*x.ty.shape.values[:2], heads, self.head_dim]))

    def past_shape(self, batch, past):
        """Shape of a past key or value."""
        return [batch, self.kv_heads, past, self.head_dim]

    def join(self, bb, past, new):
        """The present from the past and the new tokens."""
        return bb.emit(op.concat([past, new], axis=2))

    def attend(self, bb, q, k, v):
        """Attention of q [b, s, h, d] over presents."""
        k, v = (bb.emit(op.permute_dims(x, [0, 2, 1, 3])) for x in (k, v))
        return bb.emit(op.nn.attention(q, k, v, scale=self.scale, causal_mask="BottomRight", window_size=self.window))

    def forward(self, ids, pasts, held=None):
        """One sequence in float64: ids [s], pasts per layer (k, v) [kv_heads, p, d].

        ``held(layer, new)`` gives the (k, v) that attention sees of the new tokens, if not ``new`` itself. Returns the
        logits of the last token and the new tokens' (k, v) per layer.
        """
        weights = [w.astype(np.float64) for w in self.weights]
        start, count = pasts[0][0].shape[1], len(ids)
        x = weights[0][ids] + weights[1][start : start + count]
        news = []
        for layer in range(self.layers):
            wq, wk, wv, wo = weights[2 + 4 * layer : 6 + 4 * layer]
            q = (x @ wq).reshape(count, self.heads, self.head_dim)
            new = [(x @ w).reshape(count, self.kv_heads, self.head_dim).swapaxes(0, 1) for w in (wk, wv)]
            news.append(new)
            seen = new if held is None else held(layer, new)
            k, v = (np.concatenate(pair, axis=1) for pair in zip(pasts[layer], seen, strict=True))
            x = x + self.attention(q, k, v, start).reshape(count, -1) @ wo
        return x[-1] @ weights[-1], news

    def attention(self, q, k, v, start):
        """Causal attention of q [s, h, d] at positions start… over k, v [kv_heads, n, d]."""
        k, v = (np.repeat(x, self.heads // self.kv_heads, axis=0) for x in (k, v))
        distance = start + np.arange(len(q))[:, None] - np.arange(k.shape[1])
        hidden = (distance < 0) | (distance >= (self.window or np.inf))
        scores = np.einsum("shd,hnd->hsn", q, k) * self.scale
        scores = self.softcap * np.tanh(scores / self.softcap) if self.softcap else scores
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hsn,hnd->shd", weights / weights.sum(-1, keepdims=True), v)

    def empty_past(self):
        """No tokens."""
        return [[np.zeros((self.kv_heads, 0, self.head_dim))] * 2 for _ in range(self.layers)]
