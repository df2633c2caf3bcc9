"""Attention's two products on Hopper's tensor cores (sm_90a), for the 64 query rows of a warpgroup, on CUDA.

Operands stand in shared memory as rows of 64 float16 (128 bytes), a vector's blocks of 64 dims one after the other, and
the 16-byte units of a row lie where its number, modulo 8, permutes them to: the "128-byte swizzle" that these products
read without bank conflicts. They run asynchronously: what they write or read in registers is not touched until they
have been waited for. The lanes of a warp hold scores and outputs as after ``mma.sync`` (``mma_half_cuda``).
"""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.backend.cuda import op as cuda

from .cuda_ops import Registers, ptx, scalar, u32
from .mma_half_cuda import WarpAttention

Expr = Any
BLOCK = 64
"""Elements of a row in shared memory."""
SWIZZLE_128 = 1 << 30
"""In the upper word of a descriptor."""


def blocks_of(size: int) -> int:
    """Blocks of 64 that so many elements take."""
    return -(-size // BLOCK)


class SwizzledRows:
    """A matrix of float16 in shared memory: ``rows`` rows of blocks of 64 elements, block after block.

    ``first``: its element of ``shared``, a multiple of 512.
    """

    def __init__(self, shared: Any, first: Expr, rows: int) -> None:
        self.shared, self.first, self.rows = shared, first, rows

    def place(self, row: Expr, block: Expr, unit: Expr) -> Expr:
        """Where 16-byte unit ``unit`` (0 … 7) of a block of a row begins."""
        return self.first + (block * self.rows + row) * BLOCK + tir.bitwise_xor(unit, row % 8) * 8

    def rowwise(self) -> Expr:
        """The descriptor (uint64) of an operand whose rows are the product's rows, or columns, to ``rowwise_step``."""
        return self._descriptor(16, 8 * 128)

    def columnwise(self) -> Expr:
        """The descriptor of a right operand whose rows are summed over, to ``columnwise_step``."""
        return self._descriptor(self.rows * 128, 8 * 128)

    def _descriptor(self, leading: int, stride: int) -> Expr:
        address = cuda.cuda_cvta_generic_to_shared(self.shared.ptr_to([self.first]))
        low = scalar(address >> u32(4) | u32(leading >> 4 << 16))
        return scalar(low.astype("uint64") | tir.const((stride >> 4 | SWIZZLE_128) << 32, "uint64"))

    def rowwise_step(self, sixteen: int) -> int:
        """What to add to the descriptor for elements 16·``sixteen`` … of the rows."""
        return sixteen // 4 * self.rows * 8 + sixteen % 4 * 2

    def columnwise_step(self, sixteen: int) -> int:
        """What to add to the descriptor for rows 16·``sixteen`` …."""
        return sixteen * 128


def pin(registers: Registers) -> None:
    """Keep what follows from being moved before this: the compiler does not know when products write."""
    for register in registers:
        ptx("mov.f32" if registers.dtype == "float32" else "mov.b32", register, register)


def close_products() -> None:
    """Make the products since the last such call a group."""
    ptx("wgmma.commit_group.sync.aligned")


def wait_for_products(pending: int) -> None:
    """Wait for all groups of products but the last ``pending``."""
    ptx("wgmma.wait_group.sync.aligned", pending)


class WarpgroupAttention(WarpAttention):
    """``WarpAttention`` of 16 rows of each warp of a warpgroup; create it where its registers should be."""

    def __init__(self, head_dim: int, tokens: int) -> None:
        super().__init__(head_dim, tokens, 1)
        self.weights = Registers(tokens // 4)

    def open_products(self) -> None:
        """Let products use registers that were written; before each group that does."""
        ptx("wgmma.fence.sync.aligned")

    def start_scores(self, queries: tuple[SwizzledRows, Expr], keys: tuple[SwizzledRows, Expr]) -> None:
        """Start scores = q·k; operands are matrices and their descriptors."""
        name = f"wgmma.mma_async.sync.aligned.m64n{self.tokens}k16.f32.f16.f16"
        for step in range(self.head_dim // 16):
            a, b = (rows[1] + _wide(rows[0].rowwise_step(step)) for rows in (queries, keys))
            ptx(name, *self.scores, a, b, tir.const(step > 0, "bool"), 1, 1, 0, 0)
        close_products()

    def start_values(self, values: tuple[SwizzledRows, Expr], transposed: bool) -> None:
        """Start output += weights·v; ``transposed``: the rows of ``values`` are dims."""
        name = f"wgmma.mma_async.sync.aligned.m64n{self.head_dim}k16.f32.f16.f16"
        matrix, descriptor = values
        for step in range(self.tokens // 16):
            offset = matrix.rowwise_step(step) if transposed else matrix.columnwise_step(step)
            a = [self.weights[4 * step + k] for k in range(4)]
            ptx(name, *self.output, *a, descriptor + _wide(offset), tir.const(True, "bool"), 1, 1, int(not transposed))
        close_products()

    def round_weights(self) -> None:
        """Make the weights operands."""
        for step in range(self.tokens // 16):
            self._round_weights(self.weights, step)


def _wide(offset: int) -> Expr:
    return tir.const(offset, "uint64")
