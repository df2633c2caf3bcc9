"""Reductions along rows on CPUs (norms, softmax, sums): rows in parallel, one vector of partial results."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import SBlockInfo
from tvm.target import Target

from .elementwise_llvm import has_empty_extent, vector_factor, vectorize
from .inline_producers import inline_producers
from .vector_target import VectorTarget


class RowReduction:
    """Rule for functions with reductions whose blocks all iterate over the same leading dimensions."""

    def apply(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
        """Schedule ``func``, or decline with None."""
        if has_empty_extent(func):
            return None
        sch = s_tir.Schedule(func)
        blocks = inline_producers(sch)
        if not blocks or all(block.is_injective() for block in blocks):
            return None
        rows = _shared_rows(blocks)
        if not rows:
            return None
        lanes = VectorTarget.of(target).lanes
        reductions = [block for block in blocks if not block.is_injective()]
        partial = {block.name: _partial_results(sch, block, lanes) for block in reductions}
        last = blocks[-1]
        row = sch.fuse(*sch.get_loops(last.block_rv)[:rows])
        sch.parallel(row)
        for block in reversed(blocks):
            if block is not last:
                sch.compute_at(block.block_rv, row)
            if partial.get(block.name) is not None:
                sch.compute_at(partial[block.name], row)
                _vectorize_partial(sch, partial[block.name])
        for block in blocks:
            if block.is_injective() and len(sch.get_loops(block.block_rv)) > 1:
                vectorize(sch, sch.get_loops(block.block_rv)[-1], lanes)
        return sch


def _shared_rows(blocks: list[SBlockInfo]) -> int:
    """Count the leading spatial dimensions that have the same extents in all blocks."""
    count = 0
    for iters in zip(*(block.iters for block in blocks), strict=False):
        if any(it.kind != "S" for it in iters) or len({str(it.dom) for it in iters}) > 1:
            break
        count += 1
    return count


def _partial_results(sch: s_tir.Schedule, block: SBlockInfo, lanes: int) -> s_tir.schedule.SBlockRV | None:
    """Reduce to a vector of partial results in a block of its own, and then across its lanes."""
    reductions = [it for it in block.iters if it.kind == "R"]
    if len(reductions) != 1 or not isinstance(reductions[0].dom, int):
        return None
    factor = vector_factor(reductions[0].dom, lanes)
    if factor < 4 or reductions[0].dom == factor:
        return None
    _, lane = sch.split(reductions[0].loop_rv, [None, factor])
    dimensions = len(sch.get(block.block_rv).writes[0].region)
    return sch.rfactor(lane, factor_axis=dimensions)


def _vectorize_partial(sch: s_tir.Schedule, partial: s_tir.schedule.SBlockRV) -> None:
    """Make the lanes the innermost loop inside the row, and clear them before the first step."""
    lane, *others = sch.get_loops(partial)[1:]
    sch.reorder(*others, lane)
    sch.vectorize(lane)
    sch.decompose_reduction(partial, others[-1])
