"""Linear layers of many rows on Hopper: the tiles of ``linear_many_rows_cuda`` on the tensor cores of a warpgroup.

Both operands are read from shared memory by the tensor cores themselves (``wgmma``), which run beside the threads: a
product is waited for when the next one has been started. A stage is filled again two slices after it was read, when
every warpgroup is known to have passed it. The slices' layout in shared memory is the same as without warpgroups: the
permutation of 16-byte parts is the hardware's own.
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.backend.cuda import op as cuda
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, block_sync, ptx, scalar, u32
from .linear_many_rows_cuda import SLICE, ManyRows, ManyRowsTile

Expr = Any
GROUP_ROWS = 64
"""Rows of x that a warpgroup multiplies."""
ATOM_BYTES = 1024
"""Eight rows of a slice: what the permutation repeats after, and what a stage must be aligned to."""
_DESCRIPTOR = (1 << 62) | ((ATOM_BYTES >> 4) << 32) | (1 << 16)
"""Of an operand: parts permuted over 128 bytes; from eight rows to the next eight; (unused) from column to column."""


def warpgroup_knobs(rows: int = 128, features: int = 256, stages: int = 4) -> ManyRows:
    """Knobs for tiles of ``rows`` (a multiple of 64) by ``features`` (of 8, at most 256)."""
    return ManyRows(rows, features, 16, features, stages, warpgroups=True)


def has_warpgroups(target: Target) -> bool:
    """Whether the target has the instructions, which are Hopper's alone."""
    return str(target.attrs.get("arch", "")) == "sm_90a"


class WarpgroupTile(ManyRowsTile):
    """A block's tile of y: a warpgroup takes 64 rows, and each of its warps gets 16 of them back."""

    def _shared(self) -> Any:
        """The ring, with room to begin it at a multiple of what the permutation repeats after."""
        shared = super()._shared(ATOM_BYTES // 2)
        address = cuda.cuda_cvta_generic_to_shared(shared.ptr_to([0]))
        self.first = scalar(((u32(0) - address.astype("uint32")) % u32(ATOM_BYTES) // u32(2)).astype("int32"))
        self.address = scalar(address.astype("uint32") + self.first.astype("uint32") * u32(2))
        return shared

    def _prepare_reads(self, lane: Expr) -> None:
        group = scalar(self.thread // (4 * WARP))
        self.rows_at = scalar(self.address + (group * (GROUP_ROWS * SLICE * 2)).astype("uint32"))
        self.features_at = scalar(self.address + u32(self.knobs.rows * SLICE * 2))

    def _multiply(self) -> None:
        knobs = self.knobs
        ahead = knobs.stages - 2
        for stage in range(ahead):
            self._copy(stage, stage)
        filled, read = Registers(1, "int32"), Registers(1, "int32")
        filled[0], read[0] = ahead, 0
        with T.serial(0, self.slices) as number:
            ptx("cp.async.wait_group", ahead - 1)
            ptx("fence.proxy.async.shared::cta")
            block_sync()
            ptx("wgmma.fence.sync.aligned")
            for step in range(SLICE // 16):
                self._product(scalar((read[0] * (self.stage * 2) + step * 32).astype("uint32")))
            ptx("wgmma.commit_group.sync.aligned")
            self._copy(filled[0], number + ahead)
            ptx("wgmma.wait_group.sync.aligned", 1)
            for cell in (filled, read):
                cell[0] = tir.Select(cell[0] == knobs.stages - 1, 0, cell[0] + 1)
        ptx("wgmma.wait_group.sync.aligned", 0)

    def _product(self, offset: Expr) -> None:
        """Add to the sums: 16 inputs of x times those of the weights, ``offset`` bytes behind the ring's start."""
        a, b = (_descriptor(start + offset) for start in (self.rows_at, self.features_at))
        sums = [self.sums[k] for k in range(self.sums.count)]
        name = f"wgmma.mma_async.sync.aligned.m64n{self.knobs.features}k16.f32.f16.f16"
        ptx(name, *sums, a, b, tir.const(True, "bool"), 1, 1, 0, 0)


def _descriptor(address: Expr) -> Expr:
    return scalar(tir.const(_DESCRIPTOR, "uint64") | (address >> u32(4)).astype("uint64"))
