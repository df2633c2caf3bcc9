"""Rings of tiles: what append and flush keep of sequences many rings long, and attention over it, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import EncodedKV
from rotquant_tvm.window_ring import WindowRing

from ..sampling import sampled
from .cases import CASES, MIXED, Case
from .reference import attention, check_encoding, check_output, layout_of, random_words, stored_kv, unpack_words
from .segmented import SegmentedCache

SCALE, BATCH = 0.08, 3
CHUNKS = ([70, 0, 1], [33, 300, 0], [1, 2, 31], [5, 64, 100], [290, 1, 33])
"""New tokens of each sequence, chunk by chunk: longer than the rings and shorter, aligned and not, none."""
WINDOWS = [1, 31, 32, 33, 45]
POLICIES = [
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=8, center=64)),
    (MIXED, CachePolicy(sinks=5, center=32)),
    (Case("q8_0/hurwitz3", 96, 7, 1), CachePolicy(recent=9)),
    (Case("rotor3/f16", 80, 3, 3), CachePolicy(sinks=40)),
    (Case("turbo2", 128, 4, 2), CachePolicy(sinks=4, recent=3, center=96, defer=50)),
]


class RingedCache:
    """One layer's ring, full of random bits at first, and the keys and values that were appended, in their order."""

    def __init__(self, kernels, rng, case, window, dtype="float32"):
        self.kernels, self.rng, self.case, self.dtype = kernels, rng, case, dtype
        self.ring = WindowRing(window)
        self.cache = random_words(rng, layout_of(case.codecs), (BATCH, case.kv_heads, self.ring.tiles))
        if any(codec.format.bits == 16 for codec in case.codecs):  # caches hold no NaN as a 16-bit value
            self.cache[:] = 0
        self.lengths = np.zeros(BATCH, np.int32)
        self.history = [[np.zeros((case.kv_heads, 0, case.head_dim), dtype)] * BATCH for _ in "kv"]

    def draw(self, seq):
        """New keys and values, which differ in size."""
        shape = (BATCH, self.case.kv_heads, seq, self.case.head_dim)
        scales = self.rng.lognormal(size=(2, *shape[:-1], 1))
        return [(s * self.rng.standard_normal(shape)).astype(self.dtype) for s in scales]

    def append(self, new, counts, after=0):
        """Run ``append``; ``after`` heads: as behind an attention."""
        counts, case = np.asarray(counts, np.int32), self.case
        self.lengths = self.lengths + counts
        kernel = self.kernels.build(
            ops.append, *case.codecs, case.kv_heads, self.dtype, wraps=True, after=after
        )
        rotations = [codec.coefficients for codec in case.codecs]
        seen = [np.zeros((BATCH, new[0].shape[2], after, case.head_dim), self.dtype)] if after else []
        arrays = (self.cache, *new, *rotations, self.lengths, counts, *seen)
        self.cache = self.kernels.run(kernel, *arrays, writes=(0,))
        self.note(new, counts)

    def note(self, new, counts):
        """Remember what was appended."""
        for role, x in enumerate(new):
            rows = [np.concatenate([old, x[b, :, : counts[b]]], 1) for b, old in enumerate(self.history[role])]
            self.history[role] = rows

    def check(self):
        """Assert that the window's tokens, and all others from the first one held, stand in their places."""
        first = np.minimum(self.ring.first_held(self.lengths), np.maximum(self.lengths - self.ring.window, 0))
        encoded = unpack_words(layout_of(self.case.codecs), self.cache)
        for codec, history, stored in zip(self.case.codecs, self.history, encoded, strict=True):
            for b, length in enumerate(self.lengths):
                places = np.arange(first[b], length) % self.ring.tokens
                found = EncodedKV(stored.codes[b][:, places], stored.gain[b][:, places])
                check_encoding(codec, history[b][:, first[b] :], found)

    def seen(self, b, first):
        """Keys and values of a sequence from position ``first`` on as they are stored, rotated."""
        places = np.arange(first, self.lengths[b]) % self.ring.tokens
        return [x[b][:, places] for x in stored_kv(self.case.codecs, self.cache)]


@pytest.mark.parametrize("case", sampled([MIXED, CASES[0], CASES[1], CASES[3], CASES[11]], [MIXED]), ids=str)
def test_append_keeps_the_last_tiles(kernels, rng, case):
    """Rings of two to four tiles, through chunks and single tokens, until each is written many times over."""
    for window in (1, 20, 90):
        cache = RingedCache(kernels, rng, case, window)
        for number, counts in enumerate(CHUNKS):
            cache.append(cache.draw(max(counts)), counts, after=4 * (number % 2))
            cache.check()
        for _ in range(40):
            cache.append(cache.draw(1), [1, 0, 1])
        cache.check()
        assert cache.lengths.max() > 5 * cache.ring.tokens or window == 90


def decode(kernels, poisoned, q, arrays, lengths, case, window, **options):
    """Run ``attention_decode``."""
    arguments = (*case.codecs, case.heads, case.kv_heads, SCALE, str(q.dtype))
    kernel = kernels.build(ops.attention_decode, *arguments, splits=3, window=window, **options)
    return kernels.run(kernel, q, *arrays, lengths, poisoned(q.shape, q.dtype), writes=(-1,))


def prefill(kernels, poisoned, operands, arrays, lengths, counts, case, window, **options):
    """Run ``attention_prefill``."""
    q, counts = operands[0], np.asarray(counts, np.int32)
    arguments = (*case.codecs, case.heads, case.kv_heads, SCALE, str(q.dtype))
    kernel = kernels.build(ops.attention_prefill, *arguments, window=window, **options)
    out = poisoned(q.shape, q.dtype)
    return kernels.run(kernel, *operands, *arrays, lengths + counts, counts, out, writes=(-1,))


@pytest.mark.parametrize("window", sampled(WINDOWS, [45]))
@pytest.mark.parametrize("case", sampled([MIXED, CASES[1]], [CASES[1]]), ids=str)
def test_attention_sees_the_window(kernels, rng, poisoned, case, window):
    """Each chunk attends to the ring as it was and then enters; single tokens enter first."""
    cache = RingedCache(kernels, rng, case, window)
    heads = (case.heads, case.head_dim)
    for counts in CHUNKS:
        seq = max(counts)
        new, q = cache.draw(seq), rng.standard_normal((BATCH, seq, *heads)).astype(cache.dtype)
        actual = prefill(kernels, poisoned, (q, *new), [cache.cache], cache.lengths, counts, case, window)
        for b, count in enumerate(counts):
            oldest = max(0, cache.lengths[b] - window + 1)
            k, v = (np.concatenate(pair, 1) for pair in zip(cache.seen(b, oldest), (x[b] for x in new), strict=True))
            if count:
                past = cache.lengths[b] - oldest
                expected = attention(q[b, :count], k[:, : past + count], v[:, : past + count], SCALE, past, window)
                check_output(actual[b, :count], expected)
            assert (actual[b, count:] == 0).all()
        cache.append(new, counts)
        cache.check()
        for counts_of_one in ([1, 1, 1], [1, 0, 1]):
            cache.append(cache.draw(1), counts_of_one)
            cache.check()
            q = rng.standard_normal((BATCH, 1, *heads)).astype(cache.dtype)
            actual = decode(kernels, poisoned, q, [cache.cache], cache.lengths, case, window)
            check_windows(actual, q, cache.lengths, window, cache.seen)


def check_windows(actual, q, lengths, window, seen):
    """Compare a decode; ``seen(b, first)`` gives keys and values from a position on."""
    for b, length in enumerate(lengths):
        oldest = max(0, length - window)
        k, v = (x[:, : length - oldest] for x in seen(b, oldest))
        check_output(actual[b], attention(q[b], k, v, SCALE, length - oldest - 1, window))


@pytest.mark.parametrize("window", sampled([1, 40, 150], [40]))
@pytest.mark.parametrize("site", sampled(POLICIES, POLICIES[:1]), ids=str)
def test_attention_under_a_policy(kernels, rng, poisoned, site, window):
    """Sinks, the 16-bit ring and centres beside a ring of tiles, through chunks and single tokens across flushes."""
    case, policy = site
    cache = SegmentedCache(kernels, rng, case, policy, BATCH, 1000, window=window)
    assert cache.cache.shape[2] == WindowRing(window, policy).tiles < policy.packed_tiles(1000)
    options, heads = {"policy": policy}, (case.heads, case.head_dim)
    for counts in CHUNKS:
        seq = max(counts)
        new, q = cache.draw(seq), rng.standard_normal((BATCH, seq, *heads)).astype(np.float32)
        actual = prefill(kernels, poisoned, (q, *new), cache.arrays, cache.lengths, counts, case, window, **options)
        past, whole = cache.lengths, cache.seen()
        for b, count in enumerate(counts):
            oldest = max(0, past[b] - window + 1)
            k, v = (np.concatenate([whole[b, r, :, oldest : past[b]], new[r][b, :, :count]], 1) for r in range(2))
            if count:
                check_output(actual[b, :count], attention(q[b, :count], k, v, SCALE, past[b] - oldest, window))
        cache.append(new, counts)
        for _ in range(3):
            cache.append(cache.draw(1), [1] * BATCH, chunk=False)
            q = rng.standard_normal((BATCH, 1, *heads)).astype(np.float32)
            actual = decode(kernels, poisoned, q, cache.arrays, cache.lengths, case, window, **options)
            whole = cache.seen()
            check_windows(actual, q, cache.lengths, window, lambda b, at, w=whole: [w[b, r, :, at:] for r in range(2)])
    assert cache.packed.max() >= 2 * cache.cache.shape[2] * 32 or window == 150


def check_segments(cache, window):
    """Assert that every token of the window is where it must be, encoded from itself."""
    policy, ring = cache.policy, WindowRing(window, cache.policy)
    encoded, (_, centres) = unpack_words(layout_of(cache.codecs), cache.cache), cache.tiles()
    for b, length in enumerate(cache.lengths):
        oldest = max(0, length - window)
        kept = [n for n in range(oldest, length) if n < policy.sinks or n >= policy.sinks + cache.packed[b]]
        slots = [n if n < policy.sinks else policy.sinks + (n - policy.sinks) % policy.ring for n in kept]
        rows = cache.plain[b][:, :, slots].swapaxes(0, 1).astype(np.float64)
        np.testing.assert_array_equal(rows, cache.history[b][:, :, kept])
        numbers = np.arange(max(oldest - policy.sinks, 0), cache.packed[b])
        places = numbers % ring.tokens
        for role, codec in enumerate(cache.codecs):
            exact = cache.history[b, role][:, policy.sinks + numbers]
            exact = exact - centres[b][:, places] if role == 0 and policy.center else exact
            stored = encoded[role]
            check_encoding(codec, exact, EncodedKV(stored.codes[b][:, places], stored.gain[b][:, places]))


@pytest.mark.parametrize("window", sampled([1, 40, 150], [40]))
@pytest.mark.parametrize("site", sampled(POLICIES, POLICIES[:1]), ids=str)
def test_a_flush_takes_no_token_of_the_window(kernels, rng, site, window):
    """Chunks, single tokens and crops as far back as they are possible; values are of 16 bits, whatever their way."""
    case, policy = site
    cache, ring = SegmentedCache(kernels, rng, case, policy, BATCH, 1500, window=window), WindowRing(window, policy)

    def take(counts, chunk=True):
        new = [x.astype(np.float16).astype(np.float32) for x in cache.draw(max(counts))]
        return cache.append(new, counts, chunk)

    written = np.zeros(BATCH, np.int32)
    for counts in CHUNKS:
        take(counts)
        written = np.maximum(written, cache.packed)
        check_segments(cache, window)
        for _ in range(70):
            take([1, 0, 1], chunk=False)
            written = np.maximum(written, cache.packed)
        check_segments(cache, window)
        keep = np.minimum(np.maximum(ring.shortest(written), cache.lengths - 80), cache.lengths).astype(np.int32)
        cache.lengths = keep
        cache.packed = np.clip(cache.packed, 0, np.maximum(keep - policy.sinks, 0)).astype(np.int32)
        written = np.where(cache.packed > 0, written, 0)
        take([1, 1, 1], chunk=False)
        check_segments(cache, window)
    assert written.max() >= 2 * ring.tokens or window == 150


@pytest.mark.parametrize("site", sampled(POLICIES, POLICIES[:1]), ids=str)
def test_dequantized_rows_are_the_newest_tokens(kernels, rng, poisoned, site):
    """Row r behind the sinks is for all positions r modulo the rows behind the sinks, and holds the newest of them."""
    case, policy = site
    cache = SegmentedCache(kernels, rng, case, policy, BATCH, 1000, window=40)
    kernel = kernels.build(ops.dequantize_segments, *case.codecs, case.kv_heads, policy, wraps=True)
    rows = policy.sinks + policy.ring + cache.cache.shape[2] * 32
    for counts in CHUNKS:
        cache.append(cache.draw(max(counts)), counts)
        outputs = [poisoned((BATCH, case.kv_heads, rows, case.head_dim), np.float32) for _ in range(2)]
        actual = kernels.run(kernel, *cache.arrays, cache.lengths, *outputs, writes=(-2, -1))
        seen = cache.seen()
        for b, length in enumerate(cache.lengths):
            held = np.arange(max(policy.sinks, length - 40), length)
            places = policy.sinks + (held - policy.sinks) % (rows - policy.sinks)
            first = np.arange(min(policy.sinks, length))
            for role in range(2):
                for at, tokens in ((places, held), (first, first)):
                    close = {"rtol": 1e-5, "atol": 1e-5}
                    np.testing.assert_allclose(actual[role][b][:, at], seen[b, role][:, tokens], **close)
                if length < rows:
                    assert (actual[role][b][:, length:] == 0).all()


@pytest.mark.parametrize("chunk", [True, False])
def test_dense_attention_over_a_ring(kernels, rng, poisoned, chunk):
    """Rows of the past by position modulo their number, behind the sinks' rows; rows that nothing stands in are NaN."""
    window, sinks, capacity, lengths = 40, 3, 70, np.array([2, 41, 300], np.int32)
    counts = np.array([2, 9, 30] if chunk else [1, 1, 1], np.int32)
    q = rng.standard_normal((3, counts.max(), 4, 64)).astype(np.float32)
    k, v = (rng.standard_normal((3, 2, 330, 64)).astype(np.float32) for _ in "kv")
    pasts, stored = [np.full((3, 2, capacity, 64), np.nan, np.float32) for _ in "kv"], lengths - counts * chunk
    for b in range(3):
        for position in range(stored[b]):
            row = position if position < sinks else sinks + (position - sinks) % (capacity - sinks)
            for past, x in zip(pasts, (k, v), strict=True):
                past[b, :, row] = x[b, :, position]
    starts = lengths - counts
    new = [np.stack([x[b, :, n : n + counts.max()] for b, n in enumerate(starts)]) for x in (k, v)]
    kernel = kernels.build(ops.attention_dense, 4, 2, 64, SCALE, "float32", chunk=chunk, window=window, sinks=sinks)
    out = poisoned(q.shape, q.dtype)
    actual = kernels.run(kernel, q, *pasts, *(new if chunk else ()), lengths, counts, out, writes=(-1,))
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        expected = attention(q[b, :count], k[b, :, :length], v[b, :, :length], SCALE, length - count, window)
        check_output(actual[b, :count], expected)
