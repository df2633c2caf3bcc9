"""Trellis codes of a packed tile as int8 operands of the tensor cores, on CUDA.

Two neighbouring dims' values come by one lookup (``trellis_tables_cuda``). Four windows are worked out at once, as the
bytes of two words: ``far`` bytes are bits 8 … 15 of a table address, and ``near`` bytes bits 0 … 7, the lane's copy
among them, so that one byte permute makes an address. The permute repeats the sign of the far byte above it: addresses
go from −32768 to 32767 around the middle of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir

from rotquant_tvm.formats import Codec

from .code_fragments_cuda import CodeFragments
from .cuda_ops import Registers, prmt, ptx, scalar, shuffle, shuffle_xor, u32
from .trellis_tables_cuda import LANE_BITS, TrellisTables

Expr = Any


class Windows:
    """Windows of pairs of dims, four at a time, and their values; what is common to tiles is worked out once."""

    def __init__(self, codec: Codec, tables: TrellisTables, lane: Expr) -> None:
        self.codec, self.lane, self.bits = codec, lane, codec.format.bits
        self.middle = tables.middle(self.bits)
        copy = u32(0)
        for source, target in enumerate(LANE_BITS[self.bits]):
            copy = copy | (u32(lane) >> u32(source) & u32(1)) << u32(target)
        self.copy = scalar(copy * u32(0x01010101))

    def values(self, codes: Expr, before: Expr, further: Expr | None = None) -> list[Expr]:
        """The values (16 bits, the first dim's the lower) of the pairs of dims whose codes are the bytes of a word.

        A byte is the first dim's code, the second one's from bit 4 on; ``before`` are the bytes of the pairs before
        these. ``further``: at 2 bits, the second code of the pairs before those, from bit 6 on. Bits that do not
        belong to a code may be anything; at 4 bits only the second codes of ``before`` matter.
        """
        far, near = self._addresses(codes, before, further)
        found = []
        for k in range(4):
            cell = Registers(1)
            address = prmt(near, far, u32(k | 4 + k << 4 | 12 + k << 8 | 12 + k << 12))
            ptx("ld.shared.u16", cell[0], self.middle + address)
            found.append(cell[0])
        return found

    def _addresses(self, codes: Expr, before: Expr, further: Expr | None) -> tuple[Expr, Expr]:
        if self.bits == 3:
            far = _mixed(codes, before << u32(2), 0x77777777)
            near = before << u32(1) & u32(0xA2A2A2A2) | self.copy
        elif self.bits == 2:
            far = _mixed(codes, before << u32(2), 0x33333333)
            near = further & u32(0x80808080) | self.copy | further >> u32(5) & u32(0x02020202)
        else:
            far = codes
            near = before & u32(0xE0E0E0E0) | self.copy | before >> u32(3) & u32(0x02020202)
        return scalar(far), scalar(near)


def _mixed(a: Expr, b: Expr, mask: int) -> Expr:
    """Bits of a where the mask has ones, of b elsewhere."""
    return a & u32(mask) | b & u32(0xFFFFFFFF ^ mask)


def _joined(low: Expr, high: Expr) -> Expr:
    """Two values of 16 bits as a word."""
    cell = Registers(1)
    ptx("mad.lo.u32", cell[0], high, u32(65536), low)
    return cell[0]


def gathered(places: Sequence[tuple[Expr, int]]) -> Expr:
    """A word of up to four bytes, each of a word (the same object if the same word) at a place in it."""
    words: list[Expr] = []
    for word, _ in places:
        if not any(word is known for known in words):
            words.append(word)
    if len(words) > 2:
        last = next(n for n, (word, _) in enumerate(places) if word is words[2])
        part = gathered(places[:last])
        return gathered([*((part, n) for n in range(last)), *places[last:]])
    selector = 0
    for n, (word, byte) in enumerate(places):
        selector |= (byte + (4 if word is not words[0] else 0)) << 4 * n
    return prmt(words[0], words[-1], u32(selector))


class _Nibbles(CodeFragments):
    """The codes of a lane's groups in the nibbles of a word each; bits above a code may be anything."""

    def __init__(self, words: Registers, bits: int, head_dim: int) -> None:
        self.words, self.bits, self.groups = words, bits, head_dim // 8
        self._nibbles: dict[int, Expr] = {}

    def group(self, number: int) -> Expr:
        """Group ``number``: of its eight codes, the halves' one after the other."""
        if number not in self._nibbles:
            self._nibbles[number] = scalar(self._group(number))
        return self._nibbles[number]

    def _group(self, number: int) -> Expr:
        word = self.words
        if self.bits == 2:
            return word[number >> 1] >> u32(2 * (number & 1))
        if self.bits == 3:
            quad, place = divmod(number, 4)
            plain = quad < self.groups // 4 and place < 3
            return word[3 * quad + place] if plain else self._selectors(number)
        # Bit 3 of the codes stands apart: at bit 7 of the bytes of the first half's, at bit 3 of the second's.
        low = word[number]
        raised = scalar(low << u32(4))
        even, odd = prmt(low, raised, u32(0x6420)), prmt(low, raised, u32(0x7531))
        return _mixed(_mixed(even >> u32(4), low, 0x08080808), odd, 0x7F7F7F7F)


class TrellisKeys(Windows):
    """Keys: half i·d/16 + h of a lane (g, t) is dims 16h + 4t … of token 8i + g, two pairs; before them is lane t−1's.

    The last two codes of every half are handed on, those of four halves at once.
    """

    def __init__(self, codec: Codec, tables: TrellisTables, lane: Expr) -> None:
        super().__init__(codec, tables, lane)
        self.blocks = codec.head_dim // 16
        self.before = scalar(lane // 4 * 4 + (lane + 3) % 4)
        self.turns: dict[int, Expr] = {}
        for last in {self._count(chunk) - 1 for chunk in range(self._chunks())}:
            self.turns[last] = scalar(tir.Select(lane % 4 == 0, u32(0x2104 + last), u32(0x3210)))

    def _chunks(self) -> int:
        return -(-self.blocks // 4)

    def _count(self, chunk: int) -> int:
        return min(4, self.blocks - 4 * chunk)

    def fragments(self, words: Registers) -> Any:
        """``half(number)`` -> the four values (int8, one register) of half ``number`` of a tile's words."""
        return _KeyFragments(self, words)


class _KeyFragments:
    def __init__(self, keys: TrellisKeys, words: Registers) -> None:
        self.keys, self.bits = keys, keys.bits
        self.nibbles = _Nibbles(words, keys.bits, keys.codec.head_dim)
        self._ends: dict[int, Expr] = {}
        self._handed: dict[tuple[int, int], Expr] = {}
        self._before: dict[tuple[int, int], Expr] = {}
        self._earlier: dict[tuple[int, int], Expr] = {}
        self._found: dict[int, tuple[Expr, Expr]] = {}

    def half(self, number: int) -> Expr:
        """See ``TrellisKeys.fragments``."""
        group = number // 2
        if group not in self._found:
            self._found[group] = self._look_up(group)
        return self._found[group][number % 2]

    def _look_up(self, group: int) -> tuple[Expr, Expr]:
        codes = self.nibbles.group(group)
        ends = [self._end_before(2 * group + half) for half in range(2)]
        before = gathered([ends[0], (codes, 0), ends[1], (codes, 2)])
        further = None
        if self.bits == 2:
            raised = [self._end_before(2 * group + half, raised=True) for half in range(2)]
            further = gathered([ends[0], raised[0], ends[1], raised[1]])
        found = self.keys.values(codes, before, further)
        return _joined(found[0], found[1]), _joined(found[2], found[3])

    def _end_before(self, half: int, raised: bool = False) -> tuple[Expr, int]:
        """Where the end of what precedes a half stands: (word, byte)."""
        octet, block = divmod(half, self.keys.blocks)
        known = self._earlier if raised else self._before
        key = octet, block // 4
        if key not in known:
            known[key] = scalar(self._chunk_before(*key) << u32(2)) if raised else self._turned(*key)
        return known[key], block % 4

    def _chunk_before(self, octet: int, chunk: int) -> Expr:
        return self._end_before(octet * self.keys.blocks + 4 * chunk)[0]

    def _turned(self, octet: int, chunk: int) -> Expr:
        """The ends before the halves of a chunk: the lane before's, and for lane t = 0 one half further back."""
        keys, previous = self.keys, (chunk - 1) % self.keys._chunks()
        return prmt(self._hand_on(octet, chunk), self._hand_on(octet, previous), keys.turns[keys._count(previous) - 1])

    def _hand_on(self, octet: int, chunk: int) -> Expr:
        key = octet, chunk
        if key not in self._handed:
            first = octet * self.keys.blocks + 4 * chunk
            halves = range(first, first + self.keys._count(chunk))
            word = gathered([(self._end(half // 2), 1 + 2 * (half % 2)) for half in halves])
            self._handed[key] = shuffle(word, self.keys.before)
        return self._handed[key]

    def _end(self, group: int) -> Expr:
        """Bytes 1 and 3: the second pairs of both halves; at 2 bits with the first ones' codes above theirs."""
        codes = self.nibbles.group(group)
        if self.bits != 2:
            return codes
        if group not in self._ends:
            self._ends[group] = scalar(_mixed(codes, codes << u32(10), 0x33333333))
        return self._ends[group]


class TrellisValues(Windows):
    """Values: lane (g, t) has dims 16j + g and 16j + 8 + g of eight tokens; a pair of dims is two lanes'.

    These lanes share the work: the even one takes both dims of the first eight, the odd one those of the second, so
    rows g and g + 8 of the product are the dims ``place`` says.
    """

    def __init__(self, codec: Codec, tables: TrellisTables, lane: Expr) -> None:
        super().__init__(codec, tables, lane)
        self.blocks = codec.head_dim // 16
        self.odd = scalar((lane // 4 % 2).astype("int32"))
        self.keep = scalar(tir.Select(self.odd == 0, u32(0x5410), u32(0x7632)))
        self.send = scalar(tir.Select(self.odd == 0, u32(0x7632), u32(0x5410)))
        # The lane's place among the eight pairs of dims of a block, and the lanes one and two pairs back.
        self.pair = scalar(lane // 8 + 4 * self.odd)
        self.back = {back: self._lane_back(back) for back in ((1, 2) if self.bits == 2 else (1,))}

    def _lane_back(self, back: int) -> Expr:
        pair = scalar((self.pair + (8 - back)) % 8)
        return scalar((pair % 4 * 2 + pair // 4) * 4 + self.lane % 4)

    @staticmethod
    def place(lane: Expr, j: int, half: int) -> Expr:
        """The dim of the lane's row g (``half`` 0) or g + 8 of block j."""
        g = lane // 4
        return 16 * j + g % 2 * 8 + g // 2 * 2 + half

    def fragments(self, words: Registers) -> Any:
        """``half(4j + 2x + r)`` -> four tokens' values (int8, one register) of row g + 8r of block j."""
        return _ValueFragments(self, words)


class _ValueFragments:
    def __init__(self, values: TrellisValues, words: Registers) -> None:
        self.values, self.bits, self.blocks = values, values.bits, values.blocks
        self.nibbles = _Nibbles(words, values.bits, values.codec.head_dim)
        self._codes: dict[int, tuple[Expr, Expr]] = {}
        self._bytes: dict[int, tuple[Expr, Expr]] = {}
        self._found: dict[int, list[Expr]] = {}

    def half(self, number: int) -> Expr:
        """See ``TrellisValues.fragments``."""
        j = number // 4
        if j not in self._found:
            self._found[j] = self._look_up(j)
        return self._found[j][number % 4]

    def _pair(self, j: int) -> tuple[Expr, Expr]:
        """The codes of the pair's dims for eight tokens, in nibbles."""
        if j not in self._codes:
            low, high = (self.nibbles.group(2 * j + x) for x in range(2))
            own = prmt(low, high, self.values.keep)
            other = shuffle_xor(prmt(low, high, self.values.send), 4)
            even = self.values.odd == 0
            self._codes[j] = scalar(tir.Select(even, own, other)), scalar(tir.Select(even, other, own))
        return self._codes[j]

    def _pair_bytes(self, j: int) -> tuple[Expr, Expr]:
        """The same as bytes: of tokens e = 0, 2 (of both x), and 1, 3."""
        if j not in self._bytes:
            first, second = self._pair(j)
            even = _mixed(first, second << u32(4), 0x0F0F0F0F)
            odd = _mixed(first >> u32(4), second, 0x0F0F0F0F)
            self._bytes[j] = scalar(even), scalar(odd)
        return self._bytes[j]

    def _handed(self, j: int, back: int, word: Callable[[int], Expr]) -> Expr:
        """A word of the pair so many back; the last pairs of a block hand on to the next one."""
        late = self.values.pair >= 8 - back
        return shuffle(scalar(tir.Select(late, word((j - 1) % self.blocks), word(j))), self.values.back[back])

    def _look_up(self, j: int) -> list[Expr]:
        codes = self._pair_bytes(j)
        further: tuple[Expr | None, Expr | None] = (None, None)
        if self.bits == 4:
            second = self._handed(j, 1, lambda k: self._pair(k)[1])
            before = scalar(second << u32(4)), second
        else:
            before = tuple(self._handed(j, 1, lambda k, n=n: self._pair_bytes(k)[n]) for n in range(2))
        if self.bits == 2:
            second = self._handed(j, 2, lambda k: self._pair(k)[1])
            further = scalar(second << u32(6)), scalar(second << u32(2))
        even, odd = (self.values.values(codes[n], before[n], further[n]) for n in range(2))
        found = []
        for x in range(2):
            low, high = (_joined(even[2 * x + k], odd[2 * x + k]) for k in range(2))
            found += [prmt(low, high, u32(0x6420)), prmt(low, high, u32(0x7531))]
        return found
