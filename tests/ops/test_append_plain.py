"""Append to the 16-bit segments: which slot each new token enters, and which are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import sanitize

KV_HEADS, HEAD_DIM, WORDS = 3, 48, 5
POLICIES = [
    CachePolicy(sinks=4),
    CachePolicy(recent=7),
    CachePolicy(sinks=3, recent=2, center=32),
    CachePolicy(sinks=40, recent=5, center=32, defer=9),
]


def expected(policy, plain, new, packed, lengths, counts):
    """Token by token: into a sink, or into its slot of the ring unless it is in a tile already."""
    result = plain.copy()
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for row in range(count):
            place = length - count + row
            number = place - policy.sinks
            if number >= 0 and (not policy.ring or number < packed[b]):
                continue
            slot = place if number < 0 else policy.sinks + number % policy.ring
            for role, x in enumerate(new):
                result[b, :, role, slot] = sanitize(x[b, :, row], np.float32).astype(np.float16)
    return result


def run(kernels, rng, policy, new, lengths, counts, dtype="float32"):
    """(what the kernel leaves, what it should) over slots full of random numbers."""
    lengths, counts = np.asarray(lengths, np.int32), np.asarray(counts, np.int32)
    batch = len(lengths)
    packed = policy.packed_after(np.zeros(batch, np.int32), lengths, True)
    if not policy.ring:
        packed = np.maximum(lengths - policy.sinks, 0).astype(np.int32)
    plain = rng.standard_normal((batch, KV_HEADS, 2, policy.slots, HEAD_DIM)).astype(np.float16)
    tiles = rng.integers(0, 2**32, (batch, KV_HEADS, 2, WORDS), dtype=np.uint32)
    kernel = kernels.build(ops.append_plain, KV_HEADS, HEAD_DIM, WORDS, dtype, policy)
    after = kernels.run(kernel, plain, *new, packed, lengths, counts, tiles, writes=(0,))
    return after, expected(policy, plain, new, packed, lengths, counts)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("seq", [1, 29, 150])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_token_enters_its_slot(kernels, rng, policy, seq, dtype):
    """Ragged rows, padded with NaN, that begin anywhere."""
    counts = np.array([seq, 0, (seq + 1) // 2, min(seq, 2)])
    lengths = counts + np.array([0, 37, 61, policy.sinks])
    new = [rng.standard_normal((4, KV_HEADS, seq, HEAD_DIM)).astype(dtype) for _ in range(2)]
    for x in new:
        for b, count in enumerate(counts):
            x[b, :, count:] = np.nan
    found, wanted = run(kernels, rng, policy, new, lengths, counts, dtype)
    np.testing.assert_array_equal(found, wanted)


def test_values_are_stored_as_16_bit_formats_store_them(kernels, rng):
    """NaN as 0, what is too large as the largest fp16."""
    new = [np.zeros((1, KV_HEADS, 1, HEAD_DIM), np.float32) for _ in range(2)]
    new[0][..., :5] = [np.nan, np.inf, -np.inf, 1e6, 65519.0]
    found, wanted = run(kernels, rng, CachePolicy(sinks=2, recent=3), new, [4], [1])
    np.testing.assert_array_equal(found, wanted)
    assert found[0, 0, 0, 2 + 1, :5].tolist() == [0.0, 65504.0, -65504.0, 65504.0, 65504.0]
