"""Codes in registers to the words of a tile, on CUDA: a warp whose lanes hold what the tile's lanes hold.

A lane's codes arrive as one word of eight nibbles to each of its d/8 groups (two words of four bytes at 8 bits), the
code of half h and element e in nibble 4h + e (``formats.packing``). Stored words are whole, in accesses of 16 bytes
where the layout has them; where only some tokens of a tile are new, the others' bits are read first and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TOKENS, TileLayout

from .cuda_ops import WARP, Registers, load_words, lop3, prmt, scalar, shuffle_xor, store_words, u32
from .tile_lane_cuda import Lane

Expr = Any
SELECT = 0xCA
"""Truth table of a ? b : c, bit by bit."""
EVERY_NIBBLE = 0x11111111


def pack_groups(bits: int, groups: Sequence[Expr]) -> tuple[list[Expr], Expr | None]:
    """A lane's words, and its half-word (in the low bits) if the groups leave one over.

    ``groups``: the words of nibbles of all its groups in order, at 8 bits the words of bytes of their halves.
    """
    if bits == 8:
        return list(groups), None
    if bits == 4:
        return [_move_top_bits(group) for group in groups], None
    if bits == 2:
        return [scalar(low | high << u32(2)) for low, high in zip(groups[::2], groups[1::2], strict=True)], None
    whole = len(groups) // 4 * 4
    words = []
    for quad in range(0, whole, 4):
        four = groups[quad : quad + 4]
        if bits == 1:
            words.append(scalar(four[0] | four[1] << u32(1) | four[2] << u32(2) | four[3] << u32(3)))
        else:
            words += [_with_spare_bits(four[r], four[3], r) for r in range(3)]
    if whole == len(groups):
        return words, None
    first, second = groups[whole:]
    if bits == 3:
        low = u32(3 * EVERY_NIBBLE)
        words.append(scalar(first & low | (second & low) << u32(2)))
        first, second = first >> u32(2), second >> u32(2)
    return words, scalar(_gather_bits(first) | _gather_bits(second) << u32(8))


def _with_spare_bits(group: Expr, fourth: Expr, bit: int) -> Expr:
    """Three bits of one group, and one bit of the quad's fourth group, in each nibble."""
    moved = fourth << u32(3 - bit)
    return scalar(group | moved & u32(8 * EVERY_NIBBLE))


def _move_top_bits(group: Expr) -> Expr:
    """Four bits: the top bit of nibble 4h + e goes to nibble 2e + 1 - h."""
    group = scalar(group)
    low, high = prmt(group, group, u32(0x1100)), prmt(group, group, u32(0x3322))
    even = low << u32(4) & u32(0x00800080) | high & u32(0x00080008)
    odd = low & u32(0x80008000) | high >> u32(4) & u32(0x08000800)
    return scalar(group & u32(7 * EVERY_NIBBLE) | even | odd)


def _gather_bits(group: Expr) -> Expr:
    """The lowest bits of eight nibbles, side by side."""
    value = scalar(group & u32(EVERY_NIBBLE))
    value = scalar((value | value >> u32(3)) & u32(0x03030303))
    value = scalar((value | value >> u32(6)) & u32(0x000F000F))
    return scalar((value | value >> u32(12)) & u32(0xFF))


class TileStores:
    """Emits the stores of one role into tiles of a cache uint32 [batch, kv_heads, tiles, tile_bytes/4]."""

    def __init__(self, cache: Any, layout: TileLayout, order: Lane) -> None:
        self.cache, self.order = cache, order
        self.format = layout.k if order.role == "k" else layout.v
        self.first_code = layout.sections[f"{order.role}_codes"].offset // 4
        self.first_gain = layout.sections[f"{order.role}_gains"].offset // 4

    def codes(
        self,
        at: Sequence[Expr],
        halves: Sequence[Sequence[Expr]],
        written: Callable[[Expr], Expr] | None,
        old: Registers | None = None,
    ) -> None:
        """Store the groups of both halves of tile ``at``, of up to 8 bits, at all tokens or those ``written(token)``.

        ``old``: what ``read_codes`` gave, if the tile's words are known already.
        """
        bits = self.format.bits
        each = 2 if bits == 8 else 1
        words, half_word = pack_groups(bits, self.order.in_order(*halves, each))
        masks: list[Expr | None] = [None] * len(words)
        half_mask = None
        if written is not None:
            parts = [self._masks(half, written) for half in range(2)]
            whole, half_mask = pack_groups(bits, self.order.in_order(*parts, each))
            masks = list(whole)
        for first, index in self._accesses(at):
            part = slice(first, first + index.count)
            self._store(index.place, words[part], masks[part], None if old is None else list(old)[part])
        if half_word is not None:
            kept = None if old is None else [old[len(words)]]
            self._store_half_words(self._half_words(at), half_word, half_mask, kept)

    def _accesses(self, at: Sequence[Expr]) -> list[tuple[int, _Access]]:
        """Where the lane's whole words are, and the number of the first of each access."""
        count, done, found = self.order.head_dim * self.format.bits // 32, 0, []
        for size in (4, 2, 1):
            while count - done >= size:
                place = [*at, self.first_code + done * WARP + self.order.lane * size]
                found.append((done, _Access(place, size)))
                done += size
        return found

    def _half_words(self, at: Sequence[Expr]) -> list[Expr]:
        count = self.order.head_dim * self.format.bits // 32
        return [*at, self.first_code + count * WARP + self.order.lane // 2]

    def read_codes(self, at: Sequence[Expr]) -> Registers:
        """Read the lane's words, then the word of its half-word, if the layout has one."""
        count = self.order.head_dim * self.format.bits
        old = Registers(-(-count // 32))
        for first, index in self._accesses(at):
            load_words(old, first, self.cache, index.place, index.count, "global")
        if count % 32:
            load_words(old, count // 32, self.cache, self._half_words(at), 1, "global")
        return old

    def wide_codes(
        self, at: Sequence[Expr], half: Expr, group: int, words: Sequence[Expr], written: Callable[[Expr], Expr] | None
    ) -> None:
        """Store the four words of 16-bit codes of one group of half tile ``half``."""
        number = group + half * self.order.blocks if self.order.role == "k" else group * 2 + half
        index = [*at, self.first_code + number * (4 * WARP) + self.order.lane * 4]
        masks: Sequence[Expr | None] = [None] * 4
        if written is not None:
            masks = [self._wide_mask(half, group, word, written) for word in range(4)]
        self._store(index, words, masks)

    def gains(
        self, at: Sequence[Expr], half: Expr, row: int, gains: Sequence[Expr], written: Callable[[Expr], Expr] | None
    ) -> None:
        """Store gain number ``row`` of the slots of half tile ``half``: float16 bits (uint32), known to all sharers."""
        order, lane = self.order, self.order.lane
        pairs = [[half * 16 + order.token(slot) for slot in range(order.slots)]]
        if order.role == "k":
            others = [shuffle_xor(gain, 4) for gain in gains]
            words = [scalar(gain | other << u32(16)) for gain, other in zip(gains, others, strict=True)]
            low = [half * 16 + 8 * slot + lane // 4 for slot in range(2)]
            pairs, place, chosen = [[token, token + 1] for token in low], lane // 8 * 4, lane % 8 == 0
        else:
            words = [scalar(gains[2 * a] | gains[2 * a + 1] << u32(16)) for a in range(2)]
            pairs, place, chosen = [pairs[0][:2], pairs[0][2:]], lane * 4, lane < 4
        masks: list[Expr | None] = [None, None]
        if written is not None:
            masks = [_pair_mask(*pair, written) for pair in pairs]
        with T.If(chosen), T.Then():
            index = [*at, self.first_gain + row * (TOKENS // 2) + place + half * 2]
            self._store(index, words, masks)

    def own_gain(
        self, at: Sequence[Expr], half: Expr, gain: Expr, written: Callable[[Expr], Expr] | None
    ) -> None:
        """Store the only gain of the half tile's tokens: float16 bits (uint32), that of the lane's own slot."""
        order, lane = self.order, self.order.lane
        g, t = lane // 4, lane % 4
        if order.role == "k":  # tokens g and g + 1, of the same slot
            mask, slot, place, chosen = 4, t // 2, lane // 8 * 4, tir.all(g % 2 == 0, t % 2 == 0)
            low = half * 16 + 8 * slot + g
        else:  # tokens 2t and 2t + 1
            mask, slot, place, chosen = 8, lane // 16, t * 4, lane % 16 < 4
            low = half * 16 + 8 * slot + 2 * t
        word = scalar(gain | shuffle_xor(gain, mask) << u32(16))
        masks = [None if written is None else _pair_mask(low, low + 1, written)]
        with T.If(chosen), T.Then():
            self._store([*at, self.first_gain + place + half * 2 + slot], [word], masks)

    def _masks(self, half: int, written: Callable[[Expr], Expr]) -> list[Expr]:
        """The groups of a half tile with all bits of the written tokens' codes set."""
        order, bits = self.order, self.format.bits
        flags = [written(half * 16 + order.token(slot)) for slot in range(order.slots)]
        ones = [Registers(1) for _ in range(order.slots)]
        for cell, flag in zip(ones, flags, strict=True):
            cell[0] = tir.Select(flag, u32((1 << bits) - 1), u32(0))
        halves = []
        for number in range(2 * order.blocks):
            _, r = order.place(number)
            parts = [ones[order.slot(a, r, u)][0] << u32((8 if bits == 8 else 4) * (2 * a + u)) for a, u in _ELEMENTS]
            halves.append(scalar(parts[0] | parts[1] | parts[2] | parts[3]))
        if bits == 8:
            return halves
        return [scalar(low | high << u32(16)) for low, high in zip(halves[::2], halves[1::2], strict=True)]

    def _wide_mask(self, half: Expr, group: int, word: int, written: Callable[[Expr], Expr]) -> Expr:
        _, r = self.order.place(2 * group + word // 2)
        tokens = [half * 16 + self.order.token(self.order.slot(word % 2, r, u)) for u in range(2)]
        return _pair_mask(*tokens, written)

    def _store(
        self,
        index: Sequence[Expr],
        words: Sequence[Expr],
        masks: Sequence[Expr | None],
        old: Sequence[Expr] | None = None,
    ) -> None:
        if masks[0] is not None:
            if old is None:
                read = Registers(len(words))
                load_words(read, 0, self.cache, index, len(words), "global")
                old = list(read)
            words = [lop3(mask, *pair, SELECT) for mask, *pair in zip(masks, words, old, strict=True)]
        store_words(self.cache, index, words)

    def _store_half_words(
        self, index: Sequence[Expr], value: Expr, mask: Expr | None, old: Sequence[Expr] | None
    ) -> None:
        word = scalar(value | shuffle_xor(value, 1) << u32(16))
        whole = None if mask is None else scalar(mask | shuffle_xor(mask, 1) << u32(16))
        with T.If(self.order.lane % 2 == 0), T.Then():
            self._store(index, [word], [whole], old)


@dataclass(frozen=True)
class _Access:
    """``count`` neighbouring words of a cache."""

    place: list[Expr]
    count: int


_ELEMENTS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _pair_mask(low: Expr, high: Expr, written: Callable[[Expr], Expr]) -> Expr:
    """The bits of a word's two 16-bit halves whose tokens are written."""
    return scalar(tir.Select(written(low), u32(0xFFFF), u32(0)) | tir.Select(written(high), u32(0xFFFF0000), u32(0)))
