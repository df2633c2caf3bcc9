"""Append one token per sequence to the 16-bit segments on CUDA, and rotate it: the kernel for ``ops.append_plain``.

A warp per key or value holds the vector as ``vector_lanes_cuda`` does. The rotation's coefficients are constants: they
are in shared memory before the kernel waits for the one that makes the vectors.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.append_plain import RowRotations
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape
from rotquant_tvm.ops.vector_code import rotation_size

from .cuda_ops import WARP, Registers, block_sync, i32, load_words, pack_half2, scalar, store_words
from .cuda_target import compute_capability
from .dependent_launch_cuda import let_next_start, starts_early, wait_for_inputs
from .format_core_cuda import compared_rotation
from .held_rotation_cuda import HeldRotation, Structure
from .plain_slots_cuda import is_kept, token_slot
from .rotation_taps_cuda import LayerTaps
from .tile_rows_cuda import clip
from .vector_lanes_cuda import ITEM_BYTES, VectorLanes

Expr = Any
SHARED_FLOATS = 12 * 1024
"""What a kernel may declare of shared memory, in floats: 48 KB."""


def append_turned_kernel(
    shape: SiteShape,
    rotations: RowRotations,
    target: tvm.target.Target,
    words: int,
    *,
    warps: int = 1,
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel; parameters and results are those of ``ops.append_plain`` with ``rotations``.

    ``words``: those of a tile of the cache. ``warps``: per block. None for rotations that warps cannot hold.
    """
    if compute_capability(target) < 80 or shape.dtype not in ITEM_BYTES:
        return None
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements=4)
    if not all(HeldRotation.possible(lanes, r) and compared_rotation(r, shape.head_dim) for r in rotations):
        return None
    turns = [_StagedRotation(lanes, structure) for structure in rotations]
    if sum(layer.staged_floats for turn in turns for layer in turn.layers) > SHARED_FLOATS:
        return None
    rows = _Rows(shape, lanes, turns, warps, starts_early(target))
    policy, kv_heads, head_dim = shape.cache_policy, shape.kv_heads, shape.head_dim
    batch, tiles = (tir.Var(name, "int64") for name in ("batch", "tiles"))
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("append_plain")
        T.func_attr({OP_ATTR: "append_plain", "tirx.noalias": True, "tirx.is_scheduled": True})
        plain = T.arg("plain", T.buffer((batch, kv_heads, 2, policy.slots, head_dim), "float16"))
        new = [T.arg(name, T.buffer((batch, kv_heads, 1, head_dim), shape.dtype)) for name in ("k", "v")]
        sizes = [(name, rotation_size(r, head_dim)) for name, r in zip("kv", rotations, strict=True)]
        data = [T.arg(f"rotation_{name}", T.buffer((size,), "float32")) for name, size in sizes]
        counts = [T.arg(name, T.buffer((batch,), "int32")) for name in ("packed", "lengths", "new_lengths")]
        T.arg("cache", T.buffer((batch, kv_heads, tiles, words), "uint32"))
        rows.launch(plain, new, data, counts)
    return shape.attach(builder.get())


class _StagedRotation:
    """A rotation for one vector of a warp, whose coefficients come by way of shared memory."""

    def __init__(self, lanes: VectorLanes, structure: Structure) -> None:
        self.lanes, self.layers = lanes, [LayerTaps(lanes, *layer) for layer in structure]

    def stage(self, coefficients: Any, thread: Expr, threads: int) -> None:
        """Copy the coefficients, with all threads of the block, which it waits for."""
        self._staged, offset = [], 0
        for layer in self.layers:
            self._staged.append(T.alloc_buffer((layer.staged_floats,), "float32", scope="shared"))
            layer.stage(self._staged[-1], coefficients, offset, thread, threads)
            offset += layer.block * self.lanes.head_dim
        block_sync()

    def load(self, lane: Expr) -> None:
        """Take the weights of a lane into registers."""
        self._weights = [Registers(layer.weights, "float32") for layer in self.layers]
        for layer, weights, staged in zip(self.layers, self._weights, self._staged, strict=True):
            layer.load_weights(weights, staged, None, lane)

    def apply(self, x: Registers, lane: Expr) -> Registers:
        """R x."""
        for layer, weights in zip(self.layers, self._weights, strict=True):

            def row(register: int, layer: LayerTaps = layer, weights: Registers = weights) -> list[Expr]:
                return [weights[layer.slot(register, tap)] for tap in layer.taps]

            (x,) = layer.apply([x], row, lane)
        return x


class _Rows:
    """The launch: every other block is for keys, so that the threads of a block hold the same weights."""

    def __init__(
        self, shape: SiteShape, lanes: VectorLanes, turns: list[_StagedRotation], warps: int, starts_early: bool
    ) -> None:
        self.policy, self.lanes, self.turns = shape.cache_policy, lanes, turns
        self.warps, self.starts_early = warps, starts_early

    def launch(self, plain: Any, new: list[Any], data: list[Any], counts: list[Any]) -> None:
        """Emit it; the arrays are the kernel's parameters."""
        batch, kv_heads = plain.shape[:2]
        vectors = batch * kv_heads
        with T.launch_thread("blockIdx.x", (vectors + (self.warps - 1)) // self.warps * 2) as block:
            with T.launch_thread("threadIdx.x", self.warps * WARP) as thread:
                let_next_start(self.starts_early)
                block, thread = scalar(i32(block)), scalar(i32(thread))
                number = scalar(block // 2 * self.warps + thread // WARP)
                vector = scalar(tir.min(number, i32(vectors) - 1))
                b, head = scalar(vector // i32(kv_heads)), scalar(vector % i32(kv_heads))
                where = [b.astype("int64"), head.astype("int64")]
                self.lane, self.group = self.lanes.place(thread)
                with T.If(block % 2 == 0):
                    for role, frame in enumerate((T.Then, T.Else)):
                        with frame():
                            self.turns[role].stage(data[role], thread, self.warps * WARP)
                            wait_for_inputs(self.starts_early)
                            place, kept = self._place(counts, b)
                            row = self._rotated(role, new[role], [*where, 0])
                            with T.If(tir.all(kept, number < i32(vectors))), T.Then():
                                slot = token_slot(self.policy, place).astype("int64")
                                self._store(row, plain, [*where, role, slot])

    def _place(self, counts: list[Any], b: Expr) -> tuple[Expr, Expr]:
        """(position of sequence ``b``'s new token, whether there is one and it is kept in 16 bits)."""
        found = Registers(3, "int32")
        for index, array in enumerate(counts):
            # Volatile: else the compiler asks for them when they are needed, at the end.
            load_words(found, index, array, [b], 1, "volatile.global")
        packed, length, count = found
        place = scalar(length - count)
        return place, tir.all(count > 0, is_kept(self.policy, place, packed))

    def _rotated(self, role: int, x: Any, index: list[Expr]) -> Registers:
        raw = self.lanes.raw()
        self.lanes.load(raw, x, index, self.lane, "global")
        self.turns[role].load(self.lane)  # while the vector comes
        return self.turns[role].apply(self.lanes.unpack(raw), self.lane)

    def _store(self, row: Registers, plain: Any, index: list[Expr]) -> None:
        """Store a row from the first of the lanes that hold it."""
        lanes = self.lanes
        with T.If(self.group == 0), T.Then():
            for chunk in range(lanes.chunks):
                first = chunk * lanes.access
                values = [clip(row[first + k]) for k in range(lanes.access)]
                words = [pack_half2(*values[k : k + 2]) for k in range(0, lanes.access, 2)]
                at = [*index, lanes.dim(self.lane, first)]
                lanes.when_active(self.lane, chunk, lambda at=at, words=words: store_words(plain, at, words))
