"""Prefill attention: the tokens of a chunk against the packed past and, in 16 bits or more, the chunk itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import NO_POLICY, CachePolicy
from ..formats import Codec, TileLayout
from .axes import Axes
from .online_softmax import LOG2E, OnlineSoftmax
from .rotation_matrices import rotation_matrices
from .segments import Segments, segment_arguments
from .vector_code import f32, register, registers

Expr = Any


def attention_prefill(
    codec_k: Codec,
    codec_v: Codec,
    heads: int,
    kv_heads: int,
    scale: float,
    dtype: str,
    axes: Axes,
    *,
    window: int | None = None,
    softcap: float | None = None,
    policy: CachePolicy = NO_POLICY,
    rotated: bool = False,
) -> tvm.tirx.PrimFunc:
    """Build ``attention_prefill(q, k, v, cache[[, centre], plain, packed], lengths, new_lengths[, …], out)``.

    Shapes: q ``dtype`` [batch, seq, heads, head_dim] and k, v ``dtype`` [batch, kv_heads, seq, head_dim], all in the
    rotated bases; the cache's arrays as ``segment_arguments`` says: with a policy or a window it must not hold the
    chunk yet (whose tokens take others' places in a ring), else it may; lengths int32 [batch] *with* the chunk,
    new_lengths int32 [batch] of it; out ``dtype`` [batch, seq, heads, head_dim] in the values' rotated basis, zero in
    rows that are no real token. ``window`` and ``softcap`` as of ``attention_decode``.
    ``rotated``: q, k, v and out are in the model's own basis. Only what a row reads of the cache needs another: its
    query is rotated for that, and the sums of it un-rotated, by the arguments of ``rotation_matrices``; a row without a
    past is plain attention.
    """
    head_dim, group = codec_k.head_dim, heads // kv_heads
    layout = TileLayout(codec_k.format, codec_v.format, head_dim)
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    words = layout.tile_bytes // 4
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_prefill")
        T.func_attr({"rotquant.op": "attention_prefill", "tirx.noalias": True})
        q = T.arg("q", T.buffer((batch, seq, heads, head_dim), dtype))
        k, v = (T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for name in ("k", "v"))
        arrays = segment_arguments(layout, policy, batch, kv_heads, tiles)
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        matrices = rotation_matrices(codec_k, codec_v, dtype) if rotated else (None, None)
        out = T.arg("out", T.buffer((batch, seq, heads, head_dim), dtype))
        with axes.blocks(batch * heads * seq) as block, T.sblock("row"):
            piece = T.axis.spatial(batch * heads * seq, block)
            whole = arrays[0][0:batch, 0:kv_heads, 0:tiles, 0:words]
            T.reads(q[0:batch, 0:seq, 0:heads, 0:head_dim], whole)
            T.writes(out[0:batch, 0:seq, 0:heads, 0:head_dim])
            b, head = T.Bind(piece // (heads * seq)), T.Bind(piece // seq % heads)
            row = T.Bind((piece % seq).astype("int32"))
            past = T.Bind(lengths[b] - new_lengths[b])
            zero = tir.const(0, "int32")
            oldest = register(tir.max(past + row - (window - 1), zero)) if window else zero
            state = OnlineSoftmax(axes, 1, head_dim, softcap)
            state.start(lambda _, dim: f32(q[b, row, head, dim]), scale)
            turned = _Turned(axes, state, matrices, lambda dim: f32(q[b, row, head, dim]) * f32(scale * LOG2E))
            turned.begin_past()
            kv_head = head // group
            real = row < new_lengths[b]
            segments = Segments(arrays, (codec_k, codec_v), layout, policy, bool(window))
            segments.stream(state, (b, kv_head), register(tir.Select(real, past, zero)), oldest)
            turned.end_past()
            # A loop that may be empty, not a condition: the compiler puts no barrier inside a condition.
            skipped = register(tir.max(oldest - past, zero) // 32)
            count = register(tir.Select(real, row // 32 + 1 - skipped, zero))
            with T.serial(0, count) as step:
                base = (skipped + step) * 32
                state.tile(
                    lambda token, dim: f32(k[b, kv_head, base + token, dim]),
                    lambda token, dim: f32(v[b, kv_head, base + token, dim]),
                    lambda token: tir.all(base + token <= row, past + base + token >= oldest),
                )
            state.finish(lambda _, dim, value: T.buffer_store(out, value.astype(dtype), [b, row, head, dim]))
    return builder.get()


class _Turned:
    """The query of a row in the keys' basis while the past is read, and its output in the values'."""

    def __init__(
        self, axes: Axes, state: OnlineSoftmax, matrices: tuple[Any, Any], query: Callable[[Expr], Expr]
    ) -> None:
        """``query(dim)``: an element of the query as ``state`` takes it."""
        self.state, self.matrices, self.query = state, matrices, query
        if matrices != (None, None):
            self.scratch = T.sblock_alloc_buffer((state.head_dim,), "float32", scope=axes.scratch)

    def begin_past(self) -> None:
        """Rotate the query."""
        matrix, axes = self.matrices[0], self.state.axes
        if matrix is None:
            return
        with axes.lanes(self.state.head_dim) as dim:
            T.buffer_store(self.scratch, self.query(dim), [dim])
        terms = range(0, int(matrix.shape[0]), self.state.head_dim)

        def factor(dim: Expr, n: Expr) -> Expr:
            first, *others = (f32(matrix[term + dim, n]) for term in terms)
            return sum(others, first)

        self.state.put_query(lambda dim: self._sum(lambda n: factor(dim, n) * self.scratch[n]))

    def end_past(self) -> None:
        """Turn the output back, and take the query as it was."""
        matrix = self.matrices[1]
        if matrix is not None:
            self.state.turn_output(
                self.scratch, lambda scratch, dim: self._sum(lambda n: f32(matrix[n, dim]) * scratch[n])
            )
        if self.matrices[0] is not None:
            self.state.put_query(self.query)

    def _sum(self, term: Callable[[Expr], Expr]) -> Expr:
        total = registers(1)
        with T.serial(0, self.state.head_dim) as n:
            T.buffer_store(total, total[0] + term(n), [0])
        return total[0]
