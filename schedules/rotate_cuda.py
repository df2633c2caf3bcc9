"""Rotate vectors on CUDA, for rotations made of small blocks."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.site_shape import OP_ATTR

from .cuda_ops import block_sync
from .format_core_cuda import COMPARED_DTYPES, compared_rotation
from .held_rotation_cuda import STAGED_KNOBS, HeldRotation, default_budget, load_rotations
from .knobs import chosen_knobs
from .vector_lanes_cuda import ITEM_BYTES, VectorLanes
from .vector_rows_cuda import ROW_KNOBS, RowLoop

KNOBS: dict[str, tuple[int, ...]] = {"elements": (4, 8, 16), **STAGED_KNOBS, **ROW_KNOBS}
"""Elements per lane and vector; the rotation's weights; and the loop over rows."""


def rotate_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
    """The rule."""
    shape = RotationShape.of(func)
    if shape is None or shape.dtype not in COMPARED_DTYPES or not compared_rotation(shape.structure, shape.head_dim):
        return None
    return build(shape, target, **chosen_knobs(func))


def build(
    shape: RotationShape,
    target: Target,
    *,
    elements: int = 8,
    weights: int | None = None,
    staged: int = 1,
    **loop_knobs: int,
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.rotate``; None if there is none. For knobs see ``KNOBS``."""
    if shape.dtype not in ITEM_BYTES:
        return None
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements)
    if not HeldRotation.possible(lanes, shape.structure):
        return None
    head_dim, budget = shape.head_dim, default_budget(shape.structure) if weights is None else weights
    held = HeldRotation(lanes, shape.structure, budget=budget, staged=bool(staged))
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    loop_knobs.setdefault("registers", held.register_weights())
    loop = RowLoop(sizes[0] * sizes[1] * sizes[2], lanes.groups, target, **loop_knobs)
    zero = tir.const(0, "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("rotate")
        T.func_attr({OP_ATTR: "rotate", "tirx.noalias": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), shape.dtype))
        coefficients = T.arg("coefficients", T.buffer((shape.coefficients,), "float32"))
        y = T.arg("y", T.buffer((*sizes, head_dim), shape.dtype))
        with loop.launch() as (block, thread):
            lane, group = lanes.place(thread)
            raw = [lanes.raw() for _ in range(loop.rows)]

            def load(k: int, row: tir.PrimExpr) -> None:
                lanes.load(raw[k], x, [zero, zero, row], lane, loop.read)

            def prepare() -> None:
                held.place(lane)
                if load_rotations([(held, coefficients)], thread, loop.warps):
                    block_sync()

            loop.start(block, thread, group, load, prepare)

            def work() -> None:
                vectors = [lanes.unpack(words) for words in raw]
                loop.read_next()
                rotated = held.apply(vectors)
                loop.each_row(lambda k, row: lanes.store(list(rotated[k]), y, [zero, zero, row], lane, loop.write))

            loop.run(work)
    return builder.get()
