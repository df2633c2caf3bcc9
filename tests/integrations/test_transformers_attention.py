"""The registered attention: what it refuses by name, and that it is sdpa for every other cache."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, GPT2Config, LlamaConfig, Qwen3NextConfig, T5Config

from rotquant_tvm import KVCacheConfig, RotQuantCache
from rotquant_tvm.errors import FormatError, ModelError, UsageError
from rotquant_tvm.integrations.transformers_layer import CacheSettings, RotQuantLayer

from .tiny_models import SIZES, logits_of, padded, tiny, tokens

OURS = RotQuantCache.attention
IDS = tokens(1, 2, 12)


def fresh(kv_cache: str = "f16", kind: str = "llama"):
    model = tiny(kind)
    model.set_attn_implementation(OURS)
    return model, RotQuantCache(kv_cache, model.config)


def test_the_package_needs_no_torch():
    code = "import rotquant_tvm, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_with_other_caches_it_is_sdpa(kind):
    model = tiny(kind)
    ids, mask = padded(tokens(2, 2, 60), (60, 41))
    expected = logits_of(model, "eager", DynamicCache(config=model.config), ids, (50,), mask)
    found = logits_of(model, OURS, DynamicCache(config=model.config), ids, (50,), mask)
    assert (found - expected)[mask.bool()].abs().max() < 1e-4
    with torch.no_grad():
        assert (model(ids, attention_mask=mask).logits - expected)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "needs the model's configuration"),
        (T5Config(), "encoder-decoder"),
        (Qwen3NextConfig(num_hidden_layers=4), "layer 0 is 'linear_attention'"),
        (LlamaConfig(is_causal=False), "both directions"),
        (LlamaConfig(num_kv_shared_layers=2), "keys and values of others"),
        (LlamaConfig(attention_chunk_size=64), "chunks of the text"),
    ],
)
def test_models_that_are_refused(config, said):
    with pytest.raises((ModelError, UsageError), match=said):
        RotQuantCache("rq3", config)


def test_options_that_are_refused():
    config = LlamaConfig(**SIZES)
    for options in ({"kv_layers": "7=f16"}, {"max_length": 0}, {"kv_cache": "rq9"}):
        with pytest.raises(UsageError):
            RotQuantCache(**{"kv_cache": "rq3", "config": config} | options)
    whole = KVCacheConfig.parse("rq3")
    with pytest.raises(UsageError, match="quantize_chunk"):
        RotQuantCache(KVCacheConfig(whole.formats, quantize_chunk=True), config)
    assert len(RotQuantCache("rq3", GPT2Config(n_layer=3))) == 3  # a configuration with names of its own


def call(model, cache, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options)


def test_masks_that_are_refused():
    model, cache = fresh()
    allowed = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(ModelError, match="one of its own"):
        call(model, cache, attention_mask=allowed)
    cache.reset()
    call(model, cache, attention_mask=torch.ones_like(IDS))
    with pytest.raises(UsageError, match="changed for tokens"):
        call(model, cache, IDS[:, :1], attention_mask=torch.tensor([[0] + [1] * 12] * 2))


def test_a_window_with_padding_in_between_is_refused():
    model, cache = fresh(kind="sliding")
    mask = torch.ones_like(IDS)
    mask[1, 4:6] = 0
    with pytest.raises(UsageError, match="pad on the left"):
        call(model, cache, attention_mask=mask)


def test_gradients_and_dropout_are_refused():
    model, cache = fresh()
    with pytest.raises(UsageError, match="no_grad"):
        model(IDS, past_key_values=cache)
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    try:
        with pytest.raises(UsageError, match="eval"):
            call(model, RotQuantCache("f16", model.config))
    finally:
        model.eval()
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0


def test_other_sequences_need_a_reset():
    model, cache = fresh()
    call(model, cache)
    with pytest.raises(UsageError, match="holds 2 sequences and was given 1"):
        call(model, cache, IDS[:1])


def test_an_attention_that_changes_needs_a_reset():
    model, cache = fresh()
    call(model, cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UsageError, match="filled by another attention"), pytest.warns(UserWarning, match="dequantizes"):
        call(model, cache)


def test_a_call_that_failed_midway_needs_a_reset():
    model, cache = fresh()
    call(model, cache)
    cache.layers[1].crop(-2)
    with pytest.raises(UsageError, match="earlier call ended with an error"):
        call(model, cache)


@pytest.mark.parametrize("head_dim", [24, 40])
def test_a_head_dimension_that_no_format_takes_is_refused_by_name(head_dim):
    settings = CacheSettings(KVCacheConfig.parse("rq3"), LlamaConfig(**SIZES), 2, None)
    layer = RotQuantLayer(settings, 0)
    with pytest.raises(FormatError, match=f"{head_dim}"), pytest.warns(UserWarning, match="dequantizes"):
        layer.update(torch.zeros(1, 2, 3, head_dim), torch.zeros(1, 2, 3, head_dim))


def test_keys_and_values_that_do_not_fit_are_refused():
    model, cache = fresh()
    with pytest.raises(ModelError, match="one shape"):
        cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 16), 0)
    model.set_attn_implementation("sdpa")
    elsewhere = torch.zeros(1, 2, 3, 32, device="meta")
    with pytest.raises(UsageError, match="on meta"), pytest.warns(UserWarning, match="dequantizes"):
        cache.update(elsewhere, elsewhere, 1)


def test_an_attention_that_does_not_come_is_noticed():
    """A model whose configuration names our attention, and which computes its own."""
    _, cache = fresh()
    keys = torch.zeros(1, 2, 3, 32)
    assert cache.update(keys, keys.clone(), 0)[0] is keys
    with pytest.raises(ModelError, match="layer 0: the model did not attend"):
        cache.update(keys, keys, 0)
    with pytest.raises(ModelError, match="did not attend"):
        cache.get_mask_sizes(1, 0)
    cache.reset()
    assert cache.get_seq_length() == 0
