"""Simulation of a format: every key and value of a model makes a round trip, with or without a cache."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache

from rotquant_tvm.errors import ModelError
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .cached_step import operators
from .numpy_attention import run_main
from .simulated_function import calls
from .tiny_model import VOCAB, TinyModel


@pytest.mark.parametrize("pair", ["hurwitz3", "iso2/f16", "q8_0"])
def test_simulation_is_numpys_round_trip(pair):
    """K and V of every token are quantized, in prefill too; the signature stays."""
    model, config = TinyModel(), KVCacheConfig.parse(pair)
    mod = QuantizeKVCache(config, simulate=True)(model.module())
    assert [p.name for p in mod["main"].params] == [p.name for p in model.module()["main"].params]
    assert operators(mod, "main").count("roundtrip") == 4
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 12))

    def held(layer, new):
        codecs = config.codecs(layer, model.layers, model.head_dim)
        return [codec.decode(codec.encode(x)) for codec, x in zip(codecs, new, strict=True)]

    expected = [model.forward(row, model.empty_past(), held)[0] for row in ids]
    np.testing.assert_allclose(run_main(model, mod, ids), expected, atol=1e-4)
    plain = [model.forward(row, model.empty_past())[0] for row in ids]
    assert np.abs(np.array(plain) - expected).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"softcap": 0.8, "window": 4}], ids=["plain", "capped-window"])
def test_simulation_works_without_a_cache(options):
    """With attention as the model has it: TVM compiles the result by itself."""

    class NoCache(TinyModel):
        def join(self, bb, past, new):
            return new

    model, config = NoCache(layers=1, **options), KVCacheConfig.parse("planar2")
    mod = QuantizeKVCache(config, simulate=True)(model.module())
    codecs = config.codecs(0, 1, model.head_dim)
    ids = np.random.default_rng(2).integers(0, VOCAB, (1, 9))

    def held(_, new):
        return [codec.decode(codec.encode(x)) for codec, x in zip(codecs, new, strict=True)]

    assert not any("attention" in name for name in calls(mod["main"]))
    expected = model.forward(ids[0], model.empty_past(), held)[0]
    np.testing.assert_allclose(run_main(model, mod, ids)[0], expected, atol=1e-4)


def test_one_tensor_for_keys_and_values_is_refused():
    """Its two formats would contradict each other."""

    class KeysAreValues(TinyModel):
        def attend(self, bb, q, k, v):
            return super().attend(bb, q, k, k)

    with pytest.raises(ModelError, match=r"attention 0 \(\w+\) cannot be simulated: one tensor serves as several"):
        QuantizeKVCache(KVCacheConfig.parse("iso3/f16"), simulate=True)(KeysAreValues().module())
