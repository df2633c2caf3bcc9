"""Elementwise, broadcasting, transposing and gathering functions on CPUs: parallel rows of vectors."""

from __future__ import annotations

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import SBlockInfo
from tvm.target import Target

from .inline_producers import inline_producers
from .vector_target import VectorTarget


class Elementwise:
    """Rule for functions whose blocks are all spatial, once producers are inlined."""

    def apply(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
        """Schedule ``func``, or decline with None."""
        if has_empty_extent(func):
            return None
        sch = s_tir.Schedule(func)
        blocks = inline_producers(sch)
        if not blocks or not all(block.is_injective() for block in blocks):
            return None
        for block in blocks:
            self._schedule(sch, block, VectorTarget.of(target).lanes)
        return sch

    def _schedule(self, sch: s_tir.Schedule, block: SBlockInfo, lanes: int) -> None:
        loops = sch.get_loops(block.block_rv)
        if not loops:
            return
        while len(loops) > 1 and _is_static(sch, loops[-2:]) and int(sch.get(loops[-1]).extent) < lanes:
            loops[-2:] = [sch.fuse(*loops[-2:])]
        outer = loops[:-1]
        chunks = vectorize(sch, loops[-1], lanes)
        sch.parallel(sch.fuse(*outer) if outer else chunks)


def has_empty_extent(func: tirx.PrimFunc) -> bool:
    """Tell whether any loop or tensor has a constant extent of 0, by which TVM's analysis would divide."""
    extents = [n for param in func.params for n in getattr(param.ty, "shape", ())]  # a scalar has none

    def loop(node: tirx.For) -> None:
        extents.append(node.extent)

    def block(node: s_tir.SBlock) -> None:
        extents.extend(n for buffer in node.alloc_buffers for n in buffer.shape)

    tvm_ffi.structural_walk(func.body, [(tirx.For, loop), (s_tir.SBlock, block)])
    return any(isinstance(n, tirx.IntImm) and int(n) == 0 for n in extents)


def vectorize(sch: s_tir.Schedule, loop: s_tir.schedule.LoopRV, lanes: int) -> s_tir.schedule.LoopRV:
    """Split off and vectorize up to ``lanes`` iterations of an innermost loop, and return the outer part.

    A symbolic or odd extent stays as it is: LLVM vectorizes it, with a remainder loop.
    """
    extent = sch.get(loop).extent
    if not isinstance(extent, tirx.IntImm):
        return loop
    factor = vector_factor(int(extent), lanes)
    if factor < 4:
        return loop
    chunks, vector = sch.split(loop, [None, factor])
    sch.vectorize(vector)
    return chunks


def vector_factor(extent: int, lanes: int) -> int:
    """Return the largest power of two, at most ``lanes``, that divides the extent."""
    return min(extent & -extent, lanes)


def _is_static(sch: s_tir.Schedule, loops: list[s_tir.schedule.LoopRV]) -> bool:
    return all(isinstance(sch.get(loop).extent, tirx.IntImm) for loop in loops)
