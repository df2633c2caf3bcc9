"""The values of one packed tile as float32 vectors, for CPU attention.

The codes of a tile lie in the order of matrix fragments: 32 lanes (g, t), words of eight codes. Two CPU vectors are
the 32 lanes. A tile is unpacked into a scratch array of vectors in that same order; attention over it then needs no
transpose, only a sum over t at the end (see ``attention_core_llvm``):

    K: vector (p, e, s), p = octet*(d/16) + h      lane (g, t): token 8*octet + 4s + g, dim 16h + 4t + e
    V: vector (j, hf, s, x, e)                     lane (g, t): token 16x + 8(e//2) + 2t + e%2, dim 16j + 8hf + 4s + g
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm.tirx as tir
from tvm.target.codegen import target_has_features
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codec, KeyLayout, TileLayout
from rotquant_tvm.ops.tile_access import CodeSection, code_section

from .vector_ops import LANES, cast, lane_numbers, lanes, pick, register, splat

Expr = Any
LoadWords = Callable[[Expr], Expr]


def slot_k(group: Expr, half: int, e: int, s: int) -> Expr:
    """Number of the scratch vector of a K code."""
    return (group * 2 + half) * 8 + (e * 2 + s)


def slot_v(group: Expr, half: int, e: int, s: int) -> Expr:
    """Number of the scratch vector of a V code; ``group`` is even plus its parity as (pair, x)."""
    pair, x = group
    return (pair * 4 + (half * 2 + s)) * 8 + (x * 4 + e)


@dataclass(frozen=True)
class TileValues:
    """Unpacks one role's codes of a tile. ``layout`` and ``codec`` say how they are stored."""

    codec: Codec
    layout: TileLayout | KeyLayout
    role: str
    target: tvm.target.Target

    @property
    def section(self) -> CodeSection:
        """The codes in the tile."""
        return code_section(self.layout, self.role)

    @property
    def unit(self) -> float:
        """What an unpacked value of 1 is worth."""
        return 1.0

    @property
    def scratch_words(self) -> int:
        """Words per lane that ``unpack`` needs as scratch."""
        return self.section.words + 1

    def table(self) -> Any:
        """A buffer with the codebook's values, repeated to sixteen (None for formats whose codes are numbers)."""
        if self.codec.code_values is None:
            return None
        values = np.resize(self.codec.code_values, LANES)
        buffer = T.alloc_buffer((LANES,), "float32", scope="local")
        for k, value in enumerate(values):
            T.buffer_store(buffer, tir.const(float(value), "float32"), [k])
        return buffer

    def unpack(self, load: LoadWords, table: Any, words: Any, out: Any) -> None:
        """Fill ``out`` [head_dim*32] from a tile; ``load(i)`` gives words i … i+15, ``words`` is scratch for them."""
        self._deinterleave(load, words)
        section = self.section
        groups = {1: 4, 3: 4}.get(section.bits, 2)  # per round of the loop: an even number of whole periods
        rounds = section.groups // groups
        with T.serial(0, rounds) as index:
            for group in range(groups):
                self._group(words, table, out, index * groups, group, load, index)
        for group in range(section.groups - rounds * groups):
            self._tail_group(words, table, out, rounds * groups, group)

    def _deinterleave(self, load: LoadWords, words: Any) -> None:
        """Words as vectors over lanes: vector 2w+s of ``words`` holds word w of lanes 16s … 16s+15."""
        section = self.section
        first, count = section.first_word, section.words
        with T.serial(0, count // 4) as chunk:
            for s in range(2):
                vectors = [load(chunk * 128 + (first + 64 * s + LANES * i)) for i in range(4)]
                for w in range(4):
                    value = pick(vectors, lambda k, w=w: 4 * k + w)
                    T.buffer_store(words, value, [lanes((chunk * 4 + w) * 32 + LANES * s)])
        done = count // 4 * 4
        if count - done >= 2:
            for s in range(2):
                vectors = [load(first + done * 32 + 32 * s + LANES * i) for i in range(2)]
                for w in range(2):
                    value = pick(vectors, lambda k, w=w: 2 * k + w)
                    T.buffer_store(words, value, [lanes((done + w) * 32 + LANES * s)])
            done += 2
        if count > done:
            for s in range(2):
                T.buffer_store(words, load(first + done * 32 + LANES * s), [lanes(done * 32 + LANES * s)])
        if section.bits in (1, 3) and section.groups % 4:
            pairs = load(first + count * 32)
            shift = cast((lane_numbers() & splat(1, "int32")) << splat(4, "int32"), "uint32")
            for s in range(2):
                value = pick([pairs], lambda k, s=s: 8 * s + k // 2) >> shift
                T.buffer_store(words, value, [lanes(count * 32 + LANES * s)])

    def _group(self, words: Any, table: Any, out: Any, base: Expr, group: int, load: LoadWords, index: Expr) -> None:
        """Unpack group ``base + group`` in a round of the loop."""
        bits = self.section.bits

        def word(number: Expr, s: int) -> Expr:
            return words[lanes(number * 32 + LANES * s)]

        for half in range(2):
            for e in range(4):
                nibble = 4 * half + e
                for s in range(2):
                    if bits >= 8:
                        value = self._wide(word, base + group, half, e, s)
                    elif bits == 4:
                        w = word(base + group, s)
                        high = _shifted(w, 4 * (2 * e + 1 - half)) & splat(8, "uint32")
                        value = self._lookup(_shifted(w, 4 * nibble) & splat(7, "uint32") | high, table)
                    elif bits == 3 and group == 3:
                        value = self._lookup(_gathered(word, index * 3, nibble, s), table)
                    elif bits == 3:
                        value = self._lookup(_shifted(word(index * 3 + group, s), 4 * nibble), table)
                    elif bits == 2:
                        value = self._lookup(_shifted(word(index, s), 4 * nibble + 2 * group), table)
                    else:
                        value = self._lookup(_shifted(word(index, s), 4 * nibble + group), table)
                    self._store(out, value, base, group, half, e, s)

    def _tail_group(self, words: Any, table: Any, out: Any, base: int, group: int) -> None:
        """Unpack one of the two groups that 1 and 3 bits may leave over: they end in a half-word."""
        section = self.section
        for half in range(2):
            for e in range(4):
                nibble = 4 * half + e
                for s in range(2):
                    top = _shifted(words[lanes(section.words * 32 + LANES * s)], 8 * group + nibble)
                    code = top & splat(1, "uint32")
                    if section.bits == 3:
                        low = _shifted(words[lanes((section.words - 1) * 32 + LANES * s)], 4 * nibble + 2 * group)
                        code = code << splat(2, "uint32") | low & splat(3, "uint32")
                    self._store(out, self._lookup(code, table), base, group, half, e, s)

    def _store(self, out: Any, value: Expr, base: Expr, group: int, half: int, e: int, s: int) -> None:
        if self.role == "k":
            slot = slot_k(base + group, half, e, s)
        else:
            slot = slot_v((tir.floordiv(base, 2) + group // 2, group % 2), half, e, s)
        T.buffer_store(out, value, [lanes(slot * LANES)])

    def _wide(self, word: Callable[[Expr, int], Expr], group: Expr, half: int, e: int, s: int) -> Expr:
        if self.section.bits == 8:
            signed = cast(word(group * 2 + half, s), "int32") << splat(24 - 8 * e, "int32")
            return cast(signed >> splat(24, "int32"), "float32")
        bits = _shifted(word(group * 4 + (half * 2 + e // 2), s), 16 * (e % 2))
        if self.codec.format.codebook == "bfloat16":
            return tir.reinterpret(f"float32x{LANES}", bits << splat(16, "uint32"))
        return cast(tir.reinterpret(f"float16x{LANES}", cast(bits & splat(0xFFFF, "uint32"), "uint16")), "float32")

    def _lookup(self, code: Expr, table: Any) -> Expr:
        return look_up(code, [float(v) for v in self.codec.code_values], table[lanes(0)], self.target)


def look_up(code: Expr, values: list[float], table: Expr, target: tvm.target.Target) -> Expr:
    """The ``values`` of codes; bits above theirs are ignored. ``table`` is a vector of them, repeated to sixteen."""
    if target_has_features("avx512f", target):
        return tir.call_llvm_pure_intrin(
            f"float32x{LANES}", "llvm.x86.avx512.permvar.sf.512", table, cast(code, "int32")
        )
    if not target_has_features("avx2", target):
        return _select(code, values, len(values).bit_length() - 2)
    low = _permuted_eights(table, code, 0)
    if len(values) <= LANES // 2:
        return low
    test = (code & splat(LANES // 2, "uint32")) == splat(0, "uint32")
    return tir.Select(test, low, _permuted_eights(table, code, 1))


def _permuted_eights(table: Expr, code: Expr, part: int) -> Expr:
    """The values that the last three bits of codes pick from a half of a table."""
    half = 8

    def eight(vector: Expr, first: int) -> Expr:
        return tir.Shuffle([vector], [tir.const(first + k, "int32") for k in range(half)])

    name, entries, codes = "llvm.x86.avx2.permps", eight(table, half * part), cast(code, "int32")
    found = [tir.call_llvm_pure_intrin(f"float32x{half}", name, entries, eight(codes, half * s)) for s in range(2)]
    return tir.Shuffle(found, [tir.const(k, "int32") for k in range(LANES)])


def _shifted(word: Expr, bits: int) -> Expr:
    return word >> splat(bits, "uint32") if bits else word


def _gathered(word: Callable[[Expr, int], Expr], first: Expr, nibble: int, s: int) -> Expr:
    """The 3-bit code whose bits are the top bits of a nibble of three words."""
    planes = [_shifted(word(first + b, s), 4 * nibble + 3 - b) & splat(1 << b, "uint32") for b in range(3)]
    return planes[0] | planes[1] | planes[2]


def _select(code: Expr, values: list[float], bit: int) -> Expr:
    if len(values) == 1:
        return splat(values[0])
    half = len(values) // 2
    test = (code & splat(1 << bit, "uint32")) == splat(0, "uint32")
    return tir.Select(test, _select(code, values[:half], bit - 1), _select(code, values[half:], bit - 1))


@dataclass(frozen=True)
class TileGains:
    """Reads one role's gains of a tile into token order."""

    layout: TileLayout | KeyLayout
    role: str

    def halves(self, load: LoadWords, row: int) -> list[Expr]:
        """The 32 gains of a row as two vectors: of even and of odd positions."""
        words = load(self.layout.sections[f"{self.role}_gains"].offset // 4 + LANES * row)
        parts = (words & splat(0xFFFF, "uint32"), words >> splat(16, "uint32"))
        return [cast(tir.reinterpret(f"float16x{LANES}", cast(p, "uint16")), "float32") for p in parts]

    def in_token_order(self, load: LoadWords, out: Any, scale: float = 1.0, row: int = 0, first: Expr = 0) -> None:
        """Store the gains of tokens 0 … 31 in a row, times ``scale``, to ``out`` [32] from ``first`` on."""
        halves = register(2)
        for u, value in enumerate(self.halves(load, row)):
            T.buffer_store(halves, value if scale == 1 else value * splat(scale), [lanes(LANES * u)])
        vectors = [halves[lanes(0)], halves[lanes(LANES)]]
        for s in range(2):
            T.buffer_store(out, pick(vectors, lambda k, s=s: _place(LANES * s + k)), [lanes(first + LANES * s)])

    def scale_blocks(self, load: LoadWords, head_dim: int, out: Any) -> None:
        """Multiply unpacked values by their blocks' gains (formats with one gain per 32 dims)."""
        halves = register(2)
        for row in range(-(-head_dim // 32)):
            for u, value in enumerate(self.halves(load, row)):
                T.buffer_store(halves, value, [lanes(LANES * u)])
            vectors = [halves[lanes(0)], halves[lanes(LANES)]]
            for sixteen in range(2 * row, min(2 * row + 2, head_dim // 16)):
                self._scale_sixteen(vectors, head_dim, sixteen, out)

    def _scale_sixteen(self, vectors: list[Expr], head_dim: int, sixteen: int, out: Any) -> None:
        def scale(slot: Expr, token: Callable[[int], int]) -> None:
            at = lanes(slot * LANES)
            T.buffer_store(out, out[at] * pick(vectors, lambda k: _place(token(k))), [at])

        for e in range(4):
            for s in range(2):
                if self.role == "k":
                    for octet in range(4):
                        p = octet * (head_dim // 16) + sixteen
                        scale(p * 8 + e * 2 + s, lambda k, o=octet, s=s: 8 * o + 4 * s + k // 4)
                    continue
                for half in range(2):
                    for x in range(2):
                        scale(
                            slot_v((sixteen, x), half, e, s),
                            lambda k, x=x, e=e: 16 * x + 8 * (e // 2) + 2 * (k % 4) + e % 2,
                        )


def _place(token: int) -> int:
    """Where the gain of a token stands in (even positions, odd positions)."""
    return token % 2 * LANES + token % 8 // 2 * 4 + token // 8
