"""Dense attention over dequantized keys and values: the plain form that the passes start from."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .axes import Axes
from .online_softmax import OnlineSoftmax
from .vector_code import f32

Expr = Any


def attention_dense(
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    dtype: str,
    axes: Axes,
    *,
    chunk: bool,
    window: int | None = None,
    softcap: float | None = None,
    sinks: int = 0,
) -> tvm.tirx.PrimFunc:
    """Build ``attention_dense(q, k_past, v_past[, k, v], lengths, new_lengths, out)``.

    Shapes: q ``dtype`` [batch, seq, heads, head_dim]; k_past, v_past float32 [batch, kv_heads, capacity, head_dim];
    k, v ``dtype`` [batch, kv_heads, seq, head_dim]; lengths int32 [batch] with the new tokens, new_lengths int32
    [batch]; out as q, zero in rows that are no real token. With ``chunk`` the new tokens' keys and values come from
    k and v (causally); without it they stand in the past already, and row r sees the tokens up to its own.
    ``window`` and ``softcap`` as of ``attention_decode``. With a window the past is a ring behind its first ``sinks``
    rows: position p stands in row p, or behind the sinks in row sinks + (p - sinks) modulo (capacity - sinks).
    """
    group = heads // kv_heads
    batch, seq, capacity = (tir.Var(name, "int64") for name in ("batch", "seq", "capacity"))
    zero = tir.const(0, "int32")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attention_dense")
        T.func_attr({"rotquant.op": "attention_dense", "tirx.noalias": True})
        q = T.arg("q", T.buffer((batch, seq, heads, head_dim), dtype))
        past_k, past_v = (
            T.arg(name, T.buffer((batch, kv_heads, capacity, head_dim), "float32")) for name in ("k_past", "v_past")
        )
        names = ("k", "v") if chunk else ()
        new = [T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for name in names]
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        out = T.arg("out", T.buffer((batch, seq, heads, head_dim), dtype))
        with axes.blocks(batch * heads * seq) as block, T.sblock("row"):
            piece = T.axis.spatial(batch * heads * seq, block)
            T.reads(q[0:batch, 0:seq, 0:heads, 0:head_dim], past_k[0:batch, 0:kv_heads, 0:capacity, 0:head_dim])
            T.writes(out[0:batch, 0:seq, 0:heads, 0:head_dim])
            b, head = T.Bind(piece // (heads * seq)), T.Bind(piece // seq % heads)
            row = T.Bind((piece % seq).astype("int32"))
            past = T.Bind(lengths[b] - new_lengths[b])
            oldest = T.Bind(tir.max(past + row - (window - 1), zero) if window else zero)
            held = past if chunk else past + row + 1
            stored = T.Bind(held if window else tir.min(held, capacity.astype("int32")))

            def place(position: Expr) -> Expr:
                if not window:
                    return position
                turned = tir.max(position - sinks, zero) % (capacity - sinks).astype("int32") + sinks
                return tir.Select(position < sinks, position, turned) if sinks else turned

            state = OnlineSoftmax(axes, 1, head_dim, softcap)
            state.start(lambda _, dim: f32(q[b, row, head, dim]), scale)
            # Loops that may be empty, not conditions: the compiler puts no barrier inside a condition.
            real = row < new_lengths[b]
            with T.serial(0, tir.Select(real, (stored + 31) // 32, zero)) as tile:
                base = tile * 32
                state.tile(
                    lambda token, dim: past_k[b, head // group, place(base + token), dim],
                    lambda token, dim: past_v[b, head // group, place(base + token), dim],
                    lambda token: tir.all(base + token < stored, base + token >= oldest),
                )
            if chunk:
                with T.serial(0, tir.Select(real, row // 32 + 1, zero)) as tile:
                    base = tile * 32
                    state.tile(
                        lambda token, dim: f32(new[0][b, head // group, base + token, dim]),
                        lambda token, dim: f32(new[1][b, head // group, base + token, dim]),
                        lambda token: tir.all(base + token <= row, past + base + token >= oldest),
                    )
            state.finish(lambda _, dim, value: T.buffer_store(out, value.astype(dtype), [b, row, head, dim]))
    return builder.get()
