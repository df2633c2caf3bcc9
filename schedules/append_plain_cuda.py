"""Append to the 16-bit segments on CUDA: the kernel for ``ops.append_plain``, a warp per row of keys and values.

Where a chunk has more tokens than there are slots, warps go over the slots instead and find each one's token.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .cuda_ops import WARP, Registers, float_of, half2, i32, load_words, pack_half2, scalar, store_words
from .cuda_target import compute_capability
from .knobs import chosen_knobs
from .tile_rows_cuda import brain2, clip

Expr = Any
KNOBS: dict[str, tuple[int, ...]] = {"warps": (1, 2, 4, 8)}
"""Warps per block."""


def append_plain_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The rule: the kernel for a definition that carries its ``SiteShape``."""
    shape = SiteShape.of(func)
    if shape is None:
        return None
    words = int(func.params[6].ty.shape[3])
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
                    row, slot, kept = _row_and_slot(policy, scalar(unit % each), (packed, length, count), seq)
                    with T.If(kept), T.Then():
                        _copy(plain, new, where, row, slot, lane)
    return shape.attach(builder.get())


def _row_and_slot(policy: CachePolicy, item: Expr, counts: tuple[Expr, Expr, Expr], seq: Expr) -> tuple[Expr, ...]:
    """(new token, slot, whether it is stored there) of item number ``item``: a token, or a slot if these are fewer."""
    packed, length, count = counts
    sinks, ring = policy.sinks, policy.ring
    start = scalar(length - count)
    row, slot = Registers(1, "int32"), Registers(1, "int32")
    with T.If(seq <= policy.slots):
        with T.Then():
            place = scalar(start + item)
            row[0] = item
            behind = tir.max(place - sinks, i32(0)) % ring + sinks if ring else place
            slot[0] = tir.Select(place < sinks, place, behind)
        with T.Else():
            slot[0] = item
            row[0] = item - start
            if ring:
                last = scalar(length - 1 - sinks)
                # The newest token behind the sinks whose number is the slot's, modulo the ring's size.
                turned = (last + i32(ring)) % ring - (item - sinks)
                number = last - tir.Select(turned < 0, turned + ring, turned)
                number = scalar(number)
                behind = tir.Select(number >= 0, number + sinks - start, i32(-1))
                row[0] = tir.Select(item < sinks, item - start, behind)
    place = start + row[0]
    kept = place < sinks
    if ring:
        kept = tir.any(kept, tir.all(place >= sinks, place - sinks >= packed))
    exists = tir.all(row[0] >= 0, row[0] < count)
    return row[0], slot[0], tir.all(kept, exists)


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
