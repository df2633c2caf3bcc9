"""Linear layers on CUDA: y = x Wᵀ (+ bias) (+ residual), or silu(x Gᵀ) · (x Uᵀ), with the weights as they are stored.

Layers that read the same x are one launch: their weights lie one after the other. One function holds a kernel for few
rows of x, which streams the weights past them, and one for many; the number of rows decides at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from .cuda_target import dynamic_shared_memory
from .dependent_launch_cuda import starts_early
from .linear_few_rows_cuda import FewRows, emit_few_rows
from .linear_many_rows_cuda import SLICE, ManyRows, ManyRowsTile
from .linear_operands_cuda import CUDALinear, Operands
from .linear_warpgroups_cuda import WarpgroupTile, has_warpgroups, warpgroup_knobs

__all__ = ["FEW", "MANY", "SLICE", "WARPGROUPS", "CUDALinear", "cuda_linear", "many_rows"]

FEW = (
    FewRows(8, tiles=1, warps=16, steps=2, stages=3),
    FewRows(16, tiles=2, warps=16, steps=1, stages=3, ahead=True),
    FewRows(16, tiles=1, warps=8, steps=2, stages=4),
)
"""For few rows, in the order of how many they take; of as many, the first that fits."""
MANY = (
    ManyRows(128, 256, 64, 64, stages=4),
    ManyRows(128, 128, 64, 64, stages=4),
    ManyRows(64, 128, 32, 64, stages=4),
)
"""For many rows, the largest tile first; the last one fits any GPU."""
WARPGROUPS = (warpgroup_knobs(128, 256, stages=4), warpgroup_knobs(128, 128, stages=4))
"""The largest of them on Hopper's tensor cores (``has_warpgroups``)."""
FILLED = 128
"""Blocks from which on a GPU counts as filled: a larger tile is not worth fewer."""

Case = tuple[Any, Callable[[], None]]


def many_rows(warpgroups: bool) -> tuple[ManyRows, ...]:
    """The kernels for many rows of a target with or without ``has_warpgroups``."""
    return (*WARPGROUPS, *MANY[len(WARPGROUPS) :]) if warpgroups else MANY


@functools.cache
def cuda_linear(
    spec: CUDALinear, target: Target, few: tuple[FewRows, ...] = FEW, many: tuple[ManyRows, ...] | None = None
) -> tir.PrimFunc:
    """PrimFunc (x, weight, bias of each layer that has one, residual if any, y of each layer or of the product).

    ``weight``: float16 [sum of out_features, in_features]; ``in_features`` must be a multiple of 64. ``few`` and
    ``many`` (default: ``many_rows``) are the kernels to choose from; those that need more shared memory than the target
    has are left out.
    """
    limit, many = dynamic_shared_memory(target), many or many_rows(has_warpgroups(target))
    with IRBuilder() as builder, T.prim_func(s_tir=False, is_private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        operands = Operands(spec, starts_early(target))
        fitting_few = {}
        for knobs in few:
            if knobs.shared_bytes(spec.in_features) <= limit:
                fitting_few.setdefault(knobs.columns, knobs)
        cases: list[Case] = [
            (operands.rows <= knobs.columns, functools.partial(emit_few_rows, operands, knobs))
            for knobs in fitting_few.values()
        ]
        fitting = [knobs for knobs in many if knobs.shared_bytes <= limit] or list(many[-1:])
        for knobs in fitting:
            row_tiles = (operands.rows + (knobs.rows - 1)) // knobs.rows
            filled = row_tiles * -(-sum(spec.out_features) // knobs.features) >= FILLED
            tile = WarpgroupTile if knobs.warpgroups else ManyRowsTile
            cases.append((filled, functools.partial(tile.launch, operands, knobs)))
        _choose(cases)
    return builder.get()


def _choose(cases: list[Case]) -> None:
    """Emit the first case whose condition holds; the last one needs none."""
    (condition, emit), *rest = cases
    if not rest:
        emit()
        return
    with T.If(condition):
        with T.Then():
            emit()
        with T.Else():
            _choose(rest)
