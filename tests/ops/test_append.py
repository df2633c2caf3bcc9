"""Append against the packed reference: what it writes, and that it writes nothing else."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotquant_tvm import ops
from rotquant_tvm.formats import EncodedKV

from .cases import CASES, MIXED, SKETCHES, Case
from .reference import check_encoding, layout_of, pack_words, random_words, unpack_words

TILES = 3
# (tokens before, new tokens) of each sequence: tile boundaries, nothing new, one long beside short ones
RAGGED = [(0, 0), (0, 1), (0, 31), (0, 32), (0, 33), (31, 1), (31, 2), (32, 40), (5, 20), (63, 33)]
RAGGED += [(40, 0), (27, 40)]


def append(kernels, case, cache, k, v, before, new):
    """Run ``append``; returns the cache after it."""
    kernel = kernels.build(ops.append, *case.codecs, case.kv_heads, str(k.dtype))
    rotations = [codec.coefficients for codec in case.codecs]
    before, new = (np.asarray(x, np.int32) for x in (before, new))
    return kernels.run(kernel, cache, k, v, *rotations, before + new, new, writes=(0,))


def random_step(rng, case, new, dtype="float32"):
    """(cache of random bits, k, v) for rows of up to max(new) tokens; the padding is NaN."""
    cache = random_words(rng, layout_of(case.codecs), (len(new), case.kv_heads, TILES))
    shape = (len(new), case.kv_heads, max(1, max(new)), case.head_dim)
    k, v = (rng.standard_normal(shape) * rng.lognormal(size=(*shape[:-1], 1)) for _ in "kv")
    for x in (k, v):
        for b, count in enumerate(new):
            x[b, :, count:] = np.nan
    return cache, k.astype(dtype), v.astype(dtype)


def check_append(case, old, after, sources, before, new, ties=False):
    """Assert that the new tokens were encoded and that no other bit changed."""
    layout = layout_of(case.codecs)
    was, now = unpack_words(layout, old), unpack_words(layout, after)
    for codec, x, written, kept in zip(case.codecs, sources, now, was, strict=True):
        rows, encoded = [], []
        for b, (start, count) in enumerate(zip(before, new, strict=True)):
            count = max(0, min(count, 32 * TILES - start))
            token = slice(start, start + count)
            rows.append(_vectors(x[b, :, :count]))
            encoded.append([_vectors(part[b, :, token]) for part in (written.codes, written.gain)])
            written.codes[b, :, token] = kept.codes[b, :, token]
            written.gain[b, :, token] = kept.gain[b, :, token]
        codes, gain = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
        check_encoding(codec, np.concatenate(rows), EncodedKV(codes, gain), ties)
    np.testing.assert_array_equal(pack_words(layout, *now), old)


def _vectors(x):
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2]).copy()


@pytest.mark.parametrize("case", CASES + SKETCHES, ids=str)
def test_new_tokens_are_encoded_and_nothing_else_changes(kernels, rng, case):
    before, new = zip(*RAGGED, strict=True)
    cache, k, v = random_step(rng, case, new)
    after = append(kernels, case, cache, k, v, before, new)
    check_append(case, cache, after, (k, v), before, new)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_lengths(kernels, data, seed):
    counts = st.tuples(st.integers(0, 32 * TILES), st.integers(0, 100))
    before, new = zip(*data.draw(st.lists(counts, min_size=1, max_size=4)), strict=True)
    cache, k, v = random_step(np.random.default_rng(seed), MIXED, new)
    check_append(MIXED, cache, append(kernels, MIXED, cache, k, v, before, new), (k, v), before, new)


@pytest.mark.parametrize("case", [MIXED, CASES[4]], ids=str)
def test_tokens_past_the_capacity_are_dropped(kernels, rng, case):
    before, new = [90, 96, 64, 0], [10, 5, 33, 100]
    cache, k, v = random_step(rng, case, new)
    after = append(kernels, case, cache, k, v, before, new)
    check_append(case, cache, after, (k, v), before, new)


@pytest.mark.parametrize("case", [MIXED, CASES[3]], ids=str)
def test_token_by_token_is_the_same_as_all_at_once(kernels, rng, case):
    cache, k, v = random_step(rng, case, [37, 37])
    before = np.array([20, 31])
    whole = append(kernels, case, cache, k, v, before, [37, 37])
    steps = cache
    for i in range(37):
        steps = append(kernels, case, steps, k[:, :, i : i + 1], v[:, :, i : i + 1], before + i, [1, 1])
    np.testing.assert_array_equal(steps, whole)


def test_codes_of_tokens_taken_back_are_overwritten(kernels, rng):
    """A crop leaves stale codes in the open tile; the next append must clear their bits."""
    cache, k, v = random_step(rng, MIXED, [50])
    stale = append(kernels, MIXED, cache, -3 * k[:, :, ::-1], -3 * v[:, :, ::-1], [0], [50])
    fresh = append(kernels, MIXED, cache, k, v, [0], [50])
    np.testing.assert_array_equal(append(kernels, MIXED, stale, k, v, [0], [50]), fresh)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[1], CASES[6]], ids=str)
def test_awkward_vectors(kernels, rng, case):
    """Zero, NaN, infinite, huge and tiny vectors have the formats' defined results and spoil no neighbour."""
    cache, k, v = random_step(rng, case, [34])
    for x in (k, v):
        x[0, :, 1], x[0, :, 2], x[0, :, 3], x[0, :, 4] = 0, np.nan, np.inf, -np.inf
        x[0, :, 5], x[0, :, 6], x[0, :, 7] = 3e38, 1e-30, 1e-42
        x[0, :, 8, 3], x[0, :, 9, ::2] = np.nan, -np.inf
    after = append(kernels, case, cache, k, v, [30], [34])
    check_append(case, cache, after, (k, v), [30], [34], ties=True)


@pytest.mark.parametrize("case", [CASES[0], Case("q8_0/iso3-full", 96, 6, 3)], ids=str)
def test_half_precision_source(kernels, rng, case):
    before, new = [30, 0], [35, 3]
    cache, k, v = random_step(rng, case, new, "float16")
    after = append(kernels, case, cache, k, v, before, new)
    check_append(case, cache, after, (k, v), before, new)


def test_offsets_beyond_32_bits(kernels, rng):
    """A cache of 9 GB, of which only the last tiles are touched."""
    case, tiles = CASES[1], 600_000
    layout = layout_of(case.codecs)
    words = layout.tile_bytes // 4
    if psutil.virtual_memory().total < 16 * 2**30 and kernels.kind == "llvm":
        pytest.skip("needs 10 GB of address space")
    shape = (1, case.kv_heads, tiles, words)
    assert np.prod(shape, dtype=np.int64) > 2**31
    cache = tvm.runtime.empty(shape, "uint32", kernels.device)
    _, k, v = random_step(rng, case, [3])
    start = 32 * tiles - 3
    arrays = [k, v, *(c.coefficients for c in case.codecs)]
    lengths = [np.array([start + 3], np.int32), np.array([3], np.int32)]
    kernel = kernels.build(ops.append, *case.codecs, case.kv_heads, "float32")
    kernel(cache, *(kernels.tensor(x) for x in (*arrays, *lengths)))
    last = [_tile(cache, (head + 1) * tiles - 1, words) for head in range(case.kv_heads)]
    now = unpack_words(layout, np.stack(last)[None, :, None])
    for codec, x, encoded in zip(case.codecs, (k, v), now, strict=True):
        codes, gain = (_vectors(part[0, :, 29:]) for part in (encoded.codes, encoded.gain))
        check_encoding(codec, _vectors(x[0]), EncodedKV(codes, gain))


def _tile(cache, index, words):
    """Tile number ``index`` of a cache, over all its heads."""
    return cache._create_view((words,), relative_byte_offset=4 * words * index).numpy()
