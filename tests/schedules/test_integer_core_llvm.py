"""Decode attention in integers against float64: CPUs, rows, head dims, block sizes, and what integers make hard."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.attention_decode_llvm import attention_decode_llvm

from rotquant_tvm.formats import EncodedKV, KVFormat, TileLayout
from rotquant_tvm.ops.site_shape import SiteShape

from .byte_targets import byte_target
from .test_attention_llvm import SCALE, Cache, attend, build, run

CASES = [
    # K/V, head_dim, group, splits, window, tiles of a block, CPU
    ("hurwitz3", 80, 7, 2, None, 2, "permutes"),
    ("hurwitz1/rotor4", 48, 16, 1, 70, 4, "permutes"),
    ("turbo2/rotor3", 128, 4, 3, None, 0, "whole"),
    ("hurwitz3", 64, 3, 2, 40, 2, "halves"),
    ("hurwitz3+tcq/turbo4", 64, 5, 2, None, 16, "permutes"),
]


@pytest.mark.parametrize(("pair", "head_dim", "group", "splits", "window", "tiles", "cpu"), CASES)
def test_decode(pair, head_dim, group, splits, window, tiles, cpu):
    target, lengths = byte_target(cpu), np.array([0, 1, 33, 256, 290], "int32")
    cache = Cache(pair, head_dim, len(lengths), 2, 10)
    kernel = _kernel(cache.shape(group, splits=splits, window=window), target, tiles)
    q = cache.rng.standard_normal((len(lengths), 1, 2 * group, head_dim)).astype("float32")
    out = run(kernel, q, q, cache.words, lengths)
    for b, length in enumerate(lengths):
        past = slice(max(0, length - window) if window else 0, length)
        for head in range(2 * group):
            if not length:
                assert not out[b, 0, head].any()
                continue
            expected = attend(q[b, 0, head], cache.k[b, head // group, past], cache.v[b, head // group, past])
            assert np.linalg.norm(out[b, 0, head] - expected) <= 5e-4 * np.linalg.norm(expected), (b, head)


def _kernel(shape: SiteShape, target, tiles: int = 0):
    return build(lambda shape, target: attention_decode_llvm(shape, target, tiles), shape, target)


@pytest.fixture(scope="module")
def small():
    """A kernel for hurwitz3 at head_dim 64 with two queries to one kv head."""
    shape = SiteShape("hurwitz3", "hurwitz3", 2, 1, 64, SCALE, None, "float32")
    return _kernel(shape, byte_target("permutes"), 16)


def test_queries_that_are_no_numbers(small):
    """They make NaN of their own output alone, and of nothing where there is nothing to attend to."""
    cache = Cache("hurwitz3", 64, 4, 1, 2)
    q, lengths = cache.rng.standard_normal((4, 1, 2, 64)).astype("float32"), np.array([40, 40, 40, 0], "int32")
    clean = run(small, q, q, cache.words, lengths)
    q[0, 0, 1, 5], q[1, 0, 0, 63], q[2, 0, 1], q[3] = np.nan, np.inf, -np.inf, np.nan
    out = run(small, q, q, cache.words, lengths)
    for place in ((0, 0, 1), (1, 0, 0), (2, 0, 1)):
        assert np.isnan(out[place]).all()
        out[place] = clean[place]
    np.testing.assert_array_equal(out, clean)


def test_queries_of_any_magnitude(small):
    cache = Cache("hurwitz3", 64, 3, 1, 2)
    q, lengths = cache.rng.standard_normal((3, 1, 2, 64)).astype("float32"), np.full(3, 50, "int32")
    q[0], q[1, 0, 0, 7] = 0, 300.0
    q[2] *= 1e-20
    out = run(small, q, q, cache.words, lengths)
    for b in range(3):
        for head in range(2):
            expected = attend(q[b, 0, head], cache.k[b, 0, :50], cache.v[b, 0, :50])
            # One large element makes steps of 300 / 32500 for all of its query.
            assert np.linalg.norm(out[b, 0, head] - expected) <= 2e-2 * np.linalg.norm(expected)
            assert b == 1 or np.linalg.norm(out[b, 0, head] - expected) <= 5e-4 * np.linalg.norm(expected)


def test_many_small_weights_beside_a_large_one(small):
    """Five hundred tokens with 2^-16.5 of the largest weight each keep their share; to the nearest they had none."""
    fmt = KVFormat.parse("hurwitz3")
    codec, layout = fmt.codec(64), TileLayout(fmt, fmt, 64)
    codes = np.zeros((1, 1, 16, 32, 64), np.uint8)
    codes[..., 32:] = 7
    gains = [np.full((1, 1, 16, 32, 1), gain, np.float16) for gain in (0.5, 60)]
    gains[0][0, 0, 0, 0] = 1  # the first token's score is twice the others'
    encoded = [EncodedKV(codes, gain) for gain in gains]
    k, v = (codec.decode_rotated(part).reshape(512, 64) for part in encoded)
    query = k[0] / np.linalg.norm(k[0]) ** 2 * (2 * 16.5 * np.log(2) / SCALE)
    q = np.tile(query, (1, 1, 2, 1)).astype("float32")
    words = np.ascontiguousarray(layout.pack(*encoded)).view("uint32")
    out = run(small, q, q, words, np.array([512], "int32"))
    expected = attend(q[0, 0, 0], k, v)
    np.testing.assert_allclose(expected, v[0])  # all values are alike, so a share that is lost is length lost
    assert np.linalg.norm(out[0, 0, 0] - expected) <= 1e-3 * np.linalg.norm(expected)
