"""Prefill attention: a chunk over the packed past and its own 16- or 32-bit keys and values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotquant_tvm import ops
from rotquant_tvm.ops.rotation_matrices import rotation_arguments

from ..sampling import sampled
from .cases import CASES, MIXED
from .reference import attention, check_output, filled_cache, stored_kv

SCALE = 0.09
# (past, new) of each sequence
RAGGED = [(0, 0), (0, 1), (0, 33), (1, 32), (31, 2), (32, 31), (33, 33), (95, 1), (64, 0), (60, 20)]


def prefill(kernels, poisoned, case, q, k, v, cache, past, new, **options):
    """Run ``attention_prefill``."""
    arguments = (*case.codecs, case.heads, case.kv_heads, SCALE, str(q.dtype))
    kernel = kernels.build(ops.attention_prefill, *arguments, **options)
    past, new = (np.asarray(x, np.int32) for x in (past, new))
    return kernels.run(kernel, q, k, v, cache, past + new, new, poisoned(q.shape, q.dtype), writes=(6,))


def expected(case, q, k, v, cache, past, new, **options):
    """The same in float64; zero in the padding."""
    keys, values = stored_kv(case.codecs, cache)
    out = np.zeros(q.shape)
    for b, (p, n) in enumerate(zip(past, new, strict=True)):
        if n:
            whole = [np.concatenate([x[b, :, :p], y[b, :, :n]], 1) for x, y in ((keys, k), (values, v))]
            out[b, :n] = attention(q[b, :n], *whole, SCALE, first=p, **options)
    return out


def chunk(rng, case, new, dtype="float32"):
    """(q, k, v) of up to max(new) tokens; the padding is NaN."""
    batch, seq = len(new), max(1, max(new))
    q = rng.standard_normal((batch, seq, case.heads, case.head_dim))
    k, v = (rng.standard_normal((batch, case.kv_heads, seq, case.head_dim)) for _ in "kv")
    for b, count in enumerate(new):
        q[b, count:], k[b, :, count:], v[b, :, count:] = np.nan, np.nan, np.nan
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def check(kernels, rng, poisoned, case, steps, dtype="float32", **options):
    """Compare over a cache that holds random bits past the past."""
    past, new = zip(*steps, strict=True)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 4, past)
    q, k, v = chunk(rng, case, new, dtype)
    actual = prefill(kernels, poisoned, case, q, k, v, cache, past, new, **options)
    check_output(actual, expected(case, q, k, v, cache, past, new, **options))
    for b, count in enumerate(new):
        assert (actual[b, count:] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_chunks(kernels, rng, poisoned, case):
    check(kernels, rng, poisoned, case, RAGGED)


@pytest.mark.parametrize("window", [1, 7, 32, 40])
def test_sliding_windows(kernels, rng, poisoned, window):
    check(kernels, rng, poisoned, MIXED, RAGGED, window=window)


@pytest.mark.parametrize(("case", "softcap", "window"), [(MIXED, 0.5, None), (CASES[0], 30.0, 33)], ids=str)
def test_soft_capped_scores(kernels, rng, poisoned, case, softcap, window):
    check(kernels, rng, poisoned, case, RAGGED, softcap=softcap, window=window)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 40)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(kernels, poisoned, steps, seed):
    check(kernels, np.random.default_rng(seed), poisoned, MIXED, steps)


OWN_BASIS = [(MIXED, "float32", 40), (MIXED, "float32", None), (CASES[0], "float16", None)]


@pytest.mark.parametrize("choice", sampled(OWN_BASIS, OWN_BASIS[:1]), ids=str)
def test_operands_in_the_models_own_basis(kernels, rng, poisoned, choice):
    """The same attention, turned: what is rotated before and un-rotated after may as well be left alone."""
    case, dtype, window = choice
    past, new = zip(*RAGGED, strict=True)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 4, past)
    q, k, v = chunk(rng, case, new, dtype)
    key, value = (codec.rotation for codec in case.codecs)
    rotated = [r.apply(x.astype(np.float64)) for r, x in ((key, q), (key, k), (value, v))]
    wanted = value.inverse().apply(expected(case, *rotated, cache, past, new, window=window))
    past, new = (np.asarray(x, np.int32) for x in (past, new))
    matrices = rotation_arguments(case.codecs, (key, value), dtype)
    arguments = (*case.codecs, case.heads, case.kv_heads, SCALE, dtype)
    kernel = kernels.build(ops.attention_prefill, *arguments, window=window, rotated=True)
    arrays = (q, k, v, cache, past + new, new, *matrices, poisoned(q.shape, dtype))
    check_output(kernels.run(kernel, *arrays, writes=(-1,)), wanted)


def test_half_precision(kernels, rng, poisoned):
    check(kernels, rng, poisoned, CASES[0], RAGGED, dtype="float16")


def test_a_cache_that_already_holds_the_chunk_gives_the_same(kernels, rng, poisoned):
    past, new = zip(*RAGGED, strict=True)
    cache = filled_cache(rng, MIXED.codecs, MIXED.kv_heads, 4, past)
    later = filled_cache(rng, MIXED.codecs, MIXED.kv_heads, 4, np.add(past, new))
    tokens = np.arange(128).reshape(4, 32)
    for b, p in enumerate(past):  # the tile where they meet stays as it is before the chunk
        later[b, :, tokens[:, 0] < p] = cache[b, :, tokens[:, 0] < p]
    q, k, v = chunk(rng, MIXED, new)
    results = [prefill(kernels, poisoned, MIXED, q, k, v, c, past, new) for c in (cache, later)]
    np.testing.assert_array_equal(*results)


def test_a_chunk_without_past_is_plain_attention(kernels, rng, poisoned):
    case, new = CASES[0], [40, 17]
    q, k, v = chunk(rng, case, new)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 1, [0, 0])
    actual = prefill(kernels, poisoned, case, q, k, v, cache, [0, 0], new)
    for b, n in enumerate(new):
        check_output(actual[b, :n], attention(q[b, :n], k[b, :, :n], v[b, :, :n], SCALE))


def test_a_past_beyond_the_capacity_is_not_read(kernels, rng, poisoned):
    """Append has dropped those tokens; sessions refuse them before."""
    past, new = [64, 70, 100_000], [3, 3, 3]
    cache = filled_cache(rng, MIXED.codecs, MIXED.kv_heads, 2, [64, 64, 64])
    q, k, v = chunk(rng, MIXED, new)
    actual = prefill(kernels, poisoned, MIXED, q, k, v, cache, past, new)
    check_output(actual, expected(MIXED, q, k, v, cache, [64, 64, 64], new))
