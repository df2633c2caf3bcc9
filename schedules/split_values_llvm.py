"""Unpacks tiles of TurboQuant's 2.5 and 3.5 bits (``formats.split_codebook``) for CPU attention.

The low bits of all codes and the plane of further bits are unpacked one after the other, each as a tile of its own;
then codes are put together and looked up. In a plane's tile the vectors of the first half of the dims come in the same
order as in the whole tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.tile_access import CodeSection

from .tile_values_llvm import LoadWords, TileValues, look_up
from .vector_ops import LANES, lanes, splat

Expr = Any


@dataclass(frozen=True)
class _Codes(TileValues):
    """Unpacks the codes of a section themselves, as the bits of float32 vectors."""

    part: CodeSection

    @property
    def section(self) -> CodeSection:
        return self.part

    def _lookup(self, code: Expr, table: Any) -> Expr:
        return tir.reinterpret(f"float32x{LANES}", code & splat(2**self.part.bits - 1, "uint32"))


@dataclass(frozen=True)
class SplitValues(TileValues):
    """Unpacks one role's codes of a tile, as ``TileValues`` does."""

    def table(self) -> Any:
        """Buffers: the values of the wide and of the narrow codebook, sixteen each; scratch for the plane's bits."""
        book = self.codec.codebook
        buffer = T.alloc_buffer((2 * LANES,), "float32")
        for index, half in enumerate((book.wide, book.narrow)):
            for k, value in enumerate(np.resize(half.centroids, LANES)):
                T.buffer_store(buffer, tir.const(float(value), "float32"), [index * LANES + k])
        return buffer, T.alloc_buffer((16 * self.codec.head_dim,), "float32")

    def unpack(self, load: LoadWords, table: Any, words: Any, out: Any) -> None:
        """Fill ``out`` [head_dim*32] from a tile."""
        (values, top), section = table, self.section
        _Codes(self.codec, self.layout, self.role, self.target, section).unpack(load, None, words, out)
        _Codes(self.codec, self.layout, self.role, self.target, section.plane).unpack(load, None, words, top)
        octets = 4 if self.role == "k" else 1  # keys come by octets of tokens, each with all of its dims
        count = self.codec.head_dim * 2 // octets
        with T.serial(0, octets) as octet:
            with T.serial(0, count // 2) as n:
                at = lanes((octet * count + n) * LANES)
                high = _bits(top[lanes((octet * (count // 2) + n) * LANES)])
                code = _bits(out[at]) | high << splat(section.bits, "uint32")
                T.buffer_store(out, self._value(code, self.codec.codebook.wide, values, 0), [at])
            with T.serial(count // 2, count) as n:
                at = lanes((octet * count + n) * LANES)
                T.buffer_store(out, self._value(_bits(out[at]), self.codec.codebook.narrow, values, LANES), [at])

    def _value(self, code: Expr, book: Any, table: Any, first: int) -> Expr:
        return look_up(code, [float(c) for c in book.centroids], table[lanes(first)], self.target)


def _bits(value: Expr) -> Expr:
    return tir.reinterpret(f"uint32x{LANES}", value)
