"""The caches that the operator tests cover: formats, head dimensions and grouped heads."""

from __future__ import annotations

from typing import NamedTuple

from rotquant_tvm.formats import Codec

from .reference import codecs_of


class Case(NamedTuple):
    """K/V formats, head dimension, query heads and kv heads."""

    pair: str
    head_dim: int
    heads: int
    kv_heads: int

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """The K and V codec."""
        return codecs_of(self.pair, self.head_dim)

    def __str__(self) -> str:
        return f"{self.pair.replace('/', '-')}-d{self.head_dim}-h{self.heads}-{self.kv_heads}"


CASES = [
    Case("hurwitz3", 64, 9, 3),
    Case("f16", 64, 4, 4),  # as many kv heads as heads
    Case("iso4/planar2", 80, 8, 2),
    Case("rotor1/q8_0", 80, 3, 3),
    Case("rotor3:norm/rotor1", 80, 5, 1),  # half-words at the end of both code sections
    Case("q8_0/iso3-full", 96, 6, 3),
    Case("bf16/dense1", 96, 7, 1),  # one kv head, an odd group
    Case("turbo3/bf16", 128, 8, 1),
    Case("planar2/rotor4:ip", 128, 16, 2),
    Case("hurwitz4:raw/turbo4", 256, 4, 1),
    Case("hurwitz2/f16", 256, 4, 2),
    Case("rotor3+tcq/planar2+tcq", 80, 4, 2),
    Case("q8_0/q4_0", 80, 6, 2),
    Case("q4_0/turbo3.5", 64, 4, 2),
    Case("dense2.5/turbo2.5:mse", 32, 5, 1),
]
SKETCHES = [
    Case("turbo3+qjl/qjl1", 64, 2, 2),
    Case("iso3/dense2+qjl", 80, 2, 1),
]
"""Formats that are appended and dequantized, but that attention does not take."""

MIXED = CASES[2]
"""K and V of different bits, in a head dimension with odd word counts."""
