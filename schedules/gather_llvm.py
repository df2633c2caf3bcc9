"""Embedding lookup on CPUs from a weight that is packed for :mod:`.linear_llvm` (tied embeddings)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

_SERIAL_ROWS = 8
"""Up to so many rows cost less than waking the other threads."""


@dataclass(frozen=True)
class PackedGather:
    """Static facts of one lookup; ids have ``leading`` dimensions, all symbolic."""

    vocabulary: int
    features: int
    leading: int
    index_dtype: str = "int64"
    weight_dtype: str = "float32"
    output_dtype: str = "float32"
    tile: int = 32


@functools.cache
def packed_gather(spec: PackedGather) -> tirx.PrimFunc:
    """PrimFunc (packed weight, ids ``[leading…]``, y ``[leading…, features]``).

    Ids are clipped to the vocabulary, so that a bad one reads no foreign memory.
    """
    tile, features = spec.tile, spec.features
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            shape = [tirx.Var(f"d{i}", "int64") for i in range(spec.leading)]
            rows = functools.reduce(lambda a, b: a * b, shape, tirx.const(1, "int64"))
            tiles = -(-spec.vocabulary // tile)
            weight = T.arg("weight", T.Buffer((tiles, features, tile), spec.weight_dtype))
            ids = T.arg("ids", T.Buffer(shape, spec.index_dtype))
            y = T.arg("y", T.Buffer((*shape, features), spec.output_dtype))
            flat_ids = T.decl_buffer((rows,), spec.index_dtype, data=ids.data)
            flat_y = T.decl_buffer((rows, features), spec.output_dtype, data=y.data)

            last = tirx.const(spec.vocabulary - 1, "int64")

            def row(i: tirx.Expr) -> None:
                index = T.max(T.min(T.Cast("int64", flat_ids[i]), last), 0)
                with T.serial(features) as k:
                    value = weight[index // tile, k, index % tile]
                    T.buffer_store(flat_y, T.Cast(spec.output_dtype, value), [i, k])

            with T.If(rows <= _SERIAL_ROWS):
                with T.Then():
                    with T.serial(rows) as i:
                        row(i)
                with T.Else():
                    with T.parallel(rows) as i:
                        row(i)
    return builder.get()
