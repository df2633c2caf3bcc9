"""Codes by steps and by a table: those of the codebook, up to the rounding of boundaries."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.code_lookup_cuda import CodeLookup

from rotquant_tvm.formats import Codebook, Codec, KVFormat, Rotation

from .vector_cases import encode, kernel, run, target_of


def unrotated(bits, head_dim, gain="raw"):
    """A codec without a rotation, whose codes are those of the vector's own elements."""
    return Codec(KVFormat("none", "none", "lloyd", bits, gain), Rotation(head_dim))


def near_boundaries(book, head_dim):
    """Unit vectors with elements just on either side of every boundary (the last element completes the norm)."""
    rows = []
    for boundary in book.boundaries.astype(float):
        for side in (-1, 1):
            row = np.zeros(head_dim)
            row[: head_dim // 2] = boundary + side * np.linspace(1e-5, 1e-3, head_dim // 2)
            row[-1] = np.sqrt(max(0, 1 - (row**2).sum()))
            rows.append(row / np.linalg.norm(row))
    return np.array(rows, np.float32)


@pytest.mark.parametrize("table", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_elements_beside_boundaries_get_their_codes(bits, table):
    book, codec = Codebook(bits, 64), unrotated(bits, 64)
    x = near_boundaries(book, 64)
    x *= np.geomspace(1e-6, 1e4, len(x), dtype=np.float32)[:, None]
    exact = codec.encode(x)
    found = encode(codec, x, {}, "simulated")
    zeros = x == 0  # beyond what rounding tells apart
    np.testing.assert_array_equal(found.codes[~zeros], exact.codes[~zeros])
    func = kernel("roundtrip", codec, "float32", {"table": table}, target_of(""))
    shaped = x.reshape(1, 1, *x.shape)
    y = run(func, "simulated", shaped, np.zeros(1, "f4"), np.zeros(1, "f4"), np.full_like(shaped, np.nan))[3][0, 0]
    expected = codec.decode(exact)
    np.testing.assert_allclose(y[~zeros], expected[~zeros], rtol=1e-5)


def test_elements_far_beyond_the_codebook_get_its_ends():
    codec = unrotated(4, 64)
    x = np.zeros((2, 64), np.float32)
    x[0, 5], x[1, 6] = 1, -1
    found = encode(codec, x, {}, "simulated")
    assert found.codes[0, 5] == 15 and found.codes[1, 6] == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_words_hold_the_code_and_the_grid_value(bits):
    lookup = CodeLookup(Codebook(bits, 128), codes=True, table=False)
    for code, value in enumerate(Codebook(bits, 128).grid):
        word = lookup._word(code)
        assert word & 0xFFFF == code
        assert np.uint16(word >> 16).view(np.float16) == value
