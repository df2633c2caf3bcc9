"""Append to the 16-bit segments on CUDA: the kernel for ``ops.append_plain``, a warp per row of keys and values.

Where a chunk has more tokens than there are slots, warps go over the slots instead and find each one's token. A
definition that rotates its rows has a kernel of its own (``append_turned_cuda``).
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.append_plain import row_rotations
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .append_turned_cuda import append_turned_kernel
from .cuda_ops import WARP, Registers, float_of, half2, i32, load_words, pack_half2, scalar, store_words
from .cuda_target import compute_capability
from .knobs import chosen_knobs
from .plain_slots_cuda import row_and_slot
from .tile_rows_cuda import brain2, clip

Expr = Any
KNOBS: dict[str, tuple[int, ...]] = {"warps": (1, 2, 4, 8)}
"""Warps per block."""


def append_plain_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The rule: the kernel for a definition that carries its ``SiteShape``."""
    shape = SiteShape.of(func)
    if shape is None:
        return None
    words, rotations = int(func.params[-1].ty.shape[3]), row_rotations(func)
    if rotations is not None:
        return append_turned_kernel(shape, rotations, target, words, **chosen_knobs(func))
    return append_plain_kernel(shape, target, words, **chosen_knobs(func))


def append_plain_kernel(
    shape: SiteShape, target: tvm.target.Target, words: int, *, warps: int = 4
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel; parameters and results are those of ``ops.append_plain``. For knobs see ``KNOBS``.

    ``words``: those of a tile of the cache, whatever its formats (``shape`` speaks of 16-bit rows alone).
    """
    if compute_capability(target) < 80 or shape.dtype not in ("float16", "bfloat16", "float32"):
        return None
    policy = shape.cache_policy
    kv_heads, head_dim = shape.kv_heads, shape.head_dim
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("append_plain")
        T.func_attr({OP_ATTR: "append_plain", "tirx.noalias": True, "tirx.is_scheduled": True})
        plain = T.arg("plain", T.buffer((batch, kv_heads, 2, policy.slots, head_dim), "float16"))
        new = [T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), shape.dtype)) for name in ("k", "v")]
        counts = [T.arg(name, T.buffer((batch,), "int32")) for name in ("packed", "lengths", "new_lengths")]
        T.arg("cache", T.buffer((batch, kv_heads, tiles, words), "uint32"))
        items = tir.min(seq, tir.const(policy.slots, "int64"))
        units = batch * kv_heads * items
        with T.launch_thread("blockIdx.x", (units + (warps - 1)) // warps) as block:
            with T.launch_thread("threadIdx.x", warps * WARP) as thread:
                lane, unit = scalar(i32(thread) % WARP), scalar(i32(block) * warps + i32(thread) // WARP)
                with T.If(unit < i32(units)), T.Then():
                    each = scalar(i32(items))
                    b, head = scalar(unit // (each * kv_heads)), scalar(unit // each % kv_heads)
                    where = (b.astype("int64"), head.astype("int64"))
                    packed, length, count = (scalar(array[b]) for array in counts)
                    row, slot, kept = row_and_slot(policy, scalar(unit % each), (packed, length, count), seq)
                    with T.If(kept), T.Then():
                        _copy(plain, new, where, row, slot, lane)
    return shape.attach(builder.get())


def _copy(plain: Any, new: list[Any], where: tuple[Expr, Expr], row: Expr, slot: Expr, lane: Expr) -> None:
    """Copy a token's key and value, 16 bytes of what is stored to a lane."""
    head_dim = plain.shape[4]
    units = int(head_dim) // 8
    for step in range(-(-2 * units // WARP)):
        number = lane + step * WARP
        for role in range(2):
            # A lane's piece is of the key or of the value; arrays cannot be selected, so each has its branch.
            mine = number < units if role == 0 else tir.all(number >= units, number < 2 * units)
            with T.If(mine), T.Then():
                dim = (number - role * units) * 8
                values = _load(new[role], [*where, row.astype("int64"), dim])
                words = [pack_half2(clip(values[k]), clip(values[k + 1])) for k in range(0, 8, 2)]
                store_words(plain, [*where, role, slot.astype("int64"), dim], words)


def _load(array: Any, index: list[Expr]) -> list[Expr]:
    """Eight elements as float32."""
    dtype = str(array.dtype)
    words = Registers(8 if dtype == "float32" else 4)
    for first in range(0, words.count, 4):
        load_words(words, first, array, [*index[:-1], index[-1] + first], 4, "global.nc")
    if dtype == "float32":
        return [float_of(word) for word in words]
    unpack = half2 if dtype == "float16" else brain2
    return [value for word in words for value in unpack(word)]
