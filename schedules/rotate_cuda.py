"""Rotate vectors on CUDA, for rotations made of small blocks."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.site_shape import OP_ATTR

from .cuda_ops import WARP, block_sync, scalar
from .held_rotation_cuda import HeldRotation
from .knobs import chosen_knobs
from .vector_lanes_cuda import VectorLanes
from .vector_rows_cuda import RowLoop

KNOBS: dict[str, tuple[int, ...]] = {
    "elements": (4, 8, 16),
    "rows": (1, 2, 4),
    "warps": (1, 2, 4),
    "blocks": (264, 528, 1056, 2112),
}
"""Elements per lane and vector; vectors per lane and step; warps per block; blocks at most."""


def rotate_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
    """The rule."""
    shape = RotationShape.of(func)
    return None if shape is None else build(shape, target, **chosen_knobs(func))


def build(
    shape: RotationShape, _target: Target, *, elements: int = 8, rows: int = 1, warps: int = 2, blocks: int = 1056
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.rotate``; None if there is none. For knobs see ``KNOBS``."""
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements)
    if not HeldRotation.possible(lanes, shape.structure):
        return None
    held, head_dim = HeldRotation(lanes, shape.structure), shape.head_dim
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    loop = RowLoop(sizes[0] * sizes[1] * sizes[2], groups=lanes.groups, rows=rows, warps=warps, blocks=blocks)
    zero = tir.const(0, "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("rotate")
        T.func_attr({OP_ATTR: "rotate", "tirx.noalias": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), shape.dtype))
        coefficients = T.arg("coefficients", T.buffer((shape.coefficients,), "float32"))
        y = T.arg("y", T.buffer((*sizes, head_dim), shape.dtype))
        with T.launch_thread("blockIdx.x", loop.grid) as block, T.launch_thread("threadIdx.x", WARP * warps) as thread:
            lane, group = scalar(thread % lanes.lanes), scalar(thread % WARP // lanes.lanes)
            raw = [lanes.raw() for _ in range(rows)]
            loop.start(block, thread, group, lambda k, row: lanes.load(raw[k], x, [zero, zero, row], lane))
            held.load(coefficients, lane, scalar(thread // WARP), scalar(thread % WARP), warps)
            if held.uses_shared:
                block_sync()

            def work() -> None:
                vectors = [lanes.unpack(words) for words in raw]
                loop.read_next()
                rotated = held.apply(vectors)
                loop.each_row(lambda k, row: lanes.store(list(rotated[k]), y, [zero, zero, row], lane))

            loop.run(work)
    return builder.get()
