"""Merge the spatial blocks of a PrimFunc into their readers, where that computes nothing twice."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import SBlockInfo, normalize_prim_func

_CHEAP = ("tirx.if_then_else", "tirx.abs", "tirx.fabs", "tirx.isnan", "tirx.likely")


def inline_producers(sch: s_tir.Schedule) -> list[SBlockInfo] | None:
    """Inline what can be inlined; return the remaining blocks in order, None for a function without blocks.

    A block with a division, an exp or another such operation stays if several blocks read it, or if its
    reader repeats each of its elements (one 1 / norm per row, say).
    """
    infos = normalize_prim_func(sch)
    if infos is None:
        return None
    remaining = []
    for position, info in enumerate(infos):
        worth = info.is_injective() and _worth_inlining(sch, info, infos[position + 1 :])
        if not (worth and _inline(sch, info)):
            remaining.append(info)
    return remaining


def _worth_inlining(sch: s_tir.Schedule, info: SBlockInfo, later: list[SBlockInfo]) -> bool:
    if not _is_expensive(sch.get(info.block_rv)):
        return True
    readers = {sch.get(block).name_hint for block in sch.get_consumers(info.block_rv)}
    found = [other for other in later if other.name in readers]
    return len(found) == 1 and _extents(found[0]) == _extents(info)


def _extents(info: SBlockInfo) -> list[str]:
    return sorted(str(extent) for extent in info.dom() if not (isinstance(extent, int) and extent == 1))


def _is_expensive(block: tirx.SBlock) -> bool:
    found = []

    def call(node: tvm.ir.Call) -> None:
        if not (isinstance(node.op, tvm.ir.Op) and node.op.name in _CHEAP):
            found.append(node)

    def divide(node: tirx.Div) -> None:
        found.append(node)

    tvm_ffi.structural_walk(block.body, [(tvm.ir.Call, call), (tirx.Div, divide)])
    return bool(found)


def _inline(sch: s_tir.Schedule, info: SBlockInfo) -> bool:
    try:
        sch.compute_inline(info.block_rv)
    except s_tir.ScheduleError:  # it writes an output, or reads what it writes
        return False
    return True
