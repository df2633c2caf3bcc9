"""Packed tiles of any bytes: they decode to vectors of the right shape, the same each time, and pack to the same bytes.

A format's codes may be any bits; gains may be any float16. So decoded values are finite where the gains are.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from rotquant_tvm.errors import UsageError
from rotquant_tvm.formats import EncodedKV, KeyLayout, TileLayout, known_formats
from rotquant_tvm.formats.centre import centre_words, decode_centre

from .fuzzing import forms, fuzz

FORMATS = sorted({found.name: found for found in known_formats().values()}.values(), key=lambda found: found.name)
DIMS = (32, 48, 64, 80, 128, 256)
CODECS: dict = {}


def codec_of(found, head_dim):
    """A codec, drawn once."""
    key = found.name, head_dim
    if key not in CODECS:
        CODECS[key] = found.codec(head_dim, 3)
    return CODECS[key]


def takes(found, head_dim):
    """Whether a format takes a head dimension."""
    try:
        found.check(head_dim)
    except UsageError:
        return False
    return True


PAIRS = st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.sampled_from(DIMS)).filter(
    lambda pair: takes(pair[0], pair[2]) and takes(pair[1], pair[2])
)


@st.composite
def tiles(draw):
    """A layout, and bytes for one of its tiles."""
    k, v, head_dim = draw(PAIRS)
    layout = TileLayout(k, v, head_dim)
    size = layout.tile_bytes
    content = np.frombuffer(draw(st.binary(min_size=64, max_size=96)) * (size // 64 + 1), np.uint8)[:size].copy()
    for _ in range(draw(st.integers(0, 3))):
        first, value = draw(st.integers(0, size - 1)), draw(st.sampled_from((0, 0xFF, 0x7C, 0x7F, 0x80)))
        content[first : first + draw(st.integers(1, 200))] = value
    return layout, content


@forms(40, 8_000)
def test_any_bytes_decode(examples):
    def check(case):
        layout, content = case
        encoded = layout.unpack(content)
        np.testing.assert_array_equal(layout.pack(*encoded), content)
        for found, part in zip((layout.k, layout.v), encoded, strict=True):
            codec = codec_of(found, layout.head_dim)
            with np.errstate(over="ignore", invalid="ignore"):
                decoded = codec.decode_rotated(part)
                again = codec.decode_rotated(part)
            assert decoded.shape == (32, layout.head_dim) and decoded.dtype == np.float64
            np.testing.assert_array_equal(decoded, again)
            finite = np.isfinite(part.gain).all(-1)
            if found.bits < 16:
                assert np.isfinite(decoded[finite]).all()
                assert np.abs(decoded[finite]).max(initial=0) <= 65504 * 128 * (1 if codec.sketch is None else 17)

    fuzz("packed tiles", tiles(), check, examples)


@forms(25, 4_000)
def test_tiles_of_another_size_are_refused(examples):
    def check(case):
        (layout, content), size, dtype = case
        shape = (*content.shape[:-1], size)
        other = np.resize(content, shape).astype(dtype)
        if size == layout.tile_bytes and other.dtype == np.uint8:
            return
        with pytest.raises(UsageError):
            layout.unpack(other)

    sizes = st.tuples(tiles(), st.integers(0, 4000), st.sampled_from(("uint8", "int8", "uint32", "float32", "bool")))
    fuzz("tiles of another size", sizes, check, examples)


@forms(25, 4_000)
def test_codes_that_are_not_a_formats_are_refused(examples):
    def check(case):
        found, head_dim, codes, gain = case
        layout = KeyLayout(found, head_dim)
        try:
            packed = layout.pack(EncodedKV(codes, gain))
        except UsageError:
            return
        assert packed.shape == (*codes.shape[:-2], layout.tile_bytes)
        back = layout.unpack(packed)
        np.testing.assert_array_equal(back.codes, codes)
        np.testing.assert_array_equal(back.gain.view(np.uint16), gain.view(np.uint16))

    @st.composite
    def encodings(draw):
        found, _, head_dim = draw(PAIRS)
        lead = draw(st.lists(st.integers(0, 2), max_size=2))
        rows, columns = (draw(st.sampled_from((right, right, right, 1, 33))) for right in (32, head_dim))
        gains = draw(st.sampled_from((found.gains_per_vector(head_dim),) * 3 + (0, 1, 5)))
        right = "uint16" if found.bits == 16 else "uint8"
        dtype = draw(st.sampled_from((right, right, right, "uint8", "uint16", "int64", "float32")))
        most = draw(st.sampled_from((1, 2 ** min(found.bits, 8) - 1, 255)))
        numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
        codes = numbers.integers(0, most, (*lead, rows, columns), endpoint=True).astype(dtype)
        return (
            found,
            head_dim,
            codes,
            numbers.integers(0, 2**16, (*lead, rows, gains), dtype=np.uint16).view(np.float16),
        )

    fuzz("codes to pack", encodings(), check, examples)


@forms(25, 4_000)
def test_any_vectors_are_encoded(examples):
    """Bits of any float: what comes back is finite, and zero for zero."""

    def check(case):
        (found, _, head_dim), content, dtype = case
        codec = codec_of(found, head_dim)
        size = 2 * head_dim * np.dtype(dtype).itemsize
        x = np.frombuffer((content * size)[:size], dtype).reshape(2, head_dim)
        encoded = codec.encode(x)
        assert encoded.codes.shape == x.shape and np.isfinite(encoded.gain).all()
        decoded = codec.decode(encoded)
        assert np.isfinite(decoded).all()
        zero = codec.encode(np.zeros((1, head_dim)))
        assert (codec.decode(zero) == 0).all()

    floats = st.tuples(PAIRS, st.binary(min_size=8, max_size=64), st.sampled_from(("float16", "float32", "float64")))
    fuzz("vectors of any bits", floats, check, examples)


@forms(20, 2_000)
def test_any_centres_decode(examples):
    def check(case):
        head_dim, content = case
        words = centre_words(head_dim)
        with np.errstate(over="ignore", invalid="ignore"):
            decoded = decode_centre(np.resize(np.frombuffer(content, np.uint32), (2, words)))
        assert decoded.shape == (2, head_dim)

    fuzz(
        "centres",
        st.tuples(st.sampled_from(DIMS), st.binary(min_size=16, max_size=64).map(lambda b: b[:16])),
        check,
        examples,
    )
