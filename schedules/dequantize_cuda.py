"""Dequantize plain vectors on CUDA: codes, a byte each, and gains to un-rotated vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codebook
from rotquant_tvm.ops.codec_shape import CodecShape
from rotquant_tvm.ops.site_shape import OP_ATTR
from rotquant_tvm.ops.vector_code import rotation_size

from .cuda_ops import WARP, Registers, block_sync, f32, load_words, scalar, u32
from .held_rotation_cuda import HeldRotation
from .knobs import chosen_knobs
from .vector_lanes_cuda import VectorLanes
from .vector_rows_cuda import RowLoop

Expr = Any
KNOBS: dict[str, tuple[int, ...]] = {
    "elements": (4, 8, 16),
    "rows": (1, 2, 4),
    "warps": (2, 4, 8),
    "blocks": (264, 528, 1056, 2112),
}
"""Elements per lane and vector; vectors per lane and step; warps per block; blocks at most."""


def dequantize_cuda(func: tvm.tirx.PrimFunc, target: Target) -> tvm.tirx.PrimFunc | None:
    """The rule: a kernel for codebooks behind rotations of small blocks."""
    shape = CodecShape.of(func)
    return None if shape is None else build(shape, target, **chosen_knobs(func))


def build(
    shape: CodecShape, _target: Target, *, elements: int = 8, rows: int = 1, warps: int = 4, blocks: int = 1056
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.dequantize``; None if there is none. For knobs see ``KNOBS``."""
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements)
    inverse = HeldRotation(lanes, shape.structure[::-1])
    if shape.codebook != "lloyd" or not HeldRotation.possible(lanes, shape.structure):
        return None
    book = Codebook(shape.bits, shape.head_dim)
    head_dim, size = shape.head_dim, rotation_size(shape.structure, shape.head_dim)
    n = tir.Var("n", "int64")
    loop = RowLoop(n, groups=lanes.groups, rows=rows, warps=warps, blocks=blocks)
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("dequantize")
        T.func_attr({OP_ATTR: "dequantize", "tirx.noalias": True})
        codes = T.arg("codes", T.buffer((n, head_dim), "uint8"))
        gain = T.arg("gain", T.buffer((n, 1), "float16"))
        rotation = T.arg("rotation", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((n, head_dim), shape.dtype))
        with T.launch_thread("blockIdx.x", loop.grid) as block, T.launch_thread("threadIdx.x", WARP * warps) as thread:
            lane, group = scalar(thread % lanes.lanes), scalar(thread % WARP // lanes.lanes)
            source = [_CodeRow(lanes, lane) for _ in range(rows)]
            loop.start(block, thread, group, lambda k, row: source[k].load(codes, gain, row))
            inverse.load(rotation, lane, scalar(thread // WARP), scalar(thread % WARP), warps)
            centroids = _fill_centroids(book, thread)

            def work() -> None:
                vectors = [row.values(centroids) for row in source]
                loop.read_next()
                decoded = inverse.apply(vectors)
                loop.each_row(lambda k, row: lanes.store(list(decoded[k]), y, [row], lane))

            loop.run(work)
    return builder.get()


def _fill_centroids(book: Codebook, thread: Expr) -> Any:
    """The centroids in shared memory: there are at most 16, so the lanes' reads never meet in a bank."""
    centroids = T.alloc_buffer((len(book.centroids),), "float32", scope="shared")
    grid = book.grid.astype(int)
    value = tir.const(int(grid[0]), "int32")
    for code, step in enumerate(np.diff(grid), 1):
        value = value + tir.Select(thread >= code, tir.const(int(step), "int32"), tir.const(0, "int32"))
    with T.If(thread < len(book.centroids)), T.Then():
        T.buffer_store(centroids, value.astype("float32") * f32(float(book.scale)), [thread])
    block_sync()
    return centroids


class _CodeRow:
    """The codes and the gain of one vector, as a lane reads them."""

    def __init__(self, lanes: VectorLanes, lane: Expr) -> None:
        self.lanes, self.lane = lanes, lane
        self.words = Registers(lanes.elements // 4)
        self.words.fill(u32(0))
        self.gain = Registers(1, "float16")

    def load(self, codes: Any, gain: Any, row: Expr) -> None:
        """Read them."""
        count = self.lanes.access // 4
        for chunk in range(self.lanes.chunks):
            at = [row, self.lanes.dim(self.lane, chunk * self.lanes.access)]
            self.lanes.when_active(
                self.lane,
                chunk,
                lambda chunk=chunk, at=at: load_words(self.words, chunk * count, codes, at, count, "global.nc"),
            )
        self.gain[0] = gain[row, 0]

    def values(self, centroids: Any) -> Registers:
        """The elements in the rotated basis; 0 in idle lanes."""
        x = Registers(self.lanes.elements, "float32")
        factor, last = scalar(self.gain[0].astype("float32")), centroids.shape[0] - 1
        for r in range(self.lanes.elements):
            code = (self.words[r // 4] >> u32(r % 4 * 8) & u32(int(last))).astype("int32")
            x[r] = self.lanes.where_active(self.lane, r, centroids[code] * factor)
        return x
