from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.benchmark.cache_data import CacheSpec
from rotquant_tvm.benchmark.code_error import code_error, roundtrip_error
from rotquant_tvm.benchmark.reference import causal_output, decode_output, relative_error, stored_rows
from rotquant_tvm.formats import EncodedKV, KVFormat


def softmax_attention(q, k, v, scale):
    weights = np.exp(q @ k.T * scale)
    return weights @ v / weights.sum(-1, keepdims=True)


def test_rows_and_output_of_a_plain_cache(host, small, rng):
    spec = CacheSpec.of("iso3/planar4", small("decode"), 1, 70)
    (cache,) = spec.random(host)
    stored = cache.numpy()[0, 1]
    keys, values = stored_rows(spec, [stored], 45, 45)
    k, v = (
        c.decode(e).reshape(-1, 32)[:45]
        for c, e in zip(spec.codecs, spec.layout.unpack(stored.view(np.uint8)), strict=True)
    )
    q = rng.standard_normal((2, 32))
    found = decode_output(spec, (keys, values), q, 0.2)
    np.testing.assert_allclose(found, softmax_attention(q, k, v, 0.2), rtol=1e-6)


def test_rows_of_a_policy_are_sinks_tiles_with_centres_and_the_ring(host, small):
    spec = CacheSpec.of("iso3,sinks=4,recent=8,center=64", small("decode"), 1, 200)
    cache, centre, plain = (array.numpy()[0, 0] for array in spec.random(host))
    packed = int(spec.packed([200])[0])
    keys, values = stored_rows(spec, [cache, centre, plain], 200, packed)
    assert keys.shape == values.shape == (200, 32) and packed == 128
    np.testing.assert_array_equal(keys[:4], plain[0, :4].astype(np.float64))
    ring = spec.policy.ring
    for position in (132, 199):
        np.testing.assert_array_equal(values[position], plain[1, 4 + (position - 4) % ring].astype(np.float64))
    without = CacheSpec.of("iso3", small("decode"), 1, 200)
    bare, _ = stored_rows(without, [cache], 128, 128)
    step = keys[4:132] - bare
    np.testing.assert_allclose(step[:64], np.broadcast_to(step[0], (64, 32)), atol=1e-12)
    assert not np.allclose(step[63], step[64])


def test_a_short_sequence_is_all_sinks(host, small):
    spec = CacheSpec.of("rq3", small("decode"), 1, 200)
    arrays = [array.numpy()[0, 0] for array in spec.random(host)]
    keys, _ = stored_rows(spec, arrays, 3, 0)
    np.testing.assert_array_equal(keys, arrays[-1][0, :3].astype(np.float64))


def test_causal_output_sees_only_the_past(rng):
    q, k, v = rng.standard_normal((2, 8)), rng.standard_normal((20, 8)), rng.standard_normal((20, 8))
    found = causal_output(q, k, v, [0, 11], 0.3)
    np.testing.assert_allclose(found[0], v[0])
    np.testing.assert_allclose(found[1], softmax_attention(q[1:], k[:12], v[:12], 0.3)[0])


def test_errors_are_relative_and_never_hide_a_nan(rng):
    x = rng.standard_normal((4, 5))
    assert relative_error(1.01 * x, x) == pytest.approx(0.01)
    assert relative_error(np.full_like(x, np.nan), x) == float("inf")


@pytest.mark.parametrize("name", ["f16", "q8_0", "iso3", "hurwitz4", "iso2+tcq"])
def test_code_error_is_zero_for_the_reference_and_counts_what_is_wrong(name, rng):
    codec = KVFormat.parse(name).codec(32)
    x = rng.standard_normal((100, 32))
    right = codec.encode(x, np.float32)
    assert code_error(codec, x, right) == 0
    codes = right.codes.copy()
    codes[:10] ^= 1
    assert code_error(codec, x, EncodedKV(codes, right.gain)) > 1e-2
    if right.gain.size:
        assert code_error(codec, x, EncodedKV(right.codes, right.gain * np.float16(1.05))) > 1e-3


def test_roundtrip_error_counts_what_is_wrong(rng):
    codec = KVFormat.parse("hurwitz3").codec(64)
    x = rng.standard_normal((50, 64))
    y = codec.decode(codec.encode(x)).astype(np.float16)
    assert roundtrip_error(codec, x, y) == 0
    y[0] = 0
    assert roundtrip_error(codec, x, y) > 0.01
    y[0] = np.nan
    assert roundtrip_error(codec, x, y) >= 0.02
    assert roundtrip_error(codec, x, x) > 0.5
