"""Linear layers of many rows on CUDA (prefill): tiles of x and of the weights meet on float16 tensor cores.

A thread block computes a tile of y; x and the weights come in slices of 64 inputs through a ring of stages in shared
memory, copied while earlier slices are multiplied. Rows of a slice are 128 bytes; their eight 16-byte parts are
permuted by the row's number, so that eight rows of one part lie in different banks (``ldmatrix`` reads these).
With gated layers, blocks of eight features alternate between the two layers: a lane holds both factors of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, block_sync, f32, mma_half, ptx, scalar, shared_array
from .dependent_launch_cuda import let_next_start, wait_for_inputs
from .linear_operands_cuda import Operands, silu

Expr = Any
SLICE = 64
"""Inputs of one stage: 128 bytes of a row."""
PARTS = 8
"""16-byte parts of a row's slice."""


@dataclass(frozen=True)
class ManyRows:
    """The kernel's knobs: rows and features of a block's tile, and of a warp's; stages of the ring.

    ``warpgroups``: the warps' tensor cores work together (``linear_warpgroups_cuda``).
    """

    rows: int = 128
    features: int = 128
    warp_rows: int = 64
    warp_features: int = 32
    stages: int = 3
    warpgroups: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * (self.rows // self.warp_rows) * (self.features // self.warp_features)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.stages * (self.rows + self.features) * SLICE * 2 + (1024 if self.warpgroups else 0)


class ManyRowsTile:
    """Emits a block's tile of y."""

    @classmethod
    def launch(cls, operands: Operands, knobs: ManyRows) -> None:
        """Emit the launch of a block per tile, for any number of rows."""
        total = sum(operands.spec.out_features)
        row_tiles = (operands.rows + (knobs.rows - 1)) // knobs.rows
        with T.launch_thread("blockIdx.x", row_tiles * -(-total // knobs.features)) as block:
            with T.launch_thread("threadIdx.x", knobs.threads) as thread:
                cls(operands, knobs, total).emit(block, thread, row_tiles)

    def __init__(self, operands: Operands, knobs: ManyRows, total: int) -> None:
        self.operands, self.knobs, self.total = operands, knobs, total
        self.gated = operands.spec.gated
        self.slices = operands.spec.in_features // SLICE
        self.stage = (knobs.rows + knobs.features) * SLICE
        self.across, self.down = knobs.warp_features // 8, knobs.warp_rows // 16  # blocks of a warp's tile

    def emit(self, block: Expr, thread: Expr, row_tiles: Expr) -> None:
        """Emit the body of the launch."""
        knobs = self.knobs
        self.shared = self._shared()
        tiles = scalar(row_tiles.astype("int32"))
        block, self.thread = scalar(block.astype("int32")), scalar(thread.astype("int32"))
        # Neighbouring blocks share the weights, which are the larger operand.
        self.first_row = scalar(block % tiles * knobs.rows)
        self.first_feature = scalar(block // tiles * knobs.features)
        lane, warp = scalar(self.thread % WARP), scalar(self.thread // WARP)
        self.g, self.t = scalar(lane // 4), scalar(lane % 4)
        width = knobs.features // knobs.warp_features
        self.row, self.feature = scalar(warp // width * knobs.warp_rows), scalar(warp % width * knobs.warp_features)
        self.sums = Registers(4 * self.down * self.across, "float32")
        self.sums.fill(f32(0))
        self._prepare_copies()
        self._prepare_reads(lane)
        let_next_start(self.operands.early)
        wait_for_inputs(self.operands.early)
        self._multiply()
        self._store()

    def _shared(self, room: int = 0) -> Any:
        """The ring of stages, which begins at element ``self.first``, and ``room`` more elements."""
        self.first: Expr = 0
        return shared_array(self.knobs.stages * self.stage + room, "float16")

    def _prepare_copies(self) -> None:
        """A thread copies the same part of rows ``threads / 8`` apart, of x and of the weights."""
        knobs = self.knobs
        step = knobs.threads // PARTS
        row, part = scalar(self.thread // PARTS), scalar(self.thread % PARTS)
        self.target = scalar(self.first + row * SLICE + (part ^ (row % PARTS)) * 8)
        last = scalar(self.operands.rows.astype("int32") - 1)
        self.sources = []
        for start in range(0, knobs.rows, step):
            place = tir.min(self.first_row + row + start, last).astype("int64")
            self.sources.append((self.operands.x, scalar(place), start * SLICE))
        for start in range(0, knobs.features, step):
            place = self._weight_row(row + start).astype("int64")
            self.sources.append((self.operands.weight, scalar(place), (knobs.rows + start) * SLICE))
        self.part = scalar(part * 8)

    def _weight_row(self, row: Expr) -> Expr:
        """The weight's row in row ``row`` of the block's tile; past the end, the last one."""
        if not self.gated:
            return tir.min(self.first_feature + row, self.total - 1)
        half = self.total // 2
        feature = tir.min(self.first_feature // 2 + row // 16 * 8 + row % 8, half - 1)
        return feature + row // 8 % 2 * half

    def _copy(self, stage: Expr, number: Expr) -> None:
        """Begin to copy slice ``number``, if there is one, to a stage."""
        with T.If(number < self.slices), T.Then():
            start = scalar(number * SLICE + self.part)
            first = scalar(stage * self.stage + self.target)
            for buffer, row, offset in self.sources:
                ptx(
                    "cp.async.cg.shared.global.L2::128B",
                    self.shared.ptr_to([first + offset]),
                    buffer.ptr_to([row, start]),
                    16,
                )
        ptx("cp.async.commit_group")

    def _prepare_reads(self, lane: Expr) -> None:
        """Where a lane's rows start for ``ldmatrix``: four matrices are 16 rows by 16 inputs."""
        low, middle, high = scalar(lane % 8), scalar(lane // 8 % 2), scalar(lane // 16)
        row = (self.row + low + middle * 8) * SLICE
        feature = (self.knobs.rows + self.feature + low + high * 8) * SLICE
        steps = range(SLICE // 16)
        self.row_reads = [scalar(row + ((2 * k + high) ^ low) * 8) for k in steps]
        self.feature_reads = [scalar(feature + ((2 * k + middle) ^ low) * 8) for k in steps]

    def _read(self, target: Registers, at: int, base: Expr, count: int) -> None:
        for n in range(count):
            words = [target[at + 4 * n + k] for k in range(4)]
            address = self.shared.ptr_to([base + 16 * n * SLICE])
            ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *words, address)

    def _multiply(self) -> None:
        knobs, steps = self.knobs, SLICE // 16
        for stage in range(knobs.stages - 1):
            self._copy(stage, stage)
        x, weights = Registers(2 * 4 * self.down), Registers(2 * 2 * self.across)
        filled, read = Registers(1, "int32"), Registers(1, "int32")
        filled[0], read[0] = knobs.stages - 1, 0
        with T.serial(0, self.slices) as number:
            ptx("cp.async.wait_group", knobs.stages - 2)
            block_sync()
            base = scalar(read[0] * self.stage)
            self._fetch(x, weights, base, 0)
            self._copy(filled[0], number + (knobs.stages - 1))
            for step in range(steps):
                if step + 1 < steps:
                    self._fetch(x, weights, base, step + 1)
                for down in range(self.down):
                    a = [x[step % 2 * 4 * self.down + 4 * down + k] for k in range(4)]
                    for block in range(self.across):
                        at = step % 2 * 2 * self.across + 2 * block
                        mma_half(self.sums, 4 * (down * self.across + block), a, [weights[at], weights[at + 1]])
            for cell in (filled, read):
                cell[0] = tir.Select(cell[0] == knobs.stages - 1, 0, cell[0] + 1)

    def _fetch(self, x: Registers, weights: Registers, base: Expr, step: int) -> None:
        self._read(x, step % 2 * 4 * self.down, base + self.row_reads[step], self.down)
        self._read(weights, step % 2 * 2 * self.across, base + self.feature_reads[step], self.across // 2)

    def _store(self) -> None:
        """Lane (g, t) holds rows g and g + 8, features 2t and 2t + 1 of every block."""
        rows = scalar(self.operands.rows.astype("int32"))
        for down in range(self.down):
            for half in range(2):
                row = scalar(self.first_row + self.row + (16 * down + 8 * half) + self.g)
                with T.If(row < rows), T.Then():
                    for block in range(0, self.across, 2 if self.gated else 1):
                        at = 4 * (down * self.across + block) + 2 * half
                        self._store_pair(row, block, at)

    def _store_pair(self, row: Expr, block: int, at: int) -> None:
        if self.gated:
            feature = (self.first_feature + self.feature) // 2 + 4 * block + 2 * self.t
            values = [silu(self.sums[at + k]) * self.sums[at + 4 + k] for k in range(2)]
        else:
            feature = self.first_feature + self.feature + 8 * block + 2 * self.t
            values = [self.sums[at], self.sums[at + 1]]
        self.operands.finish_pair(row, scalar(feature), values)
