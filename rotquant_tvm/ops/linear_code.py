"""Linear codes in blocks of 32, emitted into a TensorIR definition (mathematics: ``rotquant_tvm.formats.linear``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..formats import LINEAR_BLOCK, NIBBLE_ZERO
from .axes import Axes
from .registers import f32, registers
from .tile_access import u32

Expr = Any
Store = Callable[[Expr, Expr], None]


def emit_bytes(axes: Axes, head_dim: int, x: Any, store_code: Store, store_gain: Store, scales: Any) -> None:
    """q8_0: quantize the vector in ``x``; ``scales`` is scratch for its blocks' scales."""
    with axes.lanes(-(-head_dim // 32)) as row:
        largest = registers(1)
        with T.serial(0, 32) as j:
            value = tir.if_then_else(row * 32 + j < head_dim, tir.abs(x[tir.min(row * 32 + j, head_dim - 1)]), f32(0))
            T.buffer_store(largest, tir.max(largest[0], value), [0])
        scale = (largest[0] / f32(127)).astype("float16")
        T.buffer_store(scales, scale.astype("float32"), [row])
        store_gain(row, scale)
    with axes.lanes(head_dim) as dim:
        scale = scales[dim // 32]
        ratio = tir.nearbyint(x[dim] / tir.Select(scale > f32(0), scale, f32(1)))
        code = tir.max(tir.min(ratio, f32(127)), f32(-127))
        code = tir.Select(scale > f32(0), code, f32(0))
        store_code(dim, code.astype("int32").astype("uint32") & u32(0xFF))


def emit_nibbles(axes: Axes, head_dim: int, x: Any, store_code: Store, store_gain: Store, scales: Any) -> None:
    """q4_0: as ``emit_bytes``."""
    with axes.lanes(-(-head_dim // LINEAR_BLOCK)) as row:
        largest = registers(1)
        with T.serial(0, LINEAR_BLOCK) as j:
            dim = row * LINEAR_BLOCK + j
            value = tir.if_then_else(dim < head_dim, x[tir.min(dim, head_dim - 1)], f32(0))
            T.buffer_store(largest, tir.Select(tir.abs(value) > tir.abs(largest[0]), value, largest[0]), [0])
        scale = (largest[0] / f32(-NIBBLE_ZERO)).astype("float16")
        T.buffer_store(scales, scale.astype("float32"), [row])
        store_gain(row, scale)
    with axes.lanes(head_dim) as dim:
        scale = scales[dim // LINEAR_BLOCK]
        some = tir.abs(scale) > f32(0)
        ratio = tir.Select(some, x[dim], f32(0)) / tir.Select(some, scale, f32(1))
        code = tir.max(tir.min(tir.floor(ratio + f32(NIBBLE_ZERO + 0.5)), f32(15)), f32(0))
        store_code(dim, code.astype("int32").astype("uint32"))
