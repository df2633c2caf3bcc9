"""Quantize, dequantize and roundtrip of plain vectors: codes and gains apart, not packed into tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..formats import Codec
from .axes import Axes
from .codec_shape import CodecShape
from .registers import f32
from .sketch_code import sign_value, sketch_element
from .vector_code import EncodeBuffers, element_value, emit_encode, emit_rotation, gain_row

Expr = Any


def _code_dtype(codec: Codec) -> str:
    return "uint16" if codec.format.bits == 16 else "uint8"


def _attributes(operator: str, codec: Codec, dtype: str) -> dict[str, Any]:
    return {"rotquant.op": operator, "tirx.noalias": True, **CodecShape.describe(codec, dtype).attributes()}


def quantize(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``quantize(x, rotation, codes, gain)``.

    Shapes: x ``dtype`` [n, head_dim]; rotation float32 (``Codec.coefficients``); codes uint8 (uint16 for the 16-bit
    formats) [n, head_dim]; gain float16 [n, gains], gains being at least 1 (unused by the 16-bit formats).
    """
    head_dim = codec.head_dim
    gains = max(1, codec.format.gains_per_vector(head_dim))
    n = tir.Var("n", "int64")
    size = codec.coefficients.size
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("quantize")
        T.func_attr(_attributes("quantize", codec, dtype))
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

    Shapes as there; ``rotation`` is ``Codec.inverse_coefficients``; y ``dtype`` [n, head_dim].
    """
    head_dim = codec.head_dim
    gains = max(1, codec.format.gains_per_vector(head_dim))
    n = tir.Var("n", "int64")
    size = codec.inverse_coefficients.size
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dequantize")
        T.func_attr(_attributes("dequantize", codec, dtype))
        codes = T.arg("codes", T.buffer((n, head_dim), _code_dtype(codec)))
        gain = T.arg("gain", T.buffer((n, gains), "float16"))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((n, head_dim), dtype))
        with axes.blocks(n) as block, T.sblock("row"):
            row = T.axis.spatial(n, block)
            T.reads(codes[row, 0:head_dim], gain[row, 0:gains], rotation[0:size])
            T.writes(y[row, 0:head_dim])
            count = 2 if codec.sketch is None else 3
            buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(count)]
            code = lambda dim: codes[row, dim].astype("uint32")  # noqa: E731
            result = _emit_decode(axes, codec, rotation, code, lambda g: f32(gain[row, g]), buffers)
            with axes.lanes(head_dim) as dim:
                T.buffer_store(y, result[dim].astype(dtype), [row, dim])
    return builder.get()


def roundtrip(codec: Codec, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``roundtrip(x, rotation, inverse, y)``: quantize then dequantize, in one launch.

    Shapes: x, y ``dtype`` [n0, n1, n2, head_dim]; rotation and inverse float32 (``Codec.coefficients`` and
    ``Codec.inverse_coefficients``).
    """
    head_dim = codec.head_dim
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    rows = sizes[0] * sizes[1] * sizes[2]
    gains = max(1, codec.format.gains_per_vector(head_dim))
    length = codec.coefficients.size
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("roundtrip")
        T.func_attr(_attributes("roundtrip", codec, dtype))
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
            codes = T.sblock_alloc_buffer((head_dim,), "uint16", scope=axes.scratch)
            gain = T.sblock_alloc_buffer((gains,), "float32", scope=axes.scratch)
            emit_encode(
                axes,
                codec,
                rotation,
                lambda dim: x[(*at, dim)],
                lambda dim, code: T.buffer_store(codes, code.astype("uint16"), [dim]),
                lambda g, value: T.buffer_store(gain, f32(value), [g]),
                buffers,
            )
            scratch = (values, buffers.x, buffers.y)
            result = _emit_decode(
                axes, codec, inverse, lambda dim: codes[dim].astype("uint32"), lambda g: gain[g], scratch
            )
            with axes.lanes(head_dim) as dim:
                T.buffer_store(y, result[dim].astype(dtype), [*at, dim])
    return builder.get()


def _emit_decode(
    axes: Axes,
    codec: Codec,
    inverse: Any,
    code: Callable[[Expr], Expr],
    gain: Callable[[Expr], Expr],
    buffers: Sequence[Any],
) -> Any:
    """Decode one vector, un-rotated; ``code(dim)`` is uint32, ``gain(row)`` float32. Returns the buffer with it."""
    head_dim, structure = codec.head_dim, codec.inverse_rotation.structure
    with axes.lanes(head_dim) as dim:
        value, row = element_value(codec, code, dim), gain_row(codec.format, dim)
        T.buffer_store(buffers[0], value if row is None else value * gain(row), [dim])
    if codec.sketch is None:
        return emit_rotation(axes, structure, head_dim, inverse, buffers[0], buffers[1])
    with axes.lanes(head_dim) as dim:
        T.buffer_store(buffers[1], sign_value(codec, code(dim)) * gain(1), [dim])
    first = codec.inverse_rotation.data.size
    with axes.lanes(head_dim) as dim:
        sketched = sketch_element(codec, inverse, first, lambda j: buffers[1][j], dim)
        T.buffer_store(buffers[2], buffers[0][dim] + sketched, [dim])
    return emit_rotation(axes, structure, head_dim, inverse, buffers[2], buffers[1])
