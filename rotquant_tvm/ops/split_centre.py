"""Split a chunk's keys into remainders, to be quantized, and centres, to be added back: for simulating a policy."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import TILE_TOKENS
from .axes import Axes
from .centre import Centre
from .vector_code import f32, register, sanitize

Expr = Any


def split_centre(kv_heads: int, head_dim: int, dtype: str, sinks: int, center: int, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``split_centre(x, new_lengths, remainder, centre)`` for rows whose sequences begin with this chunk.

    Shapes: x, remainder, centre ``dtype`` [batch, kv_heads, seq, head_dim]; new_lengths int32 [batch]. x is remainder
    + centre up to rounding. Of the first ``sinks`` tokens all is centre, rounded to fp16; of the others the centre is
    that of their block of ``center`` tokens (none: 0), as a flush would take it.
    """
    batch, seq = tir.Var("batch", "int64"), tir.Var("seq", "int64")
    size = center or TILE_TOKENS
    blocks = (seq + (size - 1)) // size
    zero = tir.const(0, "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("split_centre")
        T.func_attr({"rotquant.op": "split_centre", "tirx.noalias": True})
        x = T.arg("x", T.buffer((batch, kv_heads, seq, head_dim), dtype))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        outputs = [T.arg(n, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for n in ("remainder", "centre")]
        # One block more than the tokens fill: the sinks.
        with axes.blocks(batch * kv_heads * (blocks + 1)) as index, T.sblock("split"):
            piece = T.axis.spatial(batch * kv_heads * (blocks + 1), index)
            T.reads(x[0:batch, 0:kv_heads, 0:seq, 0:head_dim], new_lengths[0:batch])
            T.writes(*(out[0:batch, 0:kv_heads, 0:seq, 0:head_dim] for out in outputs))
            b, head = T.Bind(piece // (kv_heads * (blocks + 1))), T.Bind(piece // (blocks + 1) % kv_heads)
            block = T.Bind(piece % (blocks + 1))
            first = register(tir.Select(block == 0, zero, sinks + (block - 1) * size))
            last = register(tir.min(tir.Select(block == 0, tir.const(sinks, "int64"), first + size), seq))
            length = new_lengths[b].astype("int64")
            taken = Centre(axes, head_dim)
            count = register(tir.Select(block == 0, zero, tir.max(tir.min(last, length) - first, zero)))
            counted = count if center else register(zero)
            taken.average(lambda token, dim: sanitize(x[b, head, token, dim]), first, counted)
            with axes.lanes(head_dim) as dim, T.serial(0, tir.max(last - first, zero)) as step:
                token = first + step
                value = sanitize(x[b, head, token, dim])
                centre = tir.Select(block == 0, f32(value.astype("float16")), taken.element(dim))
                T.buffer_store(outputs[1], centre.astype(dtype), [b, head, token, dim])
                rest = tir.Select(block == 0, f32(0), value - centre)
                T.buffer_store(outputs[0], rest.astype(dtype), [b, head, token, dim])
    return builder.get()
