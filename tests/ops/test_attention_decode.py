"""Decode attention against float64 softmax over the cache's own decoded keys and values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotquant_tvm import ops

from .cases import CASES, MIXED, Case
from .reference import attention, check_output, filled_cache, stored_kv

SCALE = 0.09
LENGTHS = np.array([0, 1, 31, 32, 33, 64, 65, 96, 127, 128], np.int32)


def decode(kernels, poisoned, case, q, cache, lengths, splits=3, **options):
    """Run ``attention_decode``."""
    arguments = (*case.codecs, case.heads, case.kv_heads, SCALE, str(q.dtype))
    kernel = kernels.build(ops.attention_decode, *arguments, splits=splits, **options)
    lengths = np.asarray(lengths, np.int32)
    return kernels.run(kernel, q, cache, lengths, poisoned(q.shape, q.dtype), writes=(3,))


def expected(case, q, cache, lengths, **options):
    """The same in float64."""
    keys, values = stored_kv(case.codecs, cache)
    out = np.zeros(q.shape)
    for b, n in enumerate(lengths):
        if n:
            out[b] = attention(q[b], keys[b, :, :n], values[b, :, :n], SCALE, first=n - 1, **options)
    return out


def queries(rng, case, batch, dtype="float32"):
    return rng.standard_normal((batch, 1, case.heads, case.head_dim)).astype(dtype)


def check(kernels, rng, poisoned, case, lengths, tiles=4, dtype="float32", **options):
    """Compare over a cache that holds random bits past the lengths."""
    cache = filled_cache(rng, case.codecs, case.kv_heads, tiles, lengths)
    q = queries(rng, case, len(lengths), dtype)
    actual = decode(kernels, poisoned, case, q, cache, lengths, **options)
    options.pop("splits", None)
    check_output(actual, expected(case, q, cache, lengths, **options))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_batches(kernels, rng, poisoned, case):
    check(kernels, rng, poisoned, case, LENGTHS)


@pytest.mark.parametrize(("splits", "case"), [(1, MIXED), (9, MIXED), (64, CASES[0])], ids=str)
def test_the_number_of_splits_does_not_matter(kernels, rng, poisoned, splits, case):
    """One; more than there are tiles; many more."""
    check(kernels, rng, poisoned, case, LENGTHS, splits=splits)


@pytest.mark.parametrize("window", [1, 7, 32, 40])
def test_sliding_windows(kernels, rng, poisoned, window):
    check(kernels, rng, poisoned, MIXED, LENGTHS, window=window)


@pytest.mark.parametrize(("case", "softcap", "window"), [(MIXED, 0.5, None), (CASES[0], 30.0, 33)], ids=str)
def test_soft_capped_scores(kernels, rng, poisoned, case, softcap, window):
    """A cap that nearly all scores exceed, and one that bends the largest a little."""
    check(kernels, rng, poisoned, case, LENGTHS, softcap=softcap, window=window)


def test_one_long_sequence_beside_short_ones(kernels, rng, poisoned):
    check(kernels, rng, poisoned, MIXED, np.array([1, 1000, 0, 3], np.int32), tiles=32)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 160), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_any_lengths(kernels, poisoned, lengths, seed):
    check(kernels, np.random.default_rng(seed), poisoned, MIXED, lengths, tiles=5)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_half_precision_queries(kernels, rng, poisoned, case):
    check(kernels, rng, poisoned, case, LENGTHS, dtype="float16")


def test_huge_scores(kernels, rng, poisoned):
    """One token far above or below all others: weights of 1 and 0, no overflow."""
    case = CASES[1]  # f16
    lengths = np.array([70, 70], np.int32)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 4, lengths)
    q = queries(rng, case, 2) * np.float32([[[[2e4]]], [[[-2e4]]]])
    actual = decode(kernels, poisoned, case, q, cache, lengths)
    keys, values = stored_kv(case.codecs, cache)
    for b in range(2):
        best = np.einsum("hd,hnd->hn", q[b, 0], keys[b, :, :70]).argmax(-1)
        check_output(actual[b, 0], values[b, np.arange(case.kv_heads), best])


def test_tokens_past_the_capacity_are_not_read(kernels, rng, poisoned):
    """Append has dropped them; sessions refuse them before."""
    lengths = np.array([64, 70, 100_000], np.int32)
    cache = filled_cache(rng, MIXED.codecs, MIXED.kv_heads, 2, np.minimum(lengths, 64))
    q = queries(rng, MIXED, 3)
    actual = decode(kernels, poisoned, MIXED, q, cache, lengths)
    check_output(actual, expected(MIXED, q, cache, [64, 64, 64]))


@pytest.mark.parametrize("case", [Case("rq3", 112, 6, 2), Case("iso3", 48, 2, 2)], ids=str)
def test_further_head_dims(kernels, rng, poisoned, case):
    check(kernels, rng, poisoned, case, LENGTHS)
