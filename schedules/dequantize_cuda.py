"""Dequantize plain vectors on CUDA: codes, a byte each, and gains to un-rotated vectors."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.ops.site_shape import OP_ATTR
from rotquant_tvm.ops.vector_code import rotation_size

from .code_rows_cuda import code_rows
from .cuda_ops import block_sync
from .format_core_cuda import compared
from .held_rotation_cuda import REGISTER_WEIGHTS, WEIGHT_KNOBS, HeldRotation, load_rotations
from .knobs import chosen_knobs
from .vector_rows_cuda import ROW_KNOBS, RowLoop

KNOBS: dict[str, tuple[int, ...]] = {"elements": (4, 8, 16), **WEIGHT_KNOBS, **ROW_KNOBS}
"""Elements per lane and vector; the rotation's weights; and the loop over rows."""


def dequantize_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
    """The rule: a kernel for plain codebooks behind rotations of small blocks."""
    shape = CodecShape.of(func)
    return None if shape is None or not compared(shape) else build(shape, target, **chosen_knobs(func))


def build(
    shape: CodecShape,
    target: Target,
    *,
    elements: int = 8,
    weights: int = REGISTER_WEIGHTS,
    staged: int = 0,
    **loop_knobs: int,
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.dequantize``; None if there is none. For knobs see ``KNOBS``."""
    rows_of = code_rows(shape, elements)
    if rows_of is None:
        return None
    lanes = rows_of.lanes
    inverse = HeldRotation(lanes, shape.structure[::-1], budget=weights, staged=bool(staged))
    head_dim, size = shape.head_dim, rotation_size(shape.structure, shape.head_dim)
    n = tir.Var("n", "int64")
    loop = RowLoop(n, lanes.groups, target, **loop_knobs)
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("dequantize")
        T.func_attr({OP_ATTR: "dequantize", "tirx.noalias": True})
        codes = T.arg("codes", T.buffer((n, head_dim), shape.code_dtype))
        gain = T.arg("gain", T.buffer((n, shape.gain_columns), "float16"))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((n, head_dim), shape.dtype))
        with loop.launch() as (block, thread):
            lane, group = lanes.place(thread)
            sources = [rows_of(lane) for _ in range(loop.rows)]

            def prepare() -> None:
                rows_of.fill(thread)
                inverse.place(lane)
                if load_rotations([(inverse, rotation)], thread, loop.warps):
                    block_sync()

            loop.start(block, thread, group, lambda k, row: sources[k].load(codes, gain, row, loop.read), prepare)

            def work() -> None:
                vectors = [source.values() for source in sources]
                loop.read_next()
                decoded = inverse.apply(vectors)
                loop.each_row(lambda k, row: lanes.store(list(decoded[k]), y, [row], lane, loop.write))

            loop.run(work)
    return builder.get()
