"""Feeds unquantized keys and values of a prefill chunk to the CPU attention core, 32 tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .attention_core_llvm import AttentionCore, wide
from .tile_values_llvm import slot_v
from .vector_ops import LANES, lanes, pick

Expr = Any
Row = Callable[[int, Expr, Expr], Expr]


class ChunkSource:
    """Brings rows of k and v ``[batch, kv_heads, seq, head_dim]`` into the order of an unpacked tile."""

    def __init__(self, core: AttentionCore, k: Any, v: Any) -> None:
        self.core, self.buffers = core, (k, v)

    def load(self, where: list[Expr], first: Expr, count: Expr) -> None:
        """Tokens first … first+31 of sequence and head ``where``; past ``count`` the last real one stands in."""

        def row(role: int, token: Expr, dim: Expr) -> Expr:
            real = tir.max(tir.min(first + token, count - 1), tir.const(0, "int32"))
            return wide(self.buffers[role], [*where, real], dim)

        self.load_rows(row)

    def load_rows(self, row: Row) -> None:
        """Tokens 0 … 31, given by ``row(role, token, dim)``: float32 dims dim … dim+15 of a key (0) or value (1)."""
        self.core.unit_gains()
        with T.serial(0, self.core.head_dim // 16) as sixteen:
            with T.serial(0, 4) as octet:
                self._keys(row, octet, sixteen)
            self._values(row, sixteen)

    def _keys(self, row: Row, octet: Expr, sixteen: Expr) -> None:
        for s in range(2):
            vectors = [row(0, octet * 8 + (4 * s + g), sixteen * 16) for g in range(4)]
            for e in range(4):
                value = pick(vectors, lambda k, e=e: k // 4 * LANES + 4 * (k % 4) + e)
                slot = (octet * (self.core.head_dim // 16) + sixteen) * 8 + (e * 2 + s)
                T.buffer_store(self.core.keys, value, [lanes(slot * LANES)])

    def _values(self, row: Row, sixteen: Expr) -> None:
        for x in range(2):
            for e in range(4):
                vectors = [row(1, 16 * x + 8 * (e // 2) + 2 * t + e % 2, sixteen * 16) for t in range(4)]
                for half in range(2):
                    for s in range(2):
                        value = pick(vectors, lambda k, h=half, s=s: k % 4 * LANES + 8 * h + 4 * s + k // 4)
                        slot = slot_v((sixteen, x), half, e, s)
                        T.buffer_store(self.core.values, value, [lanes(slot * LANES)])
