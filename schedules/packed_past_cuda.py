"""The packed past on its way to the tensor cores, on CUDA: tiles are copied ahead and unpacked into shared memory.

Keys become float16 rows, with what their scores lack in the padding between them. Values become operands of the second
product right away, since that is the order their codes are stored in: no transposition, and 16-byte accesses all the
way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir

from rotquant_tvm.formats import TOKENS

from .cuda_ops import WARP, Registers, bits_of, block_sync, i32, load_words, scalar, store_words
from .mma_half_cuda import FragmentValues
from .packed_tiles_cuda import PackedTiles, tiles_of
from .prefill_spans_cuda import TokenSpans
from .prefill_tiling_cuda import PrefillTiling
from .row_stream_cuda import commit_copies, wait_for_copies
from .tile_unpacker_cuda import unpack_roles

Expr = Any


class RowsAndOperands:
    """Keys as padded rows, values as operands, of one stage (``UnpackedPlace``)."""

    def __init__(self, tiling: PrefillTiling, shared: Any, lane: Expr) -> None:
        self.tiling, self.shared = tiling, shared
        self.first_gain = scalar(tiling.stages_start + lane % 4 * 2 * tiling.pitch + tiling.head_dim)
        self.keys = scalar(tiling.stages_start + lane // 4 * tiling.pitch + lane % 4 * 4)
        self.values = FragmentValues(shared, tiling.stages_start + tiling.role_size, tiling.head_dim, lane)

    def store_keys(self, tile: Expr, eight: int, sixteen: int, values: list[Expr]) -> None:
        """See ``UnpackedPlace``."""
        pitch = self.tiling.pitch
        at = self.keys + tile * (TOKENS * pitch) + (8 * eight * pitch + 16 * sixteen)
        store_words(self.shared, [at], values, "shared")

    def store_gain(self, tile: Expr, token: Expr, gain: Expr) -> None:
        """See ``UnpackedPlace``: those of two tokens stand together, in the padding behind the first one's key."""
        pair = self.tiling.stages_start + (tile * TOKENS + token // 2 * 2) * self.tiling.pitch
        at = pair + self.tiling.head_dim + token % 2 * 2
        store_words(self.shared, [at], [bits_of(gain)], "shared")

    def gains(self, block: int) -> list[Expr]:
        """Those of the lane's two tokens among eight, as ``WarpAttention.scale_scores`` takes them."""
        pair = Registers(2, "float32")
        at = self.first_gain + 8 * block * self.tiling.pitch
        load_words(pair, 0, self.shared, [at], 2, "shared")
        return [pair[0], pair[1]]

    def store_values(self, tile: Expr, sixteen: int, tokens: int, values: list[Expr]) -> None:
        """See ``UnpackedPlace``."""
        store_words(self.shared, [self.values.place(tile * 2 + tokens, sixteen)], values, "shared")


@dataclass(frozen=True)
class PackedPast:
    """The packed tokens that a block reads, in stages; ``raw`` are a stage's tiles."""

    tiling: PrefillTiling
    raw: PackedTiles
    place: RowsAndOperands
    spans: TokenSpans

    @property
    def count(self) -> Expr:
        """How many stages there are."""
        size = self.tiling.tokens
        return tir.max(self.spans.packed - self.spans.first_tile * TOKENS + (size - 1), 0) // size

    def first_token(self, number: Expr) -> Expr:
        """The first token of a stage, counted behind the sinks."""
        return self.spans.first_tile * TOKENS + number * self.tiling.tokens

    def start(self) -> None:
        """Begin to copy the first stage."""
        self._copy(i32(0))
        self.raw.store_tables()

    def ready(self, number: Expr) -> None:
        """Wait for a stage and unpack it, once all warps have used the one before; start to copy the next."""
        wait_for_copies(0)
        stored = scalar(self.spans.packed - self.first_token(number))
        thread = self.raw.thread
        unpack_roles((0, 1), self.raw, self.place, stored, thread, self.tiling.threads // WARP)
        block_sync()
        self._copy(number + 1)

    def _copy(self, number: Expr) -> None:
        first = scalar(self.spans.first_tile + number * self.raw.tiles)
        self.raw.copy(first, tiles_of(self.spans.packed))
        commit_copies()
