"""Tiny decoders with what may stand between rotations and weights: rotary embeddings, packed weights, norms, gates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import relax
from tvm.relax import op

from .tiny_model import HIDDEN, POSITIONS, VOCAB, TinyModel


@dataclass(frozen=True)
class FoldModel(TinyModel):
    """A tiny model with other ways between its linear layers and attention.

    ``packed``: one weight with a bias for queries, keys and values; ``rotary``: "half-split" or "interleaved", of
    ``rotary_dims``; ``norm``: queries and keys are normalized; ``gate``: attention's output is multiplied by a gate;
    ``shared``: values are the keys; ``reread``: the values have another reader.
    """

    layers: int = 1
    packed: bool = False
    rotary: str = ""
    rotary_dims: int = 0
    norm: bool = False
    gate: bool = False
    shared: bool = False
    reread: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """Features of all queries, and of all keys or values."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def shapes(self):
        """Shapes of the weights, in parameter order."""
        q, kv = self.widths
        layer = [(HIDDEN, q + 2 * kv), (q + 2 * kv,)] if self.packed else [(HIDDEN, q), (HIDDEN, kv), (kv, HIDDEN)]
        layer += [(q, HIDDEN)] + ([(HIDDEN, q)] if self.gate else [])
        return [(VOCAB, HIDDEN), (POSITIONS, HIDDEN), *layer * self.layers, (HIDDEN, VOCAB)]

    @cached_property
    def weights(self):
        """Random float32 weights; values are stored [out, in]."""
        rng = np.random.default_rng(7)
        return [(shape[0] ** -0.3 * rng.standard_normal(shape)).astype(np.float32) for shape in self.shapes]

    def _body(self, bb, inputs, pasts, weights):
        ids, positions, last = inputs
        embedded = bb.emit(op.take(weights[0], ids, axis=0, mode="clip"))
        x = bb.emit(op.add(embedded, bb.emit(op.take(weights[1], positions, axis=0, mode="clip"))))
        presents, rest = [], iter(weights[2:-1])
        for layer in range(self.layers):
            q, *new = self.projected(bb, x, rest, positions)
            joined = [self.join(bb, p, n) for p, n in zip(pasts[2 * layer : 2 * layer + 2], new, strict=True)]
            presents += joined
            out = self.attend(bb, q, *joined)
            flat = bb.emit(op.reshape(out, [*out.ty.shape.values[:2], self.widths[0]]))
            wo = next(rest)
            if self.gate:
                flat = bb.emit(op.multiply(flat, bb.emit(op.sigmoid(bb.emit(op.matmul(x, next(rest)))))))
            x = bb.emit(op.add(x, bb.emit(op.matmul(flat, wo))))
            if self.reread:
                x = bb.emit(op.add(x, bb.emit(op.reshape(op.mean(new[1], axis=[1, 2, 3]), [x.ty.shape[0], 1, 1]))))
        return [self.logits(bb, x, positions, last, weights[-1]), *presents]

    def projected(self, bb, x, weights, positions):
        """Queries [b, s, h, d], new keys and values [b, h, s, d]."""
        q, kv = self.widths
        if self.packed:
            joined = bb.emit(op.add(bb.emit(op.matmul(x, next(weights))), next(weights)))
            parts = bb.emit(op.split(joined, [q, q + kv], axis=2))
            parts = [bb.emit(relax.TupleGetItem(parts, i)) for i in range(3)]
        else:
            wq, wk, wv = (next(weights) for _ in range(3))
            k = bb.emit(op.matmul(x, wk))
            v = k if self.shared else bb.emit(op.matmul(x, bb.emit(op.permute_dims(wv))))
            parts = [bb.emit(op.matmul(x, wq)), k, v]
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (self._heads(bb, part, count) for part, count in zip(parts, heads, strict=True))
        q, k = (self.turned(bb, self.normed(bb, part), positions) for part in (q, k))
        return [q, *(bb.emit(op.permute_dims(part, [0, 2, 1, 3])) for part in (k, v))]

    def normed(self, bb, x):
        """X over its root mean square, if the model has such a norm."""
        if not self.norm:
            return x
        square = bb.emit(op.mean(bb.emit(op.multiply(x, x)), axis=[-1], keepdims=True))
        return bb.emit(op.multiply(x, bb.emit(op.rsqrt(bb.emit(op.add(square, relax.const(1e-6, "float32")))))))

    def turned(self, bb, x, positions):
        """The rotary embedding of x [b, s, h, d], on its first ``rotary_dims`` dimensions (0: all)."""
        if not self.rotary:
            return x
        size = self.rotary_dims or self.head_dim
        batch, seq = positions.ty.shape.values
        frequencies = relax.const((0.7 ** np.arange(size // 2)).astype(np.float32))
        angles = bb.emit(op.multiply(bb.emit(op.expand_dims(op.astype(positions, "float32"), 2)), frequencies))
        if self.rotary == "half-split":
            angles = bb.emit(op.concat([angles, angles], axis=-1))
        else:
            wide = bb.emit(op.broadcast_to(op.expand_dims(angles, 3), [batch, seq, size // 2, 2]))
            angles = bb.emit(op.reshape(wide, [batch, seq, size]))
        cos, sin = (bb.emit(op.expand_dims(bb.emit(f(angles)), 2)) for f in (op.cos, op.sin))
        turning = bb.emit(op.strided_slice(x, [3], [0], [size]))
        result = bb.emit(op.add(op.multiply(turning, cos), op.multiply(self.half(bb, turning, size), sin)))
        if size == self.head_dim:
            return result
        return bb.emit(op.concat([result, bb.emit(op.strided_slice(x, [3], [size], [self.head_dim]))], axis=-1))

    def half(self, bb, x, size):
        """X turned by a quarter in every pair of dimensions."""
        if self.rotary == "half-split":
            lower = bb.emit(op.strided_slice(x, [3], [0], [size // 2]))
            upper = bb.emit(op.strided_slice(x, [3], [size // 2], [size]))
            return bb.emit(op.concat([bb.emit(op.negative(upper)), lower], axis=-1))
        even = bb.emit(op.strided_slice(x, [3], [0], [size], [2]))
        odd = bb.emit(op.strided_slice(x, [3], [1], [size], [2]))
        parts = [bb.emit(op.expand_dims(part, 4)) for part in (op.negative(odd), even)]
        return bb.emit(op.reshape(bb.emit(op.concat(parts, axis=-1)), x.ty.shape))


GPT2 = FoldModel(packed=True, heads=2, kv_heads=2)
"""Like GPT-2: packed weights with biases, no rotary embedding."""
LLAMA = FoldModel(rotary="half-split")
"""Like Llama: grouped queries, a rotary embedding in halves."""
INTERLEAVED = FoldModel(rotary="interleaved", rotary_dims=16)
"""Like GLM: a rotary embedding of neighbours, on half of the dimensions."""
