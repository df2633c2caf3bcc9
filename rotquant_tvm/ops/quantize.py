"""Quantize, dequantize and roundtrip of plain vectors: codes and gains apart, not packed into tiles."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..formats import Codec
from .axes import Axes
from .vector_code import EncodeBuffers, code_value, emit_encode, emit_rotation, f32, gain_row, rotation_size


def _code_dtype(codec: Codec) -> str:
    return "uint16" if codec.format.bits == 16 else "uint8"


def quantize(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``quantize(x, rotation, codes, gain)``.

    Shapes: x ``dtype`` [n, head_dim]; rotation float32 (``Rotation.data``); codes uint8 (uint16 for the 16-bit
    formats) [n, head_dim]; gain float16 [n, gains], gains being at least 1 (unused by the 16-bit formats).
    """
    head_dim = codec.head_dim
    gains = max(1, codec.format.gains_per_vector(head_dim))
    n = tir.Var("n", "int64")
    size = rotation_size(codec.rotation.structure, head_dim)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("quantize")
        T.func_attr({"rotquant.op": "quantize", "tirx.noalias": True})
        x = T.arg("x", T.buffer((n, head_dim), dtype))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        codes = T.arg("codes", T.buffer((n, head_dim), _code_dtype(codec)))
        gain = T.arg("gain", T.buffer((n, gains), "float16"))
        with axes.blocks(n) as block, T.sblock("row"):
            row = T.axis.spatial(n, block)
            T.reads(x[row, 0:head_dim], rotation[0:size])
            T.writes(codes[row, 0:head_dim], gain[row, 0:gains])
            emit_encode(
                axes,
                codec,
                rotation,
                lambda dim: x[row, dim],
                lambda dim, code: T.buffer_store(codes, code.astype(_code_dtype(codec)), [row, dim]),
                lambda g, value: T.buffer_store(gain, value, [row, g]),
                EncodeBuffers(axes, head_dim),
            )
    return builder.get()


def dequantize(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``dequantize(codes, gain, rotation, y)``: the inverse of ``quantize``, un-rotated.

    Shapes as there; ``rotation`` is the *inverse* rotation's data; y ``dtype`` [n, head_dim].
    """
    head_dim = codec.head_dim
    gains = max(1, codec.format.gains_per_vector(head_dim))
    n = tir.Var("n", "int64")
    structure = codec.inverse_rotation.structure
    size = rotation_size(structure, head_dim)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dequantize")
        T.func_attr({"rotquant.op": "dequantize", "tirx.noalias": True})
        codes = T.arg("codes", T.buffer((n, head_dim), _code_dtype(codec)))
        gain = T.arg("gain", T.buffer((n, gains), "float16"))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((n, head_dim), dtype))
        with axes.blocks(n) as block, T.sblock("row"):
            row = T.axis.spatial(n, block)
            T.reads(codes[row, 0:head_dim], gain[row, 0:gains], rotation[0:size])
            T.writes(y[row, 0:head_dim])
            buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(2)]
            with axes.lanes(head_dim) as dim:
                value = code_value(codec, codes[row, dim].astype("uint32"))
                which = gain_row(codec.format, dim)
                if which is not None:
                    value = value * gain[row, which].astype("float32")
                T.buffer_store(buffers[0], value, [dim])
            result = emit_rotation(axes, structure, head_dim, rotation, *buffers)
            with axes.lanes(head_dim) as dim:
                T.buffer_store(y, result[dim].astype(dtype), [row, dim])
    return builder.get()


def roundtrip(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``roundtrip(x, rotation, inverse, y)``: quantize then dequantize, in one launch.

    Shapes: x, y ``dtype`` [n0, n1, n2, head_dim]; rotation and inverse float32 (``Rotation.data`` of each).
    """
    head_dim, structure = codec.head_dim, codec.rotation.structure
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    rows = sizes[0] * sizes[1] * sizes[2]
    gains = max(1, codec.format.gains_per_vector(head_dim))
    length = rotation_size(structure, head_dim)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("roundtrip")
        T.func_attr({"rotquant.op": "roundtrip", "tirx.noalias": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), dtype))
        rotation, inverse = (T.arg(name, T.buffer((length,), "float32")) for name in ("rotation", "inverse"))
        y = T.arg("y", T.buffer((*sizes, head_dim), dtype))
        with axes.blocks(rows) as block, T.sblock("row"):
            row = T.axis.spatial(rows, block)
            at = (row // (sizes[1] * sizes[2]), row // sizes[2] % sizes[1], row % sizes[2])
            T.reads(x[(*at, slice(0, head_dim))], rotation[0:length], inverse[0:length])
            T.writes(y[(*at, slice(0, head_dim))])
            buffers = EncodeBuffers(axes, head_dim)
            values = T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch)
            gain = T.sblock_alloc_buffer((gains,), "float32", scope=axes.scratch)
            emit_encode(
                axes,
                codec,
                rotation,
                lambda dim: x[(*at, dim)],
                lambda dim, code: T.buffer_store(values, code_value(codec, code), [dim]),
                lambda g, value: T.buffer_store(gain, f32(value), [g]),
                buffers,
            )
            with axes.lanes(head_dim) as dim:
                which = gain_row(codec.format, dim)
                T.buffer_store(values, values[dim] * (f32(1) if which is None else gain[which]), [dim])
            result = emit_rotation(axes, codec.inverse_rotation.structure, head_dim, inverse, values, buffers.x)
            with axes.lanes(head_dim) as dim:
                T.buffer_store(y, result[dim].astype(dtype), [*at, dim])
    return builder.get()
