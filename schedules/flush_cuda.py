"""Flush on CUDA: the kernel for ``ops.flush``. A thread block moves one block of tokens, a warp each of its tiles.

The block's rows are copied into shared memory; its mean key is summed up there in the order of the tokens, one thread
to a dim, as the definition does.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, TileLayout
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .cuda_ops import WARP, Registers, block_sync, i32, load_words, scalar
from .cuda_target import compute_capability, dynamic_shared_memory
from .dependent_launch_cuda import let_next_start, starts_early, wait_for_inputs
from .flush_centre_cuda import BlockCentre
from .flush_rows_cuda import BlockRows
from .knobs import chosen_knobs
from .tile_codes_cuda import supported
from .tile_encoder_cuda import TileEncoder
from .tile_rotation_cuda import TileRotation
from .tile_rows_cuda import ROWS, wait_for_copies

Expr = Any
KNOBS: dict[str, tuple[int, ...]] = {"warps": (2, 4, 8)}
"""Warps per block, at most."""


def flush_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The rule: the kernel for a definition that carries its ``SiteShape``; None for rings, and formats it lacks."""
    shape = SiteShape.of(func)
    if shape is None or shape.wraps:
        return None
    ordered = len(func.params) > (9 if shape.cache_policy.center else 8)
    return flush_kernel(shape, target, after=shape.heads if ordered else 0, **chosen_knobs(func))


def flush_kernel(
    shape: SiteShape, target: tvm.target.Target, *, after: int = 0, warps: int = 4
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel; parameters and results are those of ``ops.flush``. For knobs see ``KNOBS``."""
    if compute_capability(target) < 80 or shape.dtype not in ("float16", "bfloat16", "float32"):
        return None
    if not all(supported(codec) for codec in shape.codecs()):
        return None
    kernel = _Flush(shape, warps, starts_early(target))
    if kernel.shared_bytes > dynamic_shared_memory(target):
        return None
    return shape.attach(kernel.build(after))


class _Flush:
    def __init__(self, shape: SiteShape, warps: int, starts_early: bool) -> None:
        self.shape, self.policy, self.starts_early = shape, shape.cache_policy, starts_early
        self.codecs = tuple(codec.in_rotated_basis() for codec in shape.codecs())
        self.layout = TileLayout(self.codecs[0].format, self.codecs[1].format, shape.head_dim)
        self.size = max(self.policy.block, TOKENS)
        self.tasks = 2 * self.size // TOKENS
        self.warps = min(warps, self.tasks)
        self.rows = BlockRows(shape, self.size)
        self.centre = BlockCentre(shape.head_dim, self.rows, self.warps * WARP) if self.policy.center else None

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block."""
        return 2 * self.rows.halves + (self.centre.nbytes if self.centre is not None else 0)

    def build(self, after: int) -> tvm.tirx.PrimFunc:
        """Emit the kernel."""
        shape, policy = self.shape, self.policy
        kv_heads, head_dim = shape.kv_heads, shape.head_dim
        batch, seq, tiles, blocks = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles", "blocks"))
        with IRBuilder() as builder, T.prim_func(s_tir=False):
            T.func_name("flush")
            T.func_attr({OP_ATTR: "flush", "tirx.noalias": True, "tirx.is_scheduled": True})
            cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, self.layout.tile_bytes // 4), "uint32"))
            centre = None
            if policy.center:
                centre = T.arg("centre", T.buffer((batch, kv_heads, blocks, centre_words(head_dim)), "uint32"))
            plain = T.arg("plain", T.buffer((batch, kv_heads, 2, policy.slots, head_dim), "float16"))
            new = [T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), shape.dtype)) for name in ("k", "v")]
            names = ("before", "packed", "lengths", "new_lengths")
            counts = [T.arg(name, T.buffer((batch,), "int32")) for name in names]
            if after:
                T.arg("seen", T.buffer((batch, seq, after, head_dim), shape.dtype))
            # One block of tokens to a thread block in a chunk; the few that a single token pushes out, one by one.
            side = (seq + (self.size - 1)) // self.size
            with T.launch_thread("blockIdx.x", batch * kv_heads * side) as block:
                with T.launch_thread("threadIdx.x", self.warps * WARP) as thread:
                    let_next_start(self.starts_early)
                    wait_for_inputs(self.starts_early)
                    block, thread, each = scalar(i32(block)), scalar(i32(thread)), scalar(i32(side))
                    b, head = scalar(block // (each * kv_heads)), scalar(block // each % kv_heads)
                    where = (b.astype("int64"), head.astype("int64"))
                    before, packed, length, count = self._counts(counts, b)
                    limit = scalar(tir.min(packed, i32(tiles * TOKENS)))
                    first = scalar(before // self.size + block % each)
                    wanted = (limit + (self.size - 1)) // self.size - first
                    self.rows.prepare(plain, new, where, length - count, thread)
                    if self.centre is not None:
                        self.centre.allocate()
                    with T.serial(0, scalar((wanted + (each - 1)) // each)) as step:
                        number = scalar(first + step * each)
                        low = scalar(tir.max(before, number * self.size))
                        high = scalar(tir.min(limit, (number + 1) * self.size))
                        with T.If(high > low), T.Then():
                            self._move(cache, centre, (where, number), (low, high), thread)
        return builder.get()

    def _counts(self, arrays: list[Any], b: Expr) -> Registers:
        """A sequence's counts. Whatever else is read waits for them, since they say where it is."""
        found = Registers(len(arrays), "int32")
        for index, array in enumerate(arrays):
            load_words(found, index, array, [b], 1, "global")
        return found

    def _move(
        self, cache: Any, centre: Any, place: tuple[Any, Expr], tokens: tuple[Expr, Expr], thread: Expr
    ) -> None:
        """Move tokens ``tokens[0]`` … ``tokens[1] - 1`` of block number ``place[1]``."""
        where, number = place
        low, high = tokens
        base = scalar(number * self.size)
        warp, lane = scalar(thread // WARP), scalar(thread % WARP)
        block_sync()  # the rows of the block before have been read
        for task in range(0, self.tasks, self.warps):
            self.rows.copy(scalar(warp + task), base, (low, high))
        wait_for_copies(0)
        mean = None
        if self.centre is not None:
            block_sync()
            begun = scalar((low > base).astype("int32"))
            self.centre.take(centre, (*where, number.astype("int64")), begun, (low - base, high - low), thread)
            mean = self.centre
        for role in range(2):
            self._encode(role, cache, where, base, (low, high), (warp, lane), mean)

    def _encode(
        self,
        role: int,
        cache: Any,
        where: tuple[Expr, Expr],
        base: Expr,
        tokens: tuple[Expr, Expr],
        thread: tuple[Expr, Expr],
        mean: BlockCentre | None,
    ) -> None:
        """The warps' tiles of one role."""
        warp, lane = thread
        rotation = TileRotation(self.codecs[role], self.rows.dtype, "kv"[role])
        encoder = TileEncoder(cache, self.layout, self.codecs[role], rotation, lane)
        adjust = None
        if role == 0 and mean is not None:

            def adjust(values: Registers) -> None:
                mean.subtract(values, lane)

        rounds = -(-self.tasks // self.warps)
        with T.serial(0, rounds) as step:
            task = scalar(step * self.warps + warp)
            with T.If(tir.all(task % 2 == role, task < self.tasks)), T.Then():
                start = scalar(base + task // 2 * TOKENS)
                first = scalar(tir.max(tokens[0] - start, i32(0)))
                last = scalar(tir.min(tokens[1] - start, i32(TOKENS)))
                at = (*where, (start // TOKENS).astype("int64"))

                def fetch(half: Expr) -> Any:
                    return self.rows.half(role, scalar(task // 2 * (TOKENS // ROWS) + i32(half)), lane)

                with T.If(last > first), T.Then():
                    encoder.encode(at, (first, last), fetch, lambda _half: None, adjust)
