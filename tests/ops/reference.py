"""What the operators must compute, in float64 NumPy, and how far rounding may move it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from rotquant_tvm.formats import (
    GAIN_RULES,
    LINEAR_BLOCK,
    TOKENS,
    Codec,
    EncodedKV,
    KVFormat,
    TileLayout,
    sanitize,
)
from rotquant_tvm.formats.gains import half_gain

BOUNDARY_ROUNDING = 4e-6
"""Codes may differ where R x/ρ lies this near a boundary: float32 sums of up to 256 products."""

SINGLE_TINY = 1e-15
"""Norms below this have squares that float32 cannot hold; their fp16 gain is 0 all the same."""


@cache
def codec_of(text: str, head_dim: int, seed: int = 0) -> Codec:
    """The codec of a spelling; the same object each time, so that kernels built from it are shared."""
    return KVFormat.parse(text).codec(head_dim, seed)


@cache
def codecs_of(pair: str, head_dim: int) -> tuple[Codec, Codec]:
    """The K and V codec of a pair's spelling, with different rotations."""
    k, v = (KVFormat.parse(word) for word in (pair.split("/") * 2)[:2])  # a pair may hold formats for search
    return codec_of(k.name, head_dim, 1), codec_of(v.name, head_dim, 2)


def coefficients(rotation) -> np.ndarray:
    """``Rotation.data`` as kernels take it: never empty."""
    return rotation.data if rotation.data.size else np.zeros(1, np.float32)


def check_encoding(codec: Codec, x: np.ndarray, encoded: EncodedKV, ties: bool = False) -> None:
    """Assert that x [..., d] was encoded as the format defines, up to float32 rounding.

    Few codes may differ from the exact ones, unless x is made of ``ties``: values on boundaries.
    """
    values = sanitize(x)
    assert encoded.codes.shape == values.shape
    if codec.format.codebook == "sketched":
        _check_sketched(codec, values, encoded, ties)
    elif codec.format.codebook == "trellis":
        _check_trellis(codec, values, encoded, ties)
    elif codec.codebook is not None:
        _check_lloyd(codec, values, encoded, ties)
    elif codec.format.codebook == "linear":
        check = _check_linear if codec.format.bits == 8 else _check_nibbles
        check(values, encoded)
    else:
        normal = (np.abs(values) >= 2.0**-126) | (values == 0)  # a GPU flushes float32's subnormals
        np.testing.assert_array_equal(encoded.codes[normal], codec.encode(values).codes[normal])
        assert np.abs(codec.decode(encoded)[~normal]).max(initial=0) < 2.0**-125


def _check_lloyd(codec: Codec, values: np.ndarray, encoded: EncodedKV, ties: bool) -> None:
    norm = np.sqrt((values * values).sum(-1))
    gain, codes = encoded.gain[..., 0], encoded.codes
    assert (codes <= _largest_codes(codec)).all()
    assert (gain[norm < SINGLE_TINY] == 0).all()
    assert (codes[norm == 0] == codec.codebook.middle()).all()
    seen = norm >= SINGLE_TINY
    values, norm, gain, codes = values[seen], norm[seen], gain[seen], codes[seen]
    rotated = codec.rotation.apply(values)
    exact = codec.codebook.nearest(rotated, norm[:, None])
    gap = np.abs(rotated[..., None] / norm[:, None, None] - _boundaries(codec)).min(-1)
    differs = codes != exact
    assert (gap[differs] < BOUNDARY_ROUNDING).all()
    assert (np.abs(codes.astype(int) - exact)[differs] == 1).all()
    assert ties or differs.sum() <= max(2, 5e-4 * differs.size)
    centroids = codec.codebook.decode(codes)
    check_half(gain, np.clip(GAIN_RULES[codec.format.gain](norm, rotated, centroids), 0, 65504))


def _largest_codes(codec: Codec) -> np.ndarray:
    """uint8 [d]."""
    plane = codec.format.plane_dims(codec.head_dim)
    return 2 ** (codec.format.bits + (np.arange(codec.head_dim) < plane)) - 1


def _boundaries(codec: Codec) -> np.ndarray:
    """The boundaries of each dimension's codes: float32 [d, n], filled up with Inf."""
    if codec.format.codebook != "split":
        return np.tile(codec.codebook.boundaries, (codec.head_dim, 1))
    wide, narrow = (book.boundaries for book in (codec.codebook.wide, codec.codebook.narrow))
    narrow = np.pad(narrow, (0, len(wide) - len(narrow)), constant_values=np.inf)
    return np.repeat([wide, narrow], codec.head_dim // 2, axis=0)


def _check_sketched(codec: Codec, values: np.ndarray, encoded: EncodedKV, ties: bool) -> None:
    """The code as of a format without a sketch; the signs and the norm as of the residual that this code leaves."""
    bits = codec.format.bits
    low = EncodedKV(encoded.codes & (2**bits - 1), encoded.gain[..., :1])
    first = replace(codec, format=replace(codec.format, codebook="lloyd"), sketch=None)
    _check_lloyd(first, values, low, ties)
    size = np.sqrt((values * values).sum(-1))
    seen = (size >= SINGLE_TINY) & (low.gain[..., 0] < 65504)
    residual = (first.rotation.apply(values) - first.decode_rotated(low))[seen]
    norm = np.sqrt((residual * residual).sum(-1))
    assert (encoded.gain[size == 0] == 0).all()
    difference = np.abs(encoded.gain[seen, 1] - np.minimum(norm, 65504))
    assert (difference <= 1e-3 * norm + 1e-5 * size[seen] + 6e-8).all()
    sketched = codec.sketch.apply(residual)
    differs = (encoded.codes[seen] >> bits) != (sketched > 0)
    assert (np.abs(sketched[differs]) <= 1e-5 * np.broadcast_to(size[seen, None], differs.shape)[differs]).all()
    assert ties or differs.sum() <= max(2, 2e-3 * differs.size)


def _check_trellis(codec: Codec, values: np.ndarray, encoded: EncodedKV, ties: bool) -> None:
    """Paths may differ where float32 sums make another one as good, seldom also where they move the ring's closing.

    At head dimension 32 the search for the closing goes around the ring four times, and paths that differ by turns tie.
    """
    norm = np.sqrt((values * values).sum(-1))
    gain, codes = encoded.gain[..., 0], encoded.codes
    assert codes.max(initial=0) < 2**codec.format.bits
    assert (gain[norm < SINGLE_TINY] == 0).all()
    assert (codes[norm == 0] == 2 ** (codec.format.bits - 1)).all()
    seen = norm >= SINGLE_TINY
    values, norm, gain, codes = values[seen], norm[seen], gain[seen], codes[seen]
    rotated = codec.rotation.apply(values)
    unit = rotated / norm[:, None]
    centroids = codec.codebook.decode(codes)
    error, least = (((unit - v) ** 2).sum(-1) for v in (centroids, codec.codebook.decode(codec.encode(values).codes)))
    assert (error <= 1.5 * least + 1e-4).all()
    worse = error > least + 4 * BOUNDARY_ROUNDING
    assert ties or worse.sum() <= max(1, (0.03 if codec.head_dim == 32 else 0.01) * worse.size)
    check_half(gain, np.clip(GAIN_RULES[codec.format.gain](norm, rotated, centroids), 0, 65504))


def _check_linear(values: np.ndarray, encoded: EncodedKV) -> None:
    head_dim, blocks = values.shape[-1], encoded.gain.shape[-1]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, blocks * LINEAR_BLOCK - head_dim)])
    check_half(encoded.gain, np.abs(padded).reshape(*values.shape[:-1], blocks, LINEAR_BLOCK).max(-1) / 127)
    scale = np.repeat(encoded.gain.astype(np.float64), LINEAR_BLOCK, axis=-1)[..., :head_dim]
    codes = encoded.codes.view(np.int8)
    assert (codes[scale == 0] == 0).all()
    ratio = np.clip(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0), -127, 127)
    assert (np.abs(codes - ratio) < 0.5 + 1e-4).all()


def _check_nibbles(values: np.ndarray, encoded: EncodedKV) -> None:
    exact = KVFormat.parse("q4_0").codec(values.shape[-1]).encode(values)
    small = np.abs(exact.gain.astype(np.float64)) < 1e-6  # where float32 and float64 may round a scale apart
    blocks = np.where(small, np.abs(encoded.gain.astype(np.float64) - exact.gain) < 1.3e-7, encoded.gain == exact.gain)
    assert blocks.all()
    scale = np.repeat(encoded.gain.astype(np.float64), LINEAR_BLOCK, axis=-1)[..., : values.shape[-1]]
    assert encoded.codes.max(initial=0) < 16 and (encoded.codes[scale == 0] == 8).all()
    ratio = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
    assert (np.abs(encoded.codes - np.clip(ratio + 8, 0, 15)) < 0.5 + 1e-4)[np.abs(ratio) < 7.5].all()
    assert (np.abs(encoded.codes - np.clip(np.floor(ratio + 8.5), 0, 15)) <= 1).all()


def check_half(actual: np.ndarray, exact: np.ndarray) -> None:
    """Assert float16 values to be the rounding of float64 ones that float32 may have moved a little."""
    assert actual.dtype == np.float16 and np.isfinite(actual).all()
    with np.errstate(over="ignore"):
        step = np.spacing(half_gain(exact)).astype(np.float64)
    assert (np.abs(actual.astype(np.float64) - exact) <= 0.5 * step + 1e-5 * exact).all()


def random_words(rng: np.random.Generator, layout: TileLayout, shape: tuple[int, ...]) -> np.ndarray:
    """Tiles of random bits, stale gains of NaN and Inf included: uint32 [*shape, tile_bytes/4]."""
    return rng.integers(0, 2**32, (*shape, layout.tile_bytes // 4), dtype=np.uint32)


def unpack_words(layout: TileLayout, words: np.ndarray) -> tuple[EncodedKV, EncodedKV]:
    """A cache uint32 [b, h, tiles, words] as encoded K and V [b, h, 32·tiles, …]."""

    def flat(array: np.ndarray) -> np.ndarray:
        batch, heads, tiles = array.shape[:3]
        return array.reshape(batch, heads, tiles * TOKENS, array.shape[-1])

    parts = layout.unpack(np.ascontiguousarray(words).view(np.uint8))
    k, v = (EncodedKV(flat(part.codes), flat(part.gain)) for part in parts)
    return k, v


def pack_words(layout: TileLayout, k: EncodedKV, v: EncodedKV) -> np.ndarray:
    """Undo ``unpack_words``."""

    def tiles(array: np.ndarray) -> np.ndarray:
        batch, heads, tokens = array.shape[:3]
        shape = (batch, heads, tokens // TOKENS, TOKENS, array.shape[-1])
        return np.ascontiguousarray(array).reshape(shape)

    parts = (EncodedKV(tiles(part.codes), tiles(part.gain)) for part in (k, v))
    return np.ascontiguousarray(layout.pack(*parts)).view(np.uint32)


def layout_of(codecs: tuple[Codec, Codec]) -> TileLayout:
    """The tile layout of a K and a V codec."""
    return TileLayout(codecs[0].format, codecs[1].format, codecs[0].head_dim)


def filled_cache(rng, codecs, kv_heads: int, tiles: int, lengths: np.ndarray) -> np.ndarray:
    """A cache whose sequences hold ``lengths`` random tokens, over random bits everywhere else."""
    layout = layout_of(codecs)
    stale = unpack_words(layout, random_words(rng, layout, (len(lengths), kv_heads, tiles)))
    for old, codec in zip(stale, codecs, strict=True):
        x = rng.standard_normal((len(lengths), kv_heads, 32 * tiles, codec.head_dim))
        new = codec.encode(x * rng.lognormal(size=(*x.shape[:-1], 1)))
        for b, length in enumerate(lengths):
            old.codes[b, :, :length] = new.codes[b, :, :length]
            old.gain[b, :, :length] = new.gain[b, :, :length]
    return pack_words(layout, *stale)


def stored_kv(codecs, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a cache, rotated, float64 [b, h, 32·tiles, d]; garbage past the lengths."""
    encoded = unpack_words(layout_of(codecs), cache)
    with np.errstate(invalid="ignore"):
        k, v = (codec.decode_rotated(e) for codec, e in zip(codecs, encoded, strict=True))
    return k, v


def attention(q, k, v, scale: float, first=0, window: int | None = None, softcap: float | None = None) -> np.ndarray:
    """Causal attention of one sequence: q [s, heads, d] at positions first… over k, v [kv_heads, n, d].

    ``softcap``: scaled scores s become softcap · tanh(s / softcap).
    """
    group = q.shape[1] // k.shape[0]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=0) for x in (k, v))
    scores = np.einsum("shd,hnd->hsn", q.astype(np.float64), keys) * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    distance = first + np.arange(len(q))[:, None] - np.arange(k.shape[1])
    hidden = (distance < 0) | (distance >= (window or np.inf))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hsn,hnd->shd", weights, values)


def check_output(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert an attention output [..., d] to be the expected one, vector by vector, for its dtype."""
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected, axis=-1)
    limit = 3e-5 if actual.dtype == np.float32 else 2e-3
    assert (error <= limit * size + 1e-6).all(), (error / (size + 1e-6)).max()
