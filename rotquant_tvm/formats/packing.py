"""The packed tile, layout version 1: 32 tokens of one kv head, as the attention kernel's fragments want them.

A tile is its sections one after the other: K codes, V codes, K gains, V gains, K extra, V extra. Nothing is padded.
The extra sections are empty but for formats that have a plane of further bits (``KVFormat.plane_dims``: those of half
of the channels, or a sketch's signs): bit ``bits`` of the codes of the first so many dims, laid out as the codes
section of a 1-bit format of that head dimension.

**Codes.** A kernel's lane l in 0..31 (g = l>>2, t = l&3) holds d/8 groups G of 8 codes: halves hf in {0, 1}
of elements e in 0..3. With p = 2G+hf these are

    K: i = p // (d/16), h = p % (d/16)    token 8i+g                        dim 16h+4t+e
    V: j = G>>1, x = G&1                  token 16x + 8(e>>1) + 2t + (e&1)  dim 16j+8hf+g

and lie in 32-bit words of the lane, nibble n = 4hf+e (see ``_word_bits``). Words are stored in chunks of 4
(512 B, lane l at 16l), then one of 2 (256 B, at 8l), one of 1 (128 B, at 4l) and a half-word (64 B, at 2l) as
far as the word count needs them; little endian.

**Gains.** fp16 [gains_per_vector][32]; the gain of token 8i+2t+u stands at position 8t+2i+u.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import FormatError, UsageError
from .codec import EncodedKV
from .kv_format import KVFormat
from .sections import Section, sections_in_order

VERSION = 1
TOKENS = 32
"""Tokens per tile."""

Role = Literal["k", "v"]
IntArray = NDArray[np.int64]


def _word_bits(
    bits: int, groups: int, group: IntArray, half: IntArray, e: IntArray
) -> tuple[IntArray, IntArray]:
    """Return (word, bit in word), broadcasting to [..., bits], of the bits of a lane's (group, half, e).

    The half-word of a tail is the word after the last full one.
    """
    code_bit = np.arange(bits)
    group, nibble, e, half = (axis[..., None] for axis in (group, 4 * half + e, e, half))
    if bits == 16:
        return 4 * group + 2 * half + (e >> 1), 16 * (e & 1) + code_bit
    if bits == 8:
        return 2 * group + half, 8 * e + code_bit
    if bits == 4:
        # Bit 3 goes where one byte permute makes the select masks of a half's four elements.
        return group, np.where(code_bit < 3, 4 * nibble + code_bit, 4 * (2 * e + 1 - half) + 3)
    if bits == 2:
        return group >> 1, 4 * nibble + 2 * (group & 1) + code_bit
    if bits == 1:
        tail = (group >> 2) == groups // 4
        return group >> 2, np.where(tail, 8 * (group & 1) + nibble, 4 * nibble + (group & 3))
    # 3 bits: of four groups, three fill the low bits of a word's nibbles and the fourth the spare bits of all
    # three words; a tail of two groups is a word as at 2 bits and a half-word as at 1 bit.
    quad, r = group >> 2, group & 3
    word = 3 * quad + np.where(r < 3, r, code_bit)
    bit = 4 * nibble + np.where(r < 3, code_bit, 3)
    tail = quad == groups // 4
    tail_bit = np.where(code_bit < 2, 4 * nibble + 2 * (group & 1) + code_bit, 8 * (group & 1) + nibble)
    return np.where(tail, 3 * quad + (code_bit == 2), word), np.where(tail, tail_bit, bit)


def _lane_offset(bits: int, head_dim: int, word: IntArray, lane: IntArray) -> IntArray:
    """Return the byte offset in the section of the words (or, at the end, half-word) of the lanes."""
    full = head_dim * bits // 32  # words per lane; what is left over is half a word
    quads = full // 4 * 4
    pairs = quads + (full - quads) // 2 * 2
    in_quad = 512 * (word // 4) + 16 * lane + 4 * (word % 4)
    in_pair = 128 * quads + 8 * lane + 4 * (word % 2)
    single, half_word = 128 * pairs + 4 * lane, 128 * full + 2 * lane
    return np.select([word < quads, word < pairs, word < full], [in_quad, in_pair, single], half_word)


@lru_cache(maxsize=64)
def code_pieces(role: Role, bits: int, head_dim: int) -> NDArray[np.int32]:
    """Return int32 [32, d, bits]: where in its codes section each bit of each code is stored.

    Entry [token, dim, b] is 8·byte + bit within the byte, for bit b (0 is least) of that code.

    Raises ``FormatError`` for a bit width or head dimension that the layout does not have, and ``UsageError``
    for an unknown role.
    """
    if role not in ("k", "v"):
        raise UsageError(f"unknown role '{role}'; use 'k' or 'v'")
    if bits not in (1, 2, 3, 4, 8, 16) or head_dim < 16 or head_dim % 16:
        raise FormatError(
            f"no tile layout for {bits} bits at head_dim {head_dim}; "
            "it has 1, 2, 3, 4, 8 or 16 bits and multiples of 16"
        )
    groups = head_dim // 8
    lane, group, half, e = np.indices((32, groups, 2, 4))
    g, t = lane >> 2, lane & 3
    if role == "k":
        i, h = np.divmod(2 * group + half, head_dim // 16)
        token, dim = 8 * i + g, 16 * h + 4 * t + e
    else:
        token, dim = 16 * (group & 1) + 8 * (e >> 1) + 2 * t + (e & 1), 16 * (group >> 1) + 8 * half + g
    word, bit = _word_bits(bits, groups, group, half, e)
    pieces = np.empty((TOKENS, head_dim, bits), dtype=np.int32)
    pieces[token, dim] = 8 * _lane_offset(bits, head_dim, word, lane[..., None]) + bit
    pieces.setflags(write=False)
    return pieces


@lru_cache(maxsize=64)
def _storage_order(role: Role, bits: int, head_dim: int) -> tuple[IntArray, IntArray]:
    """Return the flat index of the code unit at each place of the section, and the place of each unit.

    The unit is one bit, or one byte for codes of 8 and 16 bits.
    """
    unit = 8 if bits >= 8 else 1
    places = code_pieces(role, bits, head_dim)[..., ::unit].reshape(-1).astype(np.int64) // unit
    return np.argsort(places), places


def pack_codes(codes: ArrayLike, role: Role, bits: int) -> NDArray[np.uint8]:
    """Pack codes [..., 32, d] (uint8; uint16 at 16 bits) into a codes section: uint8 [..., 4·d·bits]."""
    values = np.asarray(codes)
    order, _ = _storage_order(role, bits, values.shape[-1])
    flat = (*values.shape[:-2], order.size)
    if bits >= 8:
        return np.ascontiguousarray(values).view(np.uint8).reshape(flat)[..., order]
    unpacked = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(unpacked.reshape(flat)[..., order], axis=-1, bitorder="little")


def unpack_codes(section: ArrayLike, role: Role, bits: int, head_dim: int) -> NDArray[Any]:
    """Undo ``pack_codes``: uint8 [..., 4·d·bits] -> codes [..., 32, d] (uint8; uint16 at 16 bits)."""
    values = np.asarray(section, dtype=np.uint8)
    _, places = _storage_order(role, bits, head_dim)
    shape = (*values.shape[:-1], TOKENS, head_dim)
    if bits >= 8:
        codes = np.ascontiguousarray(values[..., places])
        return codes.view(np.uint16 if bits == 16 else np.uint8).reshape(shape)
    unpacked = np.unpackbits(values, axis=-1, bitorder="little")[..., places].reshape(*shape, bits)
    return np.packbits(unpacked, axis=-1, bitorder="little")[..., 0]


def gain_positions() -> IntArray:
    """Return int64 [32]: the position in its gains row of each token's gain."""
    token = np.arange(TOKENS)
    return 8 * (token // 2 % 4) + 2 * (token // 8) + token % 2


@dataclass(frozen=True)
class TileLayout:
    """The layout of the tiles of a K and a V format at a head dimension.

    Raises ``FormatError`` if a format cannot take the head dimension.
    """

    k: KVFormat
    v: KVFormat
    head_dim: int

    VERSION = VERSION
    TOKENS = TOKENS

    def __post_init__(self) -> None:
        self.k.check(self.head_dim)
        self.v.check(self.head_dim)

    @cached_property
    def sections(self) -> dict[str, Section]:
        """The sections by name, in storage order: k_codes, v_codes, k_gains, v_gains, k_extra, v_extra."""
        sizes = {
            "k_codes": 4 * self.head_dim * self.k.bits,
            "v_codes": 4 * self.head_dim * self.v.bits,
            "k_gains": 2 * TOKENS * self.k.gains_per_vector(self.head_dim),
            "v_gains": 2 * TOKENS * self.v.gains_per_vector(self.head_dim),
            "k_extra": 4 * self.k.plane_dims(self.head_dim),
            "v_extra": 4 * self.v.plane_dims(self.head_dim),
        }
        return sections_in_order(sizes)

    @property
    def tile_bytes(self) -> int:
        """Bytes per tile, a multiple of 64."""
        return sum(section.nbytes for section in self.sections.values())

    def pack(self, k: EncodedKV, v: EncodedKV) -> NDArray[np.uint8]:
        """Pack encoded K and V of shape [..., 32, d] into tiles: uint8 [..., tile_bytes].

        Raises ``UsageError`` for codes or gains of another shape or dtype, or a code beyond its bits.
        """
        if k.codes.shape[:-2] != v.codes.shape[:-2]:
            raise UsageError(
                f"K and V codes are {list(k.codes.shape)} and {list(v.codes.shape)}; they must agree"
            )
        roles = [(role, *check_encoded(e, f, self.head_dim), f) for role, e, f in self._roles(k, v)]
        parts = [pack_codes(low_bits(codes, f), role, f.bits) for role, codes, _, f in roles]
        parts += [pack_gains(gain) for _, _, gain, _ in roles]
        parts += [pack_plane(codes, role, f) for role, codes, _, f in roles]
        return np.concatenate(parts, axis=-1)

    def unpack(self, tiles: ArrayLike) -> tuple[EncodedKV, EncodedKV]:
        """Undo ``pack``: uint8 [..., tile_bytes] -> encoded K and V of shape [..., 32, d].

        Raises ``UsageError`` for tiles of another size or dtype.
        """
        values = np.asarray(tiles)
        if values.dtype != np.uint8 or values.ndim == 0 or values.shape[-1] != self.tile_bytes:
            raise UsageError(
                f"tiles are {values.dtype} {list(values.shape)}; {self.k.name}/{self.v.name} at head_dim "
                f"{self.head_dim} needs uint8 [..., {self.tile_bytes}]"
            )
        k = unpack_role(values, self.sections, "k", self.k, self.head_dim)
        return k, unpack_role(values, self.sections, "v", self.v, self.head_dim)

    def _roles(self, k: EncodedKV, v: EncodedKV) -> tuple[tuple[Role, EncodedKV, KVFormat], ...]:
        return ("k", k, self.k), ("v", v, self.v)


def check_encoded(
    encoded: EncodedKV, kv_format: KVFormat, head_dim: int
) -> tuple[NDArray[Any], NDArray[np.float16]]:
    """Return codes [..., 32, d] and gains [..., 32, g]; raises ``UsageError`` if they are not the format's."""
    dtype = np.uint16 if kv_format.bits == 16 else np.uint8
    codes = np.asarray(encoded.codes)
    if codes.dtype != dtype or codes.shape[-2:] != (TOKENS, head_dim):
        raise UsageError(
            f"{kv_format.name} codes are {codes.dtype} {list(codes.shape)}; "
            f"they must be {np.dtype(dtype)} [..., {TOKENS}, {head_dim}]"
        )
    plane = kv_format.plane_dims(head_dim)
    for part, bits in ((codes[..., :plane], kv_format.bits + 1), (codes[..., plane:], kv_format.bits)):
        if part.size and int(part.max()) >> bits:
            raise UsageError(f"{kv_format.name} codes reach {part.max()}; {bits} bits hold less")
    gain, count = np.asarray(encoded.gain), kv_format.gains_per_vector(head_dim)
    if gain.dtype != np.float16 or gain.shape != (*codes.shape[:-1], count):
        raise UsageError(
            f"{kv_format.name} gains are {gain.dtype} {list(gain.shape)}; "
            f"they must be float16 {[*codes.shape[:-1], count]}"
        )
    return codes, gain


def low_bits(codes: NDArray[Any], kv_format: KVFormat) -> NDArray[Any]:
    """Return the bits of codes that the codes section holds."""
    low: NDArray[Any] = codes & codes.dtype.type(2**kv_format.bits - 1)
    return low


def pack_plane(codes: NDArray[Any], role: Role, kv_format: KVFormat) -> NDArray[np.uint8]:
    """Pack the further bits of codes [..., 32, d] into an extra section: uint8 [..., 4·plane_dims]."""
    plane = kv_format.plane_dims(codes.shape[-1])
    if not plane:
        return np.empty((*codes.shape[:-2], 0), np.uint8)
    return pack_codes(np.ascontiguousarray(codes[..., :plane] >> kv_format.bits), role, 1)


def unpack_role(
    tiles: NDArray[np.uint8], sections: dict[str, Section], role: Role, kv_format: KVFormat, head_dim: int
) -> EncodedKV:
    """Return what the sections of one role in tiles [..., tile_bytes] hold."""

    def part(name: str) -> NDArray[np.uint8]:
        section = sections[f"{role}_{name}"]
        return tiles[..., section.offset : section.offset + section.nbytes]

    codes = unpack_codes(part("codes"), role, kv_format.bits, head_dim)
    plane = kv_format.plane_dims(head_dim)
    if plane:
        codes[..., :plane] |= unpack_codes(part("extra"), role, 1, plane) << kv_format.bits
    return EncodedKV(codes, _unpack_gains(part("gains"), kv_format.gains_per_vector(head_dim)))


def pack_gains(gain: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Pack float16 [..., 32, gains] into a gains section: uint8 [..., 64·gains]."""
    order = np.argsort(gain_positions())
    rows = np.ascontiguousarray(np.swapaxes(gain, -1, -2)[..., order], dtype="<f2")
    return rows.view(np.uint8).reshape(*gain.shape[:-2], gain.shape[-1] * 2 * TOKENS)


def _unpack_gains(section: NDArray[np.uint8], count: int) -> NDArray[np.float16]:
    """Undo ``pack_gains``: uint8 [..., 64·gains] -> float16 [..., 32, gains]."""
    rows = np.ascontiguousarray(section).view("<f2").reshape(*section.shape[:-1], count, TOKENS)
    return np.swapaxes(rows[..., gain_positions()], -1, -2)
