"""Advance: the sequences' lengths grow by what a call appends."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .axes import Axes


def advance(axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``advance(lengths, new_lengths)``: lengths += new_lengths, both int32 [batch], in place."""
    batch = tir.Var("batch", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("advance")
        T.func_attr({"rotquant.op": "advance", "tirx.noalias": True})
        lengths = T.arg("lengths", T.buffer((batch,), "int32"))
        new_lengths = T.arg("new_lengths", T.buffer((batch,), "int32"))
        outer = T.thread_binding(0, batch, "blockIdx.x") if axes.kind == "cuda" else T.serial(0, batch)
        with outer as index, T.sblock("sequence"):
            b = T.axis.spatial(batch, index)
            T.reads(lengths[b], new_lengths[b])
            T.writes(lengths[b])
            with axes.lanes(1) as _:
                T.buffer_store(lengths, lengths[b] + new_lengths[b], [b])
    return builder.get()
