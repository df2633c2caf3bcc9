"""Append to the 16-bit segments: which slot each new token enters, and which are left alone."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import Rotation, sanitize
from rotquant_tvm.ops.append_plain import row_rotations

from .reference import coefficients

KV_HEADS, HEAD_DIM, WORDS = 3, 48, 5
POLICIES = [
    CachePolicy(sinks=4),
    CachePolicy(recent=7),
    CachePolicy(sinks=3, recent=2, center=32),
    CachePolicy(sinks=40, recent=5, center=32, defer=9),
]
NUMPY = {"bfloat16": ml_dtypes.bfloat16}
ROTATIONS = ["hurwitz/turbo", "none/rotor", "dense/none"]


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


@dataclass
class SingleTokens:
    """An append of a token, or of none, to sequences of any length, to be rotated by what ``rotations`` names.

    Of the sequences some are empty, some have all tokens in tiles, and one goes round the ring; those without a token
    hold NaN in its place.
    """

    rotations: str
    head_dim: int
    dtype: str
    policy: CachePolicy
    kv_heads: int = KV_HEADS

    def __post_init__(self) -> None:
        families, d, policy = self.rotations.split("/"), self.head_dim, self.policy
        self.drawn = [Rotation.draw(name, d, seed) for seed, name in enumerate(families)]
        rng = np.random.default_rng(d + len(self.rotations))
        past = np.array([0, policy.sinks, policy.slots + 37, 75, 9, max(0, policy.sinks - 1)], np.int32)
        self.counts = np.array([1, 1, 1, 1, 0, 1], np.int32)
        self.lengths = past + self.counts
        batch = len(past)
        self.packed = policy.packed_after(np.zeros(batch, np.int32), self.lengths, chunk=False)
        if policy.ring:
            self.packed[3] = self.lengths[3] - policy.sinks  # its token is in a tile already
        kind = NUMPY.get(self.dtype, self.dtype)
        self.new = [rng.standard_normal((batch, self.kv_heads, 1, d)).astype(kind) for _ in range(2)]
        for x in self.new:
            x[self.counts == 0] = np.nan
        self.plain = rng.standard_normal((batch, self.kv_heads, 2, policy.slots, d)).astype(np.float16)
        self.tiles = rng.integers(0, 2**32, (batch, self.kv_heads, 2, WORDS), dtype=np.uint32)

    @property
    def structures(self):
        """What the definition is built for."""
        return tuple(tuple(rotation.structure) for rotation in self.drawn)

    @property
    def arguments(self):
        """The arrays of the operator, in order."""
        data = [coefficients(rotation) for rotation in self.drawn]
        return [self.plain, *self.new, *data, self.packed, self.lengths, self.counts, self.tiles]

    def check(self, found):
        """Compare rows with float64's, up to a float16's rounding; all others must be as they were."""
        rows = [r.apply(np.asarray(x, np.float64)) for r, x in zip(self.drawn, self.new, strict=True)]
        wanted = expected(self.policy, self.plain, rows, self.packed, self.lengths, self.counts)
        same = expected(self.policy, np.ones_like(self.plain), [0 * x for x in rows], *self._counts) == 1
        np.testing.assert_array_equal(found[same], self.plain[same])
        assert 0 < (~same).sum() < same.size
        np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=1e-3, atol=2e-6)

    @property
    def _counts(self):
        return self.packed, self.lengths, self.counts


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("rotations", ROTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_rotated_on_their_way(kernels, policy, rotations, dtype):
    tokens = SingleTokens(rotations, 64, dtype, policy)
    arguments = KV_HEADS, tokens.head_dim, WORDS, dtype, policy
    kernel = kernels.build(ops.append_plain, *arguments, rotations=tokens.structures)
    tokens.check(kernels.run(kernel, *tokens.arguments, writes=(0,)))


def test_a_rotated_row_beyond_float16_is_clipped(kernels):
    """And NaN, which a rotation spreads over its blocks, is 0, as in a launch after that of the rotation."""
    tokens = SingleTokens("iso/planar", 64, "float32", POLICIES[0])
    tokens.new[0][0] = 1e6 * np.eye(1, 64)
    tokens.new[0][0, :, :, 8] = np.nan
    kernel = kernels.build(ops.append_plain, KV_HEADS, 64, WORDS, "float32", POLICIES[0], rotations=tokens.structures)
    found = kernels.run(kernel, *tokens.arguments, writes=(0,))
    turned = np.clip(tokens.drawn[0].apply(1e6 * np.eye(1, 64))[0], -65504, 65504)
    assert np.abs(turned[:4]).max() == 65504
    np.testing.assert_allclose(found[0, :, 0, 0, :8], np.broadcast_to(turned[:8], (KV_HEADS, 8)), rtol=1e-3)
    assert (found[0, :, 0, 0, 8:12] == 0).all()


def test_a_definition_says_how_it_rotates():
    tokens = SingleTokens("turbo/none", 64, "float16", POLICIES[0])
    arguments = (KV_HEADS, 64, WORDS, "float16", POLICIES[0], ops.Axes("cuda"))
    assert row_rotations(ops.append_plain(*arguments)) is None
    assert row_rotations(ops.append_plain(*arguments, rotations=tokens.structures)) == tokens.structures
