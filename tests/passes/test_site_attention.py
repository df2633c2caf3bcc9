"""SiteAttention with ``quantize``: a chunk's tokens make a round trip through their formats before anything sees them.

What the other calls of a site compute is followed through all passes (``test_quantize_kv_cache``, ``cached_step``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import Codec
from rotquant_tvm.formats.centre import decode_centre, encode_centre
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from .cached_step import CachedStep, operators, stages
from .tiny_model import VOCAB, TinyModel

MODEL = TinyModel()
CACHES = {
    "plain": ("hurwitz3/iso2", "1=q8_0/planar2"),
    "policy": ("hurwitz3:ip/iso4,sinks=5,recent=2,center=32", "1=q8_0/hurwitz2"),
}
COUNTS = (75, 1, 40)
"""New tokens of each row: whole blocks and parts of one; a row that is only sinks; padding."""


def config(name: str) -> KVCacheConfig:
    return replace(KVCacheConfig.parse(*CACHES[name]), quantize_chunk=True)


@cache
def prefilled(name: str):
    """The ids, the logits of a prefill of an empty cache, and the cache afterwards."""
    step = CachedStep(MODEL, stages(MODEL, config(name))["quantize"])
    ids = np.random.default_rng(4).integers(0, VOCAB, (len(COUNTS), max(COUNTS)))
    return step.call(step.create(len(COUNTS)), ids, list(COUNTS))


def quantized(codec: Codec, x: np.ndarray, policy: CachePolicy, centred: bool) -> np.ndarray:
    """What becomes of one sequence's keys or values [kv_heads, n, head_dim] from its first token on."""
    rotated = codec.rotate(x)
    result, here = rotated.copy(), codec.in_rotated_basis()
    result[:, : policy.sinks] = rotated[:, : policy.sinks].astype(np.float16)
    size = policy.center if centred and policy.center else x.shape[1]
    for first in range(policy.sinks, x.shape[1], size):
        block = rotated[:, first : first + size]
        centre = 0.0
        if centred and policy.center:
            centre = decode_centre(encode_centre(block.mean(1)))[:, None].astype(float)
        result[:, first : first + size] = here.decode(here.encode(block - centre)) + centre
    return codec.unrotate(result)


def expected(ids: np.ndarray, cache: KVCacheConfig, policy: CachePolicy | None = None) -> np.ndarray:
    """NumPy's logits of one sequence."""

    def held(layer, new):
        codecs = cache.codecs(layer, MODEL.layers, MODEL.head_dim)
        here = cache.layer_policy(layer, MODEL.layers) if policy is None else policy
        return [quantized(c, x, here, role == 0) for role, (c, x) in enumerate(zip(codecs, new, strict=True))]

    return MODEL.forward(ids, MODEL.empty_past(), held)[0]


@pytest.mark.parametrize("name", sampled(CACHES, ["policy"]))
def test_attention_is_over_numpys_round_trip(name):
    call = prefilled(name)
    for logits, ids, count in zip(call.logits, call.ids, COUNTS, strict=True):
        np.testing.assert_allclose(logits, expected(ids[:count], config(name)), atol=5e-4)
    raw = [MODEL.forward(ids[:count], MODEL.empty_past())[0] for ids, count in zip(call.ids, COUNTS, strict=True)]
    far = np.abs(call.logits - raw).max(1)
    assert far[0] > 0.01 and far[2] > 0.01
    if name == "policy":  # a row of sinks alone is not quantized
        assert far[1] < 2e-3


@pytest.mark.parametrize("other", [CachePolicy(), CachePolicy(sinks=5), CachePolicy(sinks=4, center=32)])
def test_the_policy_decides_what_is_seen(other):
    """Each part of it shows in the logits."""
    call = prefilled("policy")
    assert np.abs(call.logits[0] - expected(call.ids[0, : COUNTS[0]], config("policy"), other)).max() > 5e-3


def test_decode_has_no_round_trips():
    """Its new token is quantized by the cache itself, or stays in 16 bits."""
    mod = stages(MODEL, config("policy"))["quantize"]
    chunk = operators(mod, "prefill")
    assert chunk.count("split_centre") == chunk.count("roundtrip") == 2 * MODEL.layers
    assert not {"split_centre", "roundtrip"} & set(operators(mod, "decode"))
    usual = stages(MODEL, replace(config("policy"), quantize_chunk=False))["quantize"]
    assert not {"split_centre", "roundtrip"} & set(operators(usual, "prefill"))
