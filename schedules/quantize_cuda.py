"""Quantize plain vectors on CUDA: codes, a byte each, and gains."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.ops.site_shape import OP_ATTR
from rotquant_tvm.ops.vector_code import rotation_size

from .format_core_cuda import compared, format_core
from .held_rotation_cuda import WEIGHT_KNOBS
from .knobs import chosen_knobs
from .vector_rows_cuda import ENCODE_KNOBS, RowLoop

KNOBS: dict[str, tuple[int, ...]] = {"elements": (4, 8, 16), **WEIGHT_KNOBS, **ENCODE_KNOBS}
"""Elements per lane and vector; the rotation; and the loop over rows."""


def quantize_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
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
    """Build the kernel, with the parameters of ``ops.quantize``; None if there is none. For knobs see ``KNOBS``."""
    core = format_core(shape, elements, codes=True, weights=weights, staged=staged, exchange=exchange)
    if core is None:
        return None
    lanes, head_dim, size = core.lanes, shape.head_dim, rotation_size(shape.structure, shape.head_dim)
    loop_knobs.setdefault("resident", core.resident if loop_knobs.get("rows", 1) == 1 else 0)
    n = tir.Var("n", "int64")
    loop = RowLoop(n, lanes.groups, target, registers=core.registers, **loop_knobs)
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("quantize")
        T.func_attr({OP_ATTR: "quantize", "tirx.noalias": True})
        x = T.arg("x", T.buffer((n, head_dim), shape.dtype))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        codes = T.arg("codes", T.buffer((n, head_dim), shape.code_dtype))
        gain = T.arg("gain", T.buffer((n, shape.gain_columns), "float16"))
        with loop.launch() as (block, thread):
            core.place(thread)
            raw = [lanes.raw() for _ in range(loop.rows)]
            loop.start(
                block,
                thread,
                core.group,
                lambda k, row: lanes.load(raw[k], x, [row], core.lane, loop.read),
                lambda: core.load(rotation, thread, loop.warps),
            )

            def work() -> None:
                vectors = [lanes.unpack(words) for words in raw]
                encoded = loop.encode(core, vectors)
                words = [core.code_words(vector) for vector in encoded]

                def store(k: int, row: tir.PrimExpr) -> None:
                    lanes.store_codes(words[k], codes, row, core.lane, loop.write)
                    core.store_gains(encoded[k], gain, row)

                loop.each_row(store)

            loop.run(work)
    return builder.get()
