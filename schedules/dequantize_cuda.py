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

from .code_exchange_cuda import CodeExchange
from .code_rows_cuda import code_rows
from .cuda_ops import block_sync
from .exchanged_rotation_cuda import ExchangedRotation
from .format_core_cuda import compared
from .held_rotation_cuda import WEIGHT_KNOBS, HeldRotation, default_budget, load_rotations
from .knobs import chosen_knobs
from .vector_rows_cuda import ROW_KNOBS, RowLoop

KNOBS: dict[str, tuple[int, ...]] = {"elements": (4, 8, 16), **WEIGHT_KNOBS, **ROW_KNOBS}
"""Elements per lane and vector; the rotation; and the loop over rows."""


def dequantize_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
    """The rule: a kernel for plain codebooks behind rotations of small blocks."""
    shape = CodecShape.of(func)
    return None if shape is None or not compared(shape) else build(shape, target, **chosen_knobs(func))


def build(
    shape: CodecShape,
    target: Target,
    *,
    elements: int = 8,
    weights: int | None = None,
    staged: int = 1,
    exchange: int = 1,
    **loop_knobs: int,
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.dequantize``; None if there is none. For knobs see ``KNOBS``."""
    rows_of = code_rows(shape, elements)
    if rows_of is None:
        return None
    lanes = rows_of.lanes
    budget = default_budget(shape.structure) if weights is None else weights
    inverse = HeldRotation(lanes, shape.structure[::-1], budget=budget, staged=bool(staged))
    exchanged: ExchangedRotation | None = None
    if exchange and len(shape.structure) > 1 and shape.code_dtype == "uint8":
        if ExchangedRotation.possible(lanes, shape.structure):
            exchanged = ExchangedRotation(lanes, shape.structure, budget=weights, inverse=True)
            loop_knobs.setdefault("resident", exchanged.resident if loop_knobs.get("rows", 1) == 1 else 0)
    registers = inverse.register_weights() if exchanged is None else exchanged.register_weights
    head_dim, size = shape.head_dim, rotation_size(shape.structure, shape.head_dim)
    n = tir.Var("n", "int64")
    loop = RowLoop(n, lanes.groups, target, registers=registers, **loop_knobs)
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
                if exchanged is not None:
                    exchanged.load(rotation, lane, thread, loop.warps)
                    return
                inverse.place(lane)
                if load_rotations([(inverse, rotation)], thread, loop.warps):
                    block_sync()

            loop.start(block, thread, group, lambda k, row: sources[k].load(codes, gain, row, loop.read), prepare)

            def work() -> None:
                if exchanged is not None:
                    for source in sources:
                        for k, word in enumerate(CodeExchange(exchanged, lane).into(list(source.words))):
                            source.words[k] = word
                vectors = [source.values() for source in sources]
                loop.read_next()
                decoded = inverse.apply(vectors) if exchanged is None else exchanged.apply_inverse(vectors)
                loop.each_row(lambda k, row: lanes.store(list(decoded[k]), y, [row], lane, loop.write))

            loop.run(work)
    return builder.get()
