"""Changes of basis in prefill attention's thread blocks, on CUDA: only what has a past pays for them.

The packed past lies in rotated bases, the chunk does not. A block that reads a past rotates its queries first, and its
sums before it goes on with the chunk. Both are products on tensor cores with the rotation as a matrix, whatever its
layers (of keys it may be a sum of two, ``ops.rotation_matrices``): of queries with its rows as keys, of normalized sums
with its rows as values. A rotation's rows take the place of the stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from .cuda_ops import WARP, Registers, block_sync, f32, mma_half, pack_half2, store_words, warp_sync
from .mma_half_cuda import HalfRows, WarpAttention
from .opaque_cuda import again
from .prefill_rows_cuda import Place
from .prefill_tiling_cuda import PrefillTiling
from .row_stream_cuda import commit_copies, copy_ahead, share_out, wait_for_copies

Expr = Any


@dataclass(frozen=True)
class BasisChange:
    """A block's changes of basis; ``staged``: rows in the place of the stages; ``matrices`` by role, or None."""

    tiling: PrefillTiling
    shared: Any
    thread: Expr
    staged: HalfRows
    matrices: tuple[Any, Any]

    def rotate_queries(self, attention: WarpAttention, queries: HalfRows, mine: Expr, place: Place) -> None:
        """Rotate the queries, which are on their way to shared memory, by K's matrix, or by a sum of matrices."""
        if self.matrices[0] is None:
            return
        head_dim, lane = self.tiling.head_dim, self.thread % WARP
        terms = int(self.matrices[0].shape[0]) // head_dim
        words = list(product(range(attention.row_tiles), range(2), range(head_dim // 8)))
        rotated = Registers(2 * len(words), "float32")
        for first, count in self._passes(self.matrices[0]):
            for part in range(0, count, attention.tokens):
                offset = part * self.tiling.pitch
                attention.multiply_keys(queries, lambda *at, offset=offset: self.staged.load_keys(*at, offset))
                for term, (number, (tile, half, block)) in product(range(terms), enumerate(words)):
                    column = term * head_dim + 8 * block - first - part
                    if 0 <= column < attention.tokens:
                        at = attention.score(tile, column // 8, 2 * half)
                        for u in range(2):
                            score = attention.scores[at + u]
                            rotated[2 * number + u] = rotated[2 * number + u] + score if term else score
        warp_sync()  # a warp reads no rows but its own
        for number, (tile, half, block) in enumerate(words):
            row = mine + (16 * tile + 8 * half + lane // 4)
            word = pack_half2(rotated[2 * number], rotated[2 * number + 1])
            store_words(self.shared, [place(row, block) + lane % 4 * 2], [word], "shared")
        block_sync()

    def unrotate_sums(self, attention: WarpAttention) -> None:
        """Turn the sums of values back by V's matrix; ends where all warps have left the stages' place."""
        if self.matrices[1] is None:
            block_sync()
            return
        head_dim, row_tiles = self.tiling.head_dim, attention.row_tiles
        totals = [attention.whole_total(row) for row in range(2 * row_tiles)]
        rounded = Registers(row_tiles * head_dim // 4)
        for number in range(rounded.count):
            tile, k = number // (head_dim // 4), number % 4
            at = tile * head_dim // 2 + number % (head_dim // 4) // 4 * 8 + k // 2 * 4 + k % 2 * 2
            share = totals[2 * tile + k % 2][1]
            rounded[number] = pack_half2(attention.output[at] * share, attention.output[at + 1] * share)
        attention.output.fill(f32(0))
        for first, count in self._passes(self.matrices[1]):
            self._multiply(attention, rounded, first // 16, count // 16)
        for row, (total, _) in enumerate(totals):
            for at in attention.output_places(row):
                attention.output[at] = attention.output[at] * total
        block_sync()

    def _multiply(self, attention: WarpAttention, left: Registers, first: int, count: int) -> None:
        """Output += left · the staged rows, which begin with the sixteen of number ``first``."""
        depth = self.tiling.head_dim // 16
        steps = [(part, dims) for part in range(count) for dims in range(depth)]
        right = Registers(8)
        self.staged.load_values(right, 0, 0, 0)
        for number, (part, dims) in enumerate(steps):
            if number + 1 < len(steps):
                self.staged.load_values(right, 4 * ((number + 1) % 2), *steps[number + 1])
            for tile in range(attention.row_tiles):
                a = [left[4 * (tile * depth + first + part) + k] for k in range(4)]
                for block in range(2):
                    b = [right[4 * (number % 2) + 2 * block + k] for k in range(2)]
                    mma_half(attention.output, (tile * 2 * depth + 2 * dims + block) * 4, a, b)

    def _passes(self, matrix: Any) -> Iterator[tuple[int, int]]:
        """Copy a matrix's rows, as many at a time as fit: (first, count) of those that are there."""
        tiling = self.tiling
        units, room = tiling.head_dim // 8, 2 * tiling.stages * tiling.tokens
        rows = int(matrix.shape[0])
        for first in range(0, rows, room):
            count = min(room, rows - first)
            block_sync()
            # The thread's number again, for what is worked out from it not to stand in registers through the products.
            for unit in share_out(count * units, again(self.thread), tiling.threads):
                row, part = unit // units, unit % units
                at = tiling.stages_start + row * tiling.pitch + part * 8
                copy_ahead(self.shared, at, matrix, [first + row, part * 8])
            commit_copies()
            wait_for_copies(0)
            yield first, count
