from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.benchmark.cache_data import CacheSpec
from rotquant_tvm.formats import TileLayout
from rotquant_tvm.formats.centre import decode_centre


@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0", "q4_0", "iso3", "hurwitz2+tcq", "turbo2.5", "planar3/q8_0"])
def test_random_tiles_hold_values_of_about_one(host, small, name):
    spec = CacheSpec.of(name, small("decode"), 2, 100)
    (cache,) = spec.random(host)
    assert cache.shape == (2, 2, 4, spec.layout.tile_bytes // 4)
    for codec, encoded in zip(spec.codecs, spec.layout.unpack(cache.numpy().view(np.uint8)), strict=True):
        values = codec.decode(encoded)
        assert np.isfinite(values).all() and 0.4 < values.std() < 2.5, name
        assert encoded.codes.std() > 0


def test_a_policys_arrays_have_the_shapes_of_its_segments(host, small):
    spec = CacheSpec.of("rq3", small("decode"), 2, 300)
    cache, centre, plain = spec.random(host)
    policy = spec.policy
    assert cache.shape[2] == policy.packed_tiles(300) and plain.shape == (2, 2, 2, policy.slots, 32)
    assert centre.shape == (2, 2, cache.shape[2] * 32 // policy.center, 9)
    centres = decode_centre(centre.numpy())
    assert np.isfinite(centres).all() and 0.1 < np.abs(centres).max() <= 0.51


def test_stored_bytes_are_tiles_centres_and_rows(small):
    settings = small("decode", kv_heads=3, heads=3)
    straight = CacheSpec.of("iso3", settings, 2, 100)
    assert (
        straight.stored_bytes([100, 33])
        == 3 * (4 + 2) * TileLayout(*[c.format for c in straight.codecs], 32).tile_bytes
    )
    preset = CacheSpec.of("rq3", settings, 1, 300)
    (packed,) = preset.packed([300])
    assert packed == (300 - 4 - 8) // 64 * 64
    expected = packed // 32 * preset.layout.tile_bytes + packed // 64 * 36 + (300 - packed) * 2 * 32 * 2
    assert preset.stored_bytes([300]) == 3 * expected


def test_the_site_says_what_the_attention_is(small):
    site = CacheSpec.of("rq3", small("decode"), 1, 10).site(small("decode"), chunk=False)
    assert (site.heads, site.kv_heads, site.head_dim, site.dtype) == (4, 2, 32, "float32")
    assert site.policy == "sinks=4,recent=8,center=64" and site.scale == pytest.approx(32**-0.5)
