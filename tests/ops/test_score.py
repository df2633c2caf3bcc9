"""Score, query features and encode_tiles against the NumPy reference, on packed vectors over random bits."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.formats import EncodedKV, KeyLayout
from rotquant_tvm.ops.score import ScoreShape, feature_count

from .reference import check_encoding, codec_of

CODECS = [
    ("f16", 64),
    ("q8_0", 80),
    ("q4_0", 96),
    ("rotor1:ip", 80),
    ("hurwitz3:ip", 128),
    ("turbo4:norm", 256),
    ("turbo2.5", 64),
    ("turbo3+qjl", 64),
    ("dense2+qjl", 80),
    ("qjl1", 128),
]


def check_scores(actual, expected, codec, q, encoded):
    """Float32 sums over the features: the error is relative to the sizes of query and vector."""
    size = np.linalg.norm(codec.query_features(q), axis=1)[:, None] * np.linalg.norm(codec.features(encoded), axis=1)
    assert actual.shape == expected.shape and (np.abs(actual - expected) <= 2e-6 * size + 1e-30).all()


def packed(codec, rng, tiles):
    """Random vectors of various lengths in tiles, uint32, and what is stored of them."""
    x = rng.standard_normal((tiles, 32, codec.head_dim)) * rng.lognormal(size=(tiles, 32, 1))
    encoded = codec.encode(x)
    words = KeyLayout(codec.format, codec.head_dim).pack(encoded).view(np.uint32)
    flat = EncodedKV(*(part.reshape(tiles * 32, part.shape[-1]) for part in (encoded.codes, encoded.gain)))
    return words, flat


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
@pytest.mark.parametrize(("queries", "tiles"), [(1, 1), (5, 3)])
def test_scores_are_the_formats_inner_products(kernels, rng, poisoned, text, head_dim, queries, tiles):
    codec = codec_of(text, head_dim)
    words, encoded = packed(codec, rng, tiles)
    q = rng.standard_normal((queries, head_dim))
    features = codec.query_features(q).astype(np.float32)
    kernel = kernels.build(ops.score, codec)
    out = kernels.run(kernel, features, words, poisoned((queries, 32 * tiles), "float32"), writes=(-1,))
    check_scores(out, codec.score(q, encoded), codec, q, encoded)


@pytest.mark.parametrize(("text", "head_dim"), [("f16", 64), ("turbo3", 64), ("dense2+qjl", 80), ("qjl1", 96)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_query_features(kernels, rng, poisoned, text, head_dim, dtype):
    codec = codec_of(text, head_dim)
    q = rng.standard_normal((3, head_dim)).astype(dtype)
    out = poisoned((3, feature_count(codec)), "float32")
    kernel = kernels.build(ops.query_features, codec, dtype)
    found = kernels.run(kernel, q, codec.coefficients, out, writes=(-1,))
    np.testing.assert_allclose(found, codec.query_features(q.astype(np.float64)), atol=2e-5)


@pytest.mark.parametrize(("text", "head_dim"), CODECS)
@pytest.mark.parametrize("count", [1, 32, 77])
def test_encode_tiles(kernels, rng, text, head_dim, count):
    codec = codec_of(text, head_dim)
    layout = KeyLayout(codec.format, head_dim)
    x = rng.standard_normal((count, head_dim)).astype(np.float32)
    stale = rng.integers(0, 2**32, (-(-count // 32), layout.tile_bytes // 4), dtype=np.uint32)
    kernel = kernels.build(ops.encode_tiles, codec, "float32")
    tiles = kernels.run(kernel, x, codec.coefficients, stale, writes=(-1,))
    now, was = layout.unpack(tiles.view(np.uint8)), layout.unpack(stale.view(np.uint8))
    parts = [part.reshape(len(part) * 32, part.shape[-1]) for part in (now.codes, now.gain, was.codes, was.gain)]
    check_encoding(codec, x, EncodedKV(parts[0][:count], parts[1][:count]))
    for new, old in zip(parts[:2], parts[2:], strict=True):
        np.testing.assert_array_equal(new[count:].view(np.uint8), old[count:].view(np.uint8))


def test_a_score_kernel_carries_its_shape():
    func = ops.score(codec_of("turbo3:ip", 64), ops.Axes("llvm"))
    shape = ScoreShape.of(func)
    assert shape == ScoreShape("turbo3:ip", 64) and shape.codec().format.gain == "ip"
    assert ScoreShape.of(ops.advance(ops.Axes("llvm"))) is None
