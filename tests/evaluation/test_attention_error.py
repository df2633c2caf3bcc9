"""The error of an attention against a loop over tokens that keeps the segments apart."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.evaluation.attention_error import AttentionInput, attention_error, packed_tokens
from rotquant_tvm.formats import KVFormat
from rotquant_tvm.formats.centre import decode_centre, encode_centre

D = 32
POLICIES = {
    "none": CachePolicy(),
    "sinks": CachePolicy(sinks=3),
    "recent": CachePolicy(recent=9),
    "centred": CachePolicy(sinks=4, recent=5, center=32),
}


def _site(rng, tokens, window):
    q, k, v = (rng.standard_normal((heads, tokens, D)).astype(np.float32) for heads in (4, 2, 2))
    return AttentionInput(q, k + 2 * rng.standard_normal(D).astype(np.float32), v, 0.21, window)


def _attend(q, k, v, scale):
    scores = k.astype(np.float64) @ q * scale
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ v


def _roundtrip(codec, x):
    return codec.decode(codec.encode(x))


def _cached(site, head, token, codecs, policy, role):
    """What a cache holds of tokens 0 … token of one kv head, filled one block after the other."""
    x = (site.k, site.v)[role][head, : token + 1].astype(np.float64)
    held = x.astype(np.float16).astype(np.float64)
    start = policy.sinks
    while start + policy.block + policy.recent <= token + 1:
        block = x[start : start + policy.block]
        mean = 0.0
        if policy.center and role == 0:
            mean = decode_centre(encode_centre(block.mean(0, keepdims=True)))
        held[start : start + policy.block] = _roundtrip(codecs[role], block - mean) + mean
        start += policy.block
    return held


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [None, 20])
def test_errors_are_those_of_decoding_token_by_token(rng, policy, window):
    site, policy = _site(rng, 83, window), POLICIES[policy]
    codecs = KVFormat.parse("hurwitz2").codec(D, seed=(1,)), KVFormat.parse("iso3").codec(D, seed=(2,))
    sums, norm = np.zeros(3), 0.0
    for head in range(4):
        for token in range(83):
            first = 0 if window is None else max(0, token + 1 - window)
            exact = [x[head // 2, first : token + 1] for x in (site.k, site.v)]
            held = [_cached(site, head // 2, token, codecs, policy, role)[first:] for role in (0, 1)]
            reference = _attend(site.q[head, token], *exact, site.scale)
            for index, (k, v) in enumerate(((held[0], held[1]), (held[0], exact[1]), (exact[0], held[1]))):
                sums[index] += ((_attend(site.q[head, token], k, v, site.scale) - reference) ** 2).sum()
            norm += (reference**2).sum()
    found = attention_error(site, codecs, policy)
    assert [found.both, found.k, found.v] == pytest.approx(np.sqrt(sums / norm), rel=2e-3)
    assert found.both > found.v > 0


def test_a_half_precision_cache_has_next_to_no_error(rng):
    f16 = KVFormat.parse("f16").codec(D)
    found = attention_error(_site(rng, 40, None), (f16, f16), CachePolicy())
    assert 0 < found.both < 2e-3


def test_packed_tokens_follow_the_policy():
    packed = packed_tokens(100, CachePolicy(sinks=4, recent=10, center=32))
    assert packed.sum(1)[[44, 45, 46]].tolist() == [0, 32, 32] and packed.sum(1)[-1] == 64
    assert packed[-1].nonzero()[0].tolist() == list(range(4, 68))
    assert (packed_tokens(5, CachePolicy()).sum(1) == range(1, 6)).all()
