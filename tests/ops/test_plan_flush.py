"""Plan a flush: tokens in tiles before and after a call, on the device as ``CachePolicy.packed_after`` says."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy

POLICIES = [
    CachePolicy(sinks=4),
    CachePolicy(recent=7),
    CachePolicy(sinks=3, recent=2, center=32),
    CachePolicy(center=96),
    CachePolicy(sinks=1, recent=5, center=64, defer=40),
    CachePolicy(defer=1),
]


def plan(kernels, policy, packed, lengths, chunk):
    """Tokens in tiles after a call, and before it as the kernel notes them."""
    kernel = kernels.build(ops.plan_flush, policy, chunk=chunk)
    packed, lengths = (np.asarray(x, np.int32) for x in (packed, lengths))
    return kernels.run(kernel, packed, lengths, np.full_like(packed, -7), writes=(0, 2))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("chunk", [True, False])
def test_host_and_device_plan_the_same(kernels, rng, policy, chunk):
    """Whatever state the sequences are in, also past a crop."""
    lengths = rng.integers(0, 400, 257).astype(np.int32)
    packed = np.maximum(lengths - policy.sinks - rng.integers(0, 150, 257), 0).astype(np.int32)
    after, before = plan(kernels, policy, packed, lengths, chunk)
    np.testing.assert_array_equal(before, packed)
    np.testing.assert_array_equal(after, policy.packed_after(packed, lengths, chunk))


def test_the_first_blocks_by_hand(kernels):
    """Sinks 3, recent 2, blocks of 32: a block leaves once 37 tokens are there."""
    policy = CachePolicy(sinks=3, recent=2, center=32)
    after, _ = plan(kernels, policy, [0, 0, 0, 32, 32, 40], [0, 36, 37, 68, 69, 50], False)
    assert after.tolist() == [0, 0, 32, 32, 64, 40]


def test_deferral_by_hand(kernels):
    """Sinks 1, ring 5 + 32 + 40: a prefill moves out what has no slot, in whole blocks; decode drains to 5 at least."""
    policy = CachePolicy(sinks=1, recent=5, center=32, defer=40)
    lengths = [78, 79, 110, 111, 60]
    assert plan(kernels, policy, [0] * 5, lengths, True)[0].tolist() == [0, 32, 32, 64, 0]
    assert plan(kernels, policy, [0] * 5, lengths, False)[0].tolist() == [64, 64, 96, 96, 32]
