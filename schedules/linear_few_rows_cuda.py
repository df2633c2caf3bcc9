"""Linear layers of few rows on CUDA (decode): the weights stream past x once, at the speed of memory.

A thread block owns some output features and its warps share the input features out, in chunks. Weights are the left
operand of the tensor cores' product m16n8k16: 16 features by 16 inputs. Since a sum may be taken in any order, lane
(g, t) = (lane / 4, lane % 4) takes inputs 8t … 8t + 7 of every 32 for rows g and g + 8, which is one access of 16
bytes each, and the same inputs of column g of x: both are operands as they come. Copies to shared memory run ahead of
the products; a lane copies what it reads itself, so that nothing is waited for but its own copies. In the end the
warps' sums meet in shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, block_sync, f32, i32, load_words, mma_half, ptx, scalar, shared_array
from .dependent_launch_cuda import let_next_start, wait_for_inputs
from .linear_operands_cuda import Operands, silu

Expr = Any
STEP = 32
"""Inputs of one step: 8 for each of the four lanes that share a row."""


@dataclass(frozen=True)
class FewRows:
    """The kernel's knobs.

    ``columns``: rows of x at most, a multiple of 8; ``tiles``: of 16 output features each, that a block owns;
    ``warps`` per block; ``steps``: of 32 inputs, in a chunk; ``stages``: chunks on their way per warp;
    ``ahead``: x is loaded a chunk early, for more rows than the L1 cache holds.
    """

    columns: int = 8
    tiles: int = 1
    warps: int = 8
    steps: int = 2
    stages: int = 4
    ahead: bool = False

    def fitted(self, in_features: int) -> FewRows:
        """With as many steps in a chunk as divide ``in_features`` (a multiple of 32)."""
        steps = next(n for n in range(self.steps, 0, -1) if in_features % (n * STEP) == 0)
        return replace(self, steps=steps)

    def shared_bytes(self, in_features: int) -> int:
        """Shared memory of a block: the warps' rings, and their sums."""
        ring = self.warps * self.stages * 2 * self.tiles * self.fitted(in_features).steps * 4 * WARP
        return 4 * (ring + self.warps * self.columns * (16 * self.tiles + 4))


def emit_few_rows(operands: Operands, knobs: FewRows) -> None:
    """Emit the launch; the number of rows is at most ``knobs.columns``."""
    spec = operands.spec
    features = spec.out_features[0] if spec.gated else sum(spec.out_features)
    owned = knobs.tiles * (8 if spec.gated else 16)
    with T.launch_thread("blockIdx.x", -(-features // owned)) as block:
        with T.launch_thread("threadIdx.x", WARP * knobs.warps) as thread:
            _Block(operands, knobs.fitted(spec.in_features), features, owned).emit(block, thread)


class _Block:
    def __init__(self, operands: Operands, knobs: FewRows, features: int, owned: int) -> None:
        self.operands, self.knobs, self.features, self.owned = operands, knobs, features, owned
        self.spec = operands.spec
        self.blocks = knobs.columns // 8
        self.accesses = 2 * knobs.tiles * knobs.steps  # of 16 bytes that a lane makes for a chunk's weights
        self.pitch = 16 * knobs.tiles + 4  # of a column in shared memory; lanes 2t write to banks of their own
        self.ring_words = knobs.warps * knobs.stages * self.accesses * 4 * WARP

    def emit(self, block: Expr, thread: Expr) -> None:
        knobs = self.knobs
        words = self.ring_words + knobs.warps * knobs.columns * self.pitch
        self.shared = shared_array(words, "uint32")
        let_next_start(self.operands.early)
        first = scalar(block.astype("int32") * self.owned)
        lane, warp = scalar((thread % WARP).astype("int32")), scalar((thread // WARP).astype("int32"))
        self.g, self.t = scalar(lane // 4), scalar(lane % 4)
        self.ring = scalar((warp * (knobs.stages * self.accesses) * WARP + lane) * 4)
        self.sums = Registers(4 * knobs.tiles * self.blocks, "float32")
        self.sums.fill(f32(0))
        self._stream(first, warp)
        self._leave(warp)
        block_sync()
        self._collect(first, thread)

    def _stream(self, first: Expr, warp: Expr) -> None:
        """Add up the products of this warp's chunks: number ``warp``, and every ``warps``-th from there on."""
        knobs = self.knobs
        self.depth = knobs.steps * STEP
        chunks = self.spec.in_features // self.depth
        self.rows = [scalar(row) for tile in range(knobs.tiles) for row in self._rows(first, tile)]
        last = scalar(self.operands.rows.astype("int32") - 1)
        self.columns = [scalar(tir.min(8 * n + self.g, last)) for n in range(self.blocks)]
        self.start, self.warp = scalar(warp * self.depth + self.t * 8), warp
        self.count = scalar((chunks - warp + (knobs.warps - 1)) // knobs.warps)
        filled, read = Registers(1, "int32"), Registers(1, "int32")
        filled[0], read[0] = knobs.stages - 1, 0
        for stage in range(knobs.stages - 1):
            self._copy(stage, stage)
        wait_for_inputs(self.operands.early)
        weights, values = Registers(4 * self.accesses), Registers(4 * self.blocks * knobs.steps)
        coming = Registers(values.count) if knobs.ahead else values
        if knobs.ahead:
            with T.If(self.count > 0), T.Then():  # a warp without a chunk has no inputs to read
                self._load(values, i32(0))
        with T.serial(0, self.count) as turn:
            self._load(coming, tir.min(turn + 1, self.count - 1) if knobs.ahead else turn)
            ptx("cp.async.wait_group", knobs.stages - 2)
            for n in range(self.accesses):
                load_words(weights, 4 * n, self.shared, [self._place(read[0], n)], 4, "shared")
            self._copy(filled[0], turn + (knobs.stages - 1))
            self._multiply(weights, values)
            if knobs.ahead:
                for n in range(values.count):
                    values[n] = coming[n]
            for stage in (filled, read):
                stage[0] = tir.Select(stage[0] == knobs.stages - 1, 0, stage[0] + 1)

    def _load(self, values: Registers, turn: Expr) -> None:
        """Load this lane's inputs of the warp's chunk ``turn``."""
        at = scalar(self._input(turn))
        for n, (column, step) in enumerate(self._pairs(self.columns)):
            load_words(values, 4 * n, self.operands.x, (column, at + step * STEP), 4, "global")

    def _rows(self, first: Expr, tile: int) -> list[Expr]:
        """The two rows of the weight that this lane reads for a tile; past the end, the last one."""
        if self.spec.gated:
            row = tir.min(first + (8 * tile + self.g), self.features - 1)
            pair = [row, row + self.features]
        else:
            pair = [tir.min(first + (16 * tile + 8 * k + self.g), self.features - 1) for k in range(2)]
        return [row.astype("int64") for row in pair]

    def _pairs(self, rows: list[Expr]) -> Iterator[tuple[Expr, int]]:
        return ((row, step) for row in rows for step in range(self.knobs.steps))

    def _input(self, turn: Expr) -> Expr:
        """The first of this lane's inputs in the warp's chunk ``turn``."""
        return self.start + turn * (self.knobs.warps * self.depth)

    def _place(self, stage: Expr, access: int) -> Expr:
        return self.ring + (stage * self.accesses + access) * (4 * WARP)

    def _copy(self, stage: Expr, turn: Expr) -> None:
        """Begin to copy the weights of chunk ``turn``, if there is one."""
        with T.If(turn < self.count), T.Then():
            at = scalar(self._input(turn))
            for n, (row, step) in enumerate(self._pairs(self.rows)):
                source = self.operands.weight.ptr_to([row, at + step * STEP])
                ptx("cp.async.cg.shared.global", self.shared.ptr_to([self._place(stage, n)]), source, 16)
        ptx("cp.async.commit_group")

    def _multiply(self, weights: Registers, values: Registers) -> None:
        steps = self.knobs.steps
        for step in range(steps):
            for half in range(2):
                for tile in range(self.knobs.tiles):
                    low, high = (4 * ((2 * tile + k) * steps + step) + 2 * half for k in range(2))
                    a = [weights[low], weights[high], weights[low + 1], weights[high + 1]]
                    for n in range(self.blocks):
                        at = 4 * (n * steps + step) + 2 * half
                        mma_half(self.sums, 4 * (tile * self.blocks + n), a, [values[at], values[at + 1]])

    def _sum_place(self, warp: Expr, column: Expr, row: Expr) -> Expr:
        return self.ring_words + (warp * self.knobs.columns + column) * self.pitch + row

    def _leave(self, warp: Expr) -> None:
        """Write the warp's sums to shared memory."""
        for tile in range(self.knobs.tiles):
            for n in range(self.blocks):
                for part in range(4):
                    column, row = 8 * n + 2 * self.t + part % 2, 16 * tile + self.g + 8 * (part // 2)
                    value = tir.reinterpret("uint32", self.sums[4 * (tile * self.blocks + n) + part])
                    T.buffer_store(self.shared, value, [self._sum_place(warp, column, row)])

    def _collect(self, first: Expr, thread: Expr) -> None:
        """Add up what the warps left, and store."""
        threads, total = WARP * self.knobs.warps, self.owned * self.knobs.columns
        for start in range(0, total, threads):
            item = scalar(thread.astype("int32") + start)
            column, feature = scalar(item // self.owned), scalar(item % self.owned)
            inside = (column < self.operands.rows.astype("int32")) & (first + feature < self.features)
            with T.If(inside if start + threads <= total else inside & (item < total)), T.Then():
                if self.spec.gated:
                    row = scalar(feature // 8 * 16 + feature % 8)
                    value = silu(self._sum(column, row)) * self._sum(column, row + 8)
                else:
                    value = self._sum(column, feature)
                self.operands.finish(column, first + feature, value)

    def _sum(self, column: Expr, row: Expr) -> Expr:
        total = Registers(1, "float32")
        total[0] = f32(0)
        for warp in range(self.knobs.warps):
            total[0] = total[0] + tir.reinterpret("float32", self.shared[self._sum_place(warp, column, row)])
        return total[0]
