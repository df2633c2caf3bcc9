import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.errors import FormatError, UsageError
from rotquant_tvm.formats import (
    HEAD_DIMS,
    EncodedKV,
    KVFormat,
    TileLayout,
    code_pieces,
    gain_positions,
    pack_codes,
    unpack_codes,
)

BITS = (1, 2, 3, 4, 8, 16)
ROLES = ("k", "v")


def random_codes(seed, bits, shape):
    dtype = np.uint16 if bits == 16 else np.uint8
    return np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(dtype)


def pattern(bits, head_dim):
    token, dim = np.indices((32, head_dim))
    return ((token * 4099 + dim * 257 + token * dim * 31) % (1 << bits)).astype(
        np.uint16 if bits == 16 else np.uint8
    )


def place(words, lane, group, half, e, code, bits, groups):
    """Layout version 1 in scalar form; the word "half" is the half-word of the tail."""

    def put(word, bit, value):
        words[lane, word] = words.get((lane, word), 0) | (int(value) << bit)

    n = 4 * half + e
    in_tail = bits in (1, 3) and groups % 4 == 2 and group >= groups - 2
    if bits == 16:
        put(4 * group + 2 * half + (e >> 1), 16 * (e & 1), code)
    elif bits == 8:
        put(2 * group + half, 8 * e, code)
    elif bits == 4:
        put(group, 4 * n, code & 7)
        put(group, 4 * (2 * e + 1 - half) + 3, code >> 3)
    elif bits == 3 and in_tail:
        put(3 * (group >> 2), 4 * n + 2 * (group & 1), code & 3)
        put("half", 8 * (group & 1) + n, code >> 2)
    elif bits == 3 and group % 4 < 3:
        put(3 * (group >> 2) + group % 4, 4 * n, code)
    elif bits == 3:
        for b in range(3):
            put(3 * (group >> 2) + b, 4 * n + 3, (code >> b) & 1)
    elif bits == 2:
        put(group >> 1, 4 * n + 2 * (group & 1), code)
    elif in_tail:
        put("half", 8 * (group & 1) + n, code)
    else:
        put(group >> 2, 4 * n + group % 4, code)


def scalar_pack(codes, role, bits):
    head_dim = codes.shape[1]
    groups, words = head_dim // 8, {}
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for group in range(groups):
            for half in range(2):
                for e in range(4):
                    p = 2 * group + half
                    if role == "k":
                        token, dim = 8 * (p // (head_dim // 16)) + g, 16 * (p % (head_dim // 16)) + 4 * t + e
                    else:
                        token = 16 * (group & 1) + 8 * (e >> 1) + 2 * t + (e & 1)
                        dim = 16 * (group >> 1) + 8 * half + g
                    place(words, lane, group, half, e, int(codes[token, dim]), bits, groups)
    out, word, count = b"", 0, head_dim * bits // 32
    for size in (4, 2, 1):
        while count - word >= size:
            for lane in range(32):
                out += struct.pack(f"<{size}I", *(words[lane, word + i] for i in range(size)))
            word += size
    if head_dim * bits % 32:
        out += b"".join(struct.pack("<H", words[lane, "half"]) for lane in range(32))
    return np.frombuffer(out, np.uint8)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 112, 128])
def test_the_section_is_the_scalar_form_of_the_layout(role, bits, head_dim):
    codes = random_codes(head_dim, bits, (32, head_dim))
    np.testing.assert_array_equal(pack_codes(codes, role, bits), scalar_pack(codes, role, bits))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_unpacking_undoes_packing_and_nothing_is_padded(role, bits, head_dim):
    codes = random_codes(bits, bits, (2, 32, head_dim))
    section = pack_codes(codes, role, bits)
    assert section.shape == (2, 4 * head_dim * bits) and section.dtype == np.uint8
    unpacked = unpack_codes(section, role, bits, head_dim)
    assert unpacked.dtype == codes.dtype
    np.testing.assert_array_equal(unpacked, codes)
    places = np.sort(code_pieces(role, bits, head_dim).ravel())
    np.testing.assert_array_equal(places, np.arange(32 * head_dim * bits))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("bits", "head_dim"), [(1, 48), (2, 48), (3, 48), (3, 64), (4, 48), (8, 32)])
def test_each_bit_of_the_section_is_one_bit_of_one_code(role, bits, head_dim):
    codes = random_codes(1, bits, (32, head_dim))
    section = pack_codes(codes, role, bits)
    size = 8 * section.size
    flips = np.packbits(np.eye(size, dtype=np.uint8), axis=-1, bitorder="little")
    changed = unpack_codes(section ^ flips, role, bits, head_dim) ^ codes
    flip, token, dim = np.nonzero(changed)
    np.testing.assert_array_equal(flip, np.arange(size))  # exactly one code per flipped bit
    bit = np.log2(changed[flip, token, dim])
    np.testing.assert_array_equal(code_pieces(role, bits, head_dim)[token, dim, bit.astype(int)], flip)


GOLDEN = {
    ("k", 1, 80): "80f836fc24fb1dfd",
    ("k", 1, 128): "8f6f2af6427871e7",
    ("k", 2, 80): "0c87a183abc0228a",
    ("k", 2, 128): "0133075c7dfee5ab",
    ("k", 3, 80): "38a2a810dbbc736d",
    ("k", 3, 128): "14b152f72e176709",
    ("k", 4, 80): "920396e999102d9e",
    ("k", 4, 128): "62a31b07aec494b0",
    ("k", 8, 80): "947aad166c5f8512",
    ("k", 8, 128): "8ec52ef39d2d2c4a",
    ("k", 16, 80): "363ff54137674f99",
    ("k", 16, 128): "971210921b08e82d",
    ("v", 1, 80): "80f836fc24fb1dfd",
    ("v", 1, 128): "8f6f2af6427871e7",
    ("v", 2, 80): "ca6fb2c2143da905",
    ("v", 2, 128): "012af25564e067b1",
    ("v", 3, 80): "b531144c6fe650f8",
    ("v", 3, 128): "a30692e991c15cd7",
    ("v", 4, 80): "4fd8de78088564eb",
    ("v", 4, 128): "34f2253c4c32bbd7",
    ("v", 8, 80): "ce984181ccde8750",
    ("v", 8, 128): "be653d1a9470ddcc",
    ("v", 16, 80): "f66bc1228e47e5e2",
    ("v", 16, 128): "4c4a09c0f997b656",
}


@pytest.mark.parametrize("key", GOLDEN)
def test_the_frozen_layout(key):
    """A change of these digests is a new layout version."""
    role, bits, head_dim = key
    section = pack_codes(pattern(bits, head_dim), role, bits)
    assert hashlib.sha256(section.tobytes()).hexdigest()[:16] == GOLDEN[key]


def test_the_frozen_tile():
    layout = TileLayout(KVFormat.parse("hurwitz3"), KVFormat.parse("q8_0"), 80)
    k_gain = np.arange(32, dtype=np.float16)[:, None]
    v_gain = np.arange(96, dtype=np.float16).reshape(32, 3)
    tile = layout.pack(EncodedKV(pattern(3, 80), k_gain), EncodedKV(pattern(8, 80), v_gain))
    assert hashlib.sha256(tile.tobytes()).hexdigest()[:16] == "46f6dd09ba1a6308"


def test_gain_positions():
    """The gain of token 8i+2t+u stands at 8t+2i+u."""
    positions = gain_positions()
    for i in range(4):
        for t in range(4):
            for u in range(2):
                assert positions[8 * i + 2 * t + u] == 8 * t + 2 * i + u


@pytest.mark.parametrize(
    "pair", [("hurwitz3", "hurwitz3"), ("iso3", "planar2"), ("q8_0", "iso3"), ("f16", "bf16")]
)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_sections_follow_each_other_and_count_every_bit(pair, head_dim):
    k, v = map(KVFormat.parse, pair)
    layout = TileLayout(k, v, head_dim)
    assert list(layout.sections) == ["k_codes", "v_codes", "k_gains", "v_gains", "k_extra", "v_extra"]
    offset = 0
    for section in layout.sections.values():
        assert section.offset == offset and section.nbytes % 64 == 0
        offset += section.nbytes
    assert layout.tile_bytes == offset
    assert 8 * offset == 32 * head_dim * (k.bits_per_element(head_dim) + v.bits_per_element(head_dim))
    assert (layout.VERSION, layout.TOKENS) == (1, 32)


def test_a_3_bit_tile_at_128_is_3200_bytes():
    assert TileLayout(KVFormat.parse("rq3"), KVFormat.parse("rq3"), 128).tile_bytes == 3200


@settings(max_examples=40, deadline=None)
@given(
    k=st.sampled_from(("f16", "bf16", "q8_0", "hurwitz1", "iso2", "rotor3", "dense4")),
    v=st.sampled_from(("f16", "bf16", "q8_0", "hurwitz1", "iso2", "rotor3", "dense4")),
    head_dim=st.sampled_from(HEAD_DIMS),
    batch=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
def test_tiles_hold_any_codes_and_gains(k, v, head_dim, batch, seed):
    layout = TileLayout(KVFormat.parse(k), KVFormat.parse(v), head_dim)
    encoded = []
    for kv_format in (layout.k, layout.v):
        codes = random_codes(seed, kv_format.bits, (*batch, 32, head_dim))
        gain_shape = (*batch, 32, kv_format.gains_per_vector(head_dim))
        encoded.append(EncodedKV(codes, random_codes(seed + 1, 16, gain_shape).view(np.float16)))
    tiles = layout.pack(*encoded)
    assert tiles.shape == (*batch, layout.tile_bytes) and tiles.dtype == np.uint8
    for found, expected in zip(layout.unpack(tiles), encoded, strict=True):
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.gain.view(np.uint16), expected.gain.view(np.uint16))


def test_a_token_can_be_found_in_its_tile():
    """What an append writes: one code and one gain, at the places that the layout names."""
    layout = TileLayout(KVFormat.parse("iso3"), KVFormat.parse("iso4"), 64)
    k = EncodedKV(random_codes(0, 3, (32, 64)), np.arange(32, dtype=np.float16)[:, None])
    v = EncodedKV(random_codes(1, 4, (32, 64)), np.arange(32, 64, dtype=np.float16)[:, None])
    tile = layout.pack(k, v)
    for role, encoded, bits in (("k", k, 3), ("v", v, 4)):
        start = 8 * layout.sections[f"{role}_codes"].offset
        stored = np.unpackbits(tile, bitorder="little")[start + code_pieces(role, bits, 64)[19, 37]]
        assert (stored << np.arange(bits)).sum() == encoded.codes[19, 37]
        at = layout.sections[f"{role}_gains"].offset + 2 * gain_positions()[19]
        assert tile[at : at + 2].view(np.float16)[0] == encoded.gain[19, 0]


def encoded_of(text, head_dim=64, batch=()):
    kv_format = KVFormat.parse(text)
    codes = random_codes(0, kv_format.bits, (*batch, 32, head_dim))
    return EncodedKV(codes, np.zeros((*batch, 32, kv_format.gains_per_vector(head_dim)), np.float16))


def test_refusals():
    good = encoded_of("iso3")
    layout = TileLayout(KVFormat.parse("iso3"), KVFormat.parse("iso3"), 64)
    for bad, message in [
        (EncodedKV(good.codes[:31], good.gain[:31]), r"codes are uint8 \[31, 64\].*\[\.\.\., 32, 64\]"),
        (EncodedKV(good.codes.astype(int), good.gain), "codes are int64"),
        (EncodedKV(good.codes + np.uint8(1), good.gain), "codes reach 8; 3 bits"),
        (EncodedKV(good.codes, good.gain[:, :0]), r"gains are float16 \[32, 0\].*\[32, 1\]"),
        (EncodedKV(good.codes, good.gain.astype(float)), "gains are float64"),
    ]:
        with pytest.raises(UsageError, match=message):
            layout.pack(bad, good)
        with pytest.raises(UsageError, match=message if bad.codes.ndim == 2 else None):
            layout.pack(good, bad)
    with pytest.raises(UsageError, match="they must agree"):
        layout.pack(good, encoded_of("iso3", batch=(2,)))
    with pytest.raises(UsageError, match=rf"tiles are uint8 \[7\].*{layout.tile_bytes}"):
        layout.unpack(np.zeros(7, np.uint8))
    with pytest.raises(UsageError, match="tiles are int64"):
        layout.unpack(np.zeros(layout.tile_bytes, int))
    with pytest.raises(FormatError, match="turbo3 cannot take head_dim 80"):
        TileLayout(KVFormat.parse("iso3"), KVFormat.parse("turbo3"), 80)
    with pytest.raises(FormatError, match="no tile layout for 5 bits at head_dim 64"):
        code_pieces("k", 5, 64)
    with pytest.raises(FormatError, match="head_dim 72"):
        code_pieces("k", 3, 72)
    with pytest.raises(UsageError, match="unknown role 'q'"):
        code_pieces("q", 3, 64)
