"""Attention over a cache with a policy, against float64 attention over what each token has become."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy

from ..sampling import sampled
from .cases import Case
from .reference import attention, check_output
from .segmented import SegmentedCache

SCALE, SOFTCAP = 0.07, 1.5
CASES = [
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=32, center=64)),
    (Case("iso4/planar2", 80, 8, 2), CachePolicy(sinks=5, center=32)),
    (Case("q8_0/hurwitz3", 96, 7, 1), CachePolicy(recent=9)),
    (Case("rotor3/f16", 80, 3, 3), CachePolicy(sinks=40)),
    (Case("turbo2", 128, 4, 2), CachePolicy(sinks=4, recent=3, center=96, defer=50)),
]
STEPS = ([70, 0, 3, 33], [130, 40, 1, 0], [1, 1, 1, 1], [64, 65, 1, 200])


def filled(kernels, rng, case, policy):
    """A cache of ragged sequences, one of them shorter than the sinks."""
    cache = SegmentedCache(kernels, rng, case, policy, 4, 600)
    for counts in STEPS:
        cache.append(cache.draw(max(counts)), counts)
    return cache


@pytest.mark.parametrize("window", sampled([None, 50], [50]))
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize(("case", "policy"), CASES, ids=str)
def test_decode(kernels, rng, poisoned, case, policy, splits, window):
    cache = filled(kernels, rng, case, policy)
    cache.append(cache.draw(1), np.ones(4), chunk=False)
    options = {"window": window, "softcap": SOFTCAP if splits == 1 else None}
    q = rng.standard_normal((4, 1, case.heads, case.head_dim)).astype(np.float32)
    kernel = kernels.build(
        ops.attention_decode,
        *(*case.codecs, case.heads, case.kv_heads, SCALE, "float32"),
        splits=splits,
        **options,
        policy=policy,
    )
    actual = kernels.run(kernel, q, *cache.arrays, cache.lengths, poisoned(q.shape, q.dtype), writes=(-1,))
    seen = cache.seen()
    expected = [
        attention(q[b], seen[b, 0, :, :n], seen[b, 1, :, :n], SCALE, first=n - 1, **options)
        for b, n in enumerate(cache.lengths)
    ]
    check_output(actual, np.stack(expected))


@pytest.mark.parametrize("window", sampled([None, 50], [50]))
@pytest.mark.parametrize(("case", "policy"), CASES, ids=str)
def test_prefill(kernels, rng, poisoned, case, policy, window):
    """The chunk's tokens see the past as it was before they came, and each other unquantized."""
    cache = filled(kernels, rng, case, policy)
    options = {"window": window, "softcap": SOFTCAP if window else None}
    counts, seq = np.array([40, 7, 0, 21], np.int32), 40
    new = cache.draw(seq)
    q = rng.standard_normal((4, seq, case.heads, case.head_dim)).astype(np.float32)
    kernel = kernels.build(
        ops.attention_prefill,
        *(*case.codecs, case.heads, case.kv_heads, SCALE, "float32"),
        **options,
        policy=policy,
    )
    total = cache.lengths + counts
    arguments = (q, *new, *cache.arrays, total, counts, poisoned(q.shape, q.dtype))
    actual = kernels.run(kernel, *arguments, writes=(-1,))
    seen, expected = cache.seen(), np.zeros(q.shape)
    for b, (past, count) in enumerate(zip(cache.lengths, counts, strict=True)):
        k, v = (
            np.concatenate([seen[b, role, :, :past], new[role][b, :, :count]], axis=1) for role in range(2)
        )
        if count:
            expected[b, :count] = attention(q[b, :count], k, v, SCALE, first=past, **options)
    check_output(actual, expected)


@pytest.mark.parametrize(("case", "policy"), CASES, ids=str)
def test_dequantize(kernels, rng, poisoned, case, policy):
    """All tokens in order, zero after the last."""
    cache = filled(kernels, rng, case, policy)
    kernel = kernels.build(ops.dequantize_segments, *case.codecs, case.kv_heads, policy)
    longest = policy.sinks + policy.ring + cache.cache.shape[2] * 32
    shape = (4, case.kv_heads, longest, case.head_dim)
    outputs = [poisoned(shape, np.float32) for _ in range(2)]
    actual = kernels.run(kernel, *cache.arrays, cache.lengths, *outputs, writes=(-2, -1))
    seen = cache.seen()
    for role in range(2):
        for b, n in enumerate(cache.lengths):
            np.testing.assert_allclose(actual[role][b, :, :n], seen[b, role, :, :n], rtol=1e-5, atol=1e-5)
            assert (actual[role][b, :, n:] == 0).all()
