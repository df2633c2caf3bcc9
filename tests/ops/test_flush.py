"""Plan, flush and append to the 16-bit segments, against a record of what was appended."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import TOKENS
from rotquant_tvm.formats.centre import encode_centre

from .cases import Case
from .reference import check_encoding, layout_of, unpack_words
from .segmented import SegmentedCache

POLICIES = [
    CachePolicy(sinks=4),
    CachePolicy(recent=7),
    CachePolicy(sinks=3, recent=32, center=64),
    CachePolicy(center=32),
    CachePolicy(sinks=1, recent=5, center=32, defer=40),
]
CASE = Case("hurwitz3", 64, 9, 3)
OTHER = Case("iso4/planar2", 80, 8, 2)


def expected_packed(policy, lengths, before, chunk):
    """How many tokens must be in tiles."""
    block = policy.block
    if chunk and policy.defer:
        wanted = -(-np.maximum(lengths - policy.sinks - policy.ring, 0) // block) * block
    else:
        wanted = np.maximum(lengths - policy.sinks - policy.recent, 0) // block * block
    return np.maximum(before, wanted)


def check_state(cache: SegmentedCache, since: np.ndarray) -> None:
    """Every token is where the policy says; those that came into tiles after ``since`` are encoded as they should."""
    policy, sinks = cache.policy, cache.policy.sinks
    encoded = unpack_words(layout_of(cache.codecs), cache.cache)
    _, centres = cache.tiles()
    for b, length in enumerate(cache.lengths):
        packed = cache.packed[b]
        kept = [n for n in range(length) if n < sinks or n >= sinks + packed]
        slots = [n if n < sinks else sinks + (n - sinks) % policy.ring for n in kept]
        np.testing.assert_array_equal(
            cache.plain[b][:, :, slots].astype(np.float64), cache.history[b].swapaxes(0, 1)[:, :, kept]
        )
        for role, codec in enumerate(cache.codecs):
            fresh = slice(int(since[b]), int(packed))
            exact = cache.history[b, role, :, sinks : sinks + packed][:, fresh]
            if role == 0 and policy.center:
                exact = exact - centres[b, :, fresh]
            shape = (cache.case.kv_heads, -1)
            codes = encoded[role].codes[b].reshape(*shape, cache.case.head_dim)[:, fresh]
            gain = encoded[role].gain[b].reshape(*shape, encoded[role].gain.shape[-1])[:, fresh]
            check_encoding(codec, exact, type(encoded[role])(codes, gain))


def check_centres(cache: SegmentedCache) -> None:
    """The whole blocks' centres are their mean keys."""
    center, sinks = cache.policy.center, cache.policy.sinks
    for b, packed in enumerate(cache.packed):
        blocks = packed // center
        keys = cache.history[b, 0, :, sinks : sinks + blocks * center]
        means = keys.reshape(keys.shape[0], blocks, center, keys.shape[-1]).mean(2)
        if not blocks:
            continue
        words = encode_centre(means)
        stored = cache.centre[b, :, :blocks]
        np.testing.assert_allclose(stored[..., -1:].view(np.float32), words[..., -1:].view(np.float32), rtol=1e-5)
        difference = np.ascontiguousarray(stored[..., :-1]).view(np.int8).astype(int) - np.ascontiguousarray(
            words[..., :-1]
        ).view(np.int8)
        assert np.abs(difference).max(initial=0) <= 1 and (difference != 0).mean() < 0.01


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("case", [CASE, OTHER], ids=str)
def test_chunks_then_single_tokens(kernels, rng, case, policy):
    """Ragged chunks, shorter and longer than the ring, then tokens one by one across a flush.

    Values are rounded to 16 bits first, so that it does not matter which way a token came to its tile.
    """
    cache = SegmentedCache(kernels, rng, case, policy, 4, 400)
    for seq, counts in ((50, [50, 0, 17, 1]), (130, [130, 5, 0, 97]), (3, [3, 3, 2, 0])):
        new = [x.astype(np.float16).astype(np.float32) for x in cache.draw(seq)]
        before = cache.append(new, counts)
        np.testing.assert_array_equal(cache.packed, expected_packed(policy, cache.lengths, before, True))
        check_state(cache, before)
    for _ in range(70):
        new = [x.astype(np.float16).astype(np.float32) for x in cache.draw(1)]
        before = cache.append(new, [1, 1, 0, 1], chunk=False)
        np.testing.assert_array_equal(cache.packed, expected_packed(policy, cache.lengths, before, False))
    check_state(cache, before)
    check_state(cache, np.zeros_like(before))
    if policy.center:
        check_centres(cache)


class NewestUnseen:
    """Kernels of which flush is given NaN in the place of single new tokens."""

    def __init__(self, kernels):
        self.kernels, self.flushes = kernels, set()

    def build(self, operator, *arguments, **options):
        kernel = self.kernels.build(operator, *arguments, **options)
        if operator is ops.flush:
            self.flushes.add(kernel)
        return kernel

    def run(self, kernel, *arrays, writes):
        single = kernel in self.flushes and arrays[-5].shape[2] == 1
        hidden = [np.full_like(x, np.nan) for x in arrays[-6:-4]] if single else arrays[-6:-4]
        return self.kernels.run(kernel, *arrays[:-6], *hidden, *arrays[-4:], writes=writes)


def check_single_tokens(kernels, rng, case, policy, dtype="float32"):
    """Sequences of which the next token completes a block, and one after it; a flush needs neither to be there."""
    cache = SegmentedCache(NewestUnseen(kernels), rng, case, policy, 2, 140, dtype)
    full = policy.sinks + policy.recent + 2 * policy.block - 1
    halves = lambda seq: [x.astype(np.float16).astype(dtype) for x in cache.draw(seq)]  # noqa: E731
    check_state(cache, cache.append(halves(full), [full, full - 20]))
    for moved in (policy.block, 0):
        before = cache.append(halves(1), [1, 1], chunk=False)
        assert (cache.packed - before).tolist() == [moved, 0]
        check_state(cache, before)
    if policy.center:
        check_centres(cache)


WITH_RECENT = [CachePolicy(sinks=4, recent=8, center=32), CachePolicy(recent=1)]
"""Policies of whose single tokens a flush reads nothing."""


@pytest.mark.parametrize("policy", WITH_RECENT, ids=lambda p: p.name)
def test_the_newest_token_is_not_read_where_recent_ones_stay(kernels, rng, policy):
    """A step may therefore pass it on as it is, not rotated yet."""
    check_single_tokens(kernels, rng, OTHER, policy)


@pytest.mark.parametrize("policy", POLICIES[2:], ids=lambda p: p.name)
def test_after_a_crop(kernels, rng, policy):
    """A block that was begun before a crop keeps its centre; its later tokens are measured from it."""
    cache = SegmentedCache(kernels, rng, CASE, policy, 2, 400)
    cache.append([x.astype(np.float16).astype(np.float32) for x in cache.draw(300)], [300, 211], chunk=False)
    cache.crop(policy.sinks + policy.center + 9)
    begun = cache.packed.copy()
    assert (begun % policy.center).any()
    centre = cache.centre.copy()
    before = cache.append([x.astype(np.float16).astype(np.float32) for x in cache.draw(200)], [200, 200], chunk=False)
    np.testing.assert_array_equal(before, begun)
    check_state(cache, before)
    np.testing.assert_array_equal(cache.centre[:, :, 1], centre[:, :, 1])


def test_a_full_cache_drops_what_has_no_tile(kernels, rng):
    """Tokens past the capacity, which sessions refuse, do not write outside the arrays."""
    policy = CachePolicy(sinks=2, center=32)
    cache = SegmentedCache(kernels, rng, CASE, policy, 1, 200)
    cache.cache, cache.centre = cache.cache[:, :, : 64 // TOKENS], cache.centre[:, :, :2]
    cache.append([x.astype(np.float16).astype(np.float32) for x in cache.draw(150)], [150])
    assert cache.packed[0] == 128
    cache.packed[0] = 64
    check_state_of_tiles(cache)


def check_state_of_tiles(cache: SegmentedCache) -> None:
    """The tiles that exist hold their tokens."""
    seen, exact = cache.seen()[0, :, :, 2:66], cache.history[0, :, :, 2:66]
    assert ((seen - exact) ** 2).sum() < 0.05 * ((exact - exact.mean(2, keepdims=True)) ** 2).sum()
