"""RotQuantCache under small models: its numbers against DynamicCache, fake quantization and compiled models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from rotquant_tvm import RotQuantCache
from rotquant_tvm.errors import KVCacheFull, UsageError
from rotquant_tvm.integrations import packed_layer

from ..sampling import sampled
from .tiny_models import POLICY, FakeQuantCache, logits_of, padded, tiny, tokens

OURS = RotQuantCache.attention
IDS = tokens(1, 2, 90)
SPLITS = (40, 67)
"""Two chunks, then steps."""


def close(found: torch.Tensor, expected: torch.Tensor, error: float = 2e-4) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < error


def packed(kv_cache: str, kind: str = "llama", ids=IDS, splits=SPLITS, mask=None, **options) -> torch.Tensor:
    model = tiny(kind)
    return logits_of(model, OURS, RotQuantCache(kv_cache, model.config, **options), ids, splits, mask)


@pytest.mark.parametrize("kind", sampled(["llama", "mistral", "gemma2", "sliding"], ["llama", "sliding"]))
def test_f16_is_dynamic_cache_up_to_rounding(kind):
    """Windows of 40 pass over the first tokens; Gemma's scale is its own and its scores are soft-capped."""
    model = tiny(kind)
    expected = logits_of(model, "eager", DynamicCache(config=model.config), IDS, SPLITS)
    found = packed("f16", kind)
    close(found, expected, 5e-3)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kv_cache", sampled(["hurwitz3", "iso4/q8_0", "turbo2.5", "rotor3/f16"], ["hurwitz3"]))
def test_quantized_is_fake_quantization_in_torch(kv_cache):
    """Two chunks and 23 steps, every layer with its own rotations."""
    close(packed(kv_cache), logits_of(tiny(), "eager", FakeQuantCache(kv_cache), IDS, SPLITS))


def test_overrides_are_layers_of_their_own():
    reference = FakeQuantCache("hurwitz3")
    reference.layers[1] = FakeQuantCache("f16").layers[1]
    close(packed("hurwitz3", kv_layers="-1=f16"), logits_of(tiny(), "eager", reference, IDS, SPLITS))


@pytest.mark.full
def test_a_policy_is_that_of_a_compiled_model(compiled):
    """The same seeds, segments and centres: 90 tokens go through two flushes of 32."""
    session = compiled.library().session(batch=2)
    ids = IDS.numpy()
    expected = [session.prefill(ids[:, :40]), session.prefill(ids[:, 40:67])]
    expected += [session.decode(column) for column in ids[:, 67:].T]
    found = packed(POLICY)[:, [39, *range(66, 90)]]
    error = (found - torch.from_numpy(np.stack(expected, axis=1))).abs()
    assert (error < 1e-3).float().mean() > 0.9 and error.max() < 0.3  # a code may flip


@pytest.mark.parametrize("kv_cache", sampled(["f16", "hurwitz3", POLICY], ["f16"]))
def test_another_attention_gets_everything_dequantized(kv_cache):
    """Slow, and the same numbers: a rotation of the query is one of the keys."""
    model = tiny()
    with pytest.warns(UserWarning, match="set_attn_implementation"):
        found = logits_of(model, "sdpa", RotQuantCache(kv_cache, model.config), IDS, SPLITS)
    close(found, packed(kv_cache), 1e-3)


@pytest.mark.parametrize("kv_cache", [POLICY, pytest.param("hurwitz3", marks=pytest.mark.full)])
def test_padded_rows_are_each_alone(kv_cache):
    """Left padding, right padding and a chunk with both behind it; the steps of a batch are of all its rows."""
    model, lengths = tiny(), (50, 23, 37)
    ids = tokens(2, 3, 70)
    for side in ("left", "right"):
        given, mask = padded(ids, lengths, side)
        given = torch.cat([given, tokens(3, 3, 20)], dim=1)
        mask = torch.cat([mask, torch.ones(3, 20, dtype=torch.long)], dim=1)
        mask[1, 55:57] = 0  # a hole within the second chunk
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = logits_of(model, OURS, RotQuantCache(kv_cache, model.config), given, (50, 60), mask, positions)
        for row in range(3):
            real = mask[row].bool()
            alone = given[row : row + 1, real]
            splits = tuple(int(real[:edge].sum()) for edge in (50, 60))
            close(found[row : row + 1, real], packed(kv_cache, ids=alone, splits=splits), 1e-3)


def test_generate_with_padding_and_beams():
    """A whole generate: greedy and beams over a padded batch, and prompt lookup, which crops."""
    model = tiny()
    ids, mask = padded(tokens(4, 2, 30), (30, 17))

    def generated(implementation, cache, ids=ids, **options):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 24, "do_sample": False} | options
        return model.generate(ids, past_key_values=cache, **options)

    for options in ({"attention_mask": mask}, {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}):
        expected = generated("sdpa", DynamicCache(config=model.config), **options)
        assert torch.equal(generated(OURS, RotQuantCache("f16", model.config), **options), expected)
    single = {"ids": ids[:1].repeat(1, 2), "prompt_lookup_num_tokens": 4}
    expected = generated("sdpa", DynamicCache(config=model.config), **single)
    assert torch.equal(generated(OURS, RotQuantCache("f16", model.config), **single), expected)


def test_rows_and_lengths_can_be_changed():
    """Crop, reorder, repeat, select, copy: each goes on as a cache that was filled like it."""
    model, ids = tiny(), IDS[:, :80]
    cache = RotQuantCache("hurwitz3", model.config)
    full = logits_of(model, OURS, cache, ids, (60,))
    cache.crop(-10)
    assert cache.get_seq_length() == 70 and cache.get_mask_sizes(3, 1) == (73, 0)
    twin = copy.deepcopy(cache)
    close(logits_of(model, OURS, cache, ids[:, 70:], (1,)), full[:, 70:])
    assert twin.get_seq_length() == 70
    twin.reorder_cache(torch.tensor([1, 1]))
    twin.batch_repeat_interleave(2)
    twin.batch_select_indices(torch.tensor([0, 3, 2]))
    assert twin.batch_size == 3
    found = logits_of(model, OURS, twin, ids[1:, 70:].repeat(3, 1), (1,))
    close(found, full[1:, 70:].repeat(3, 1, 1))
    cache.reset()
    assert cache.get_seq_length() == 0
    close(logits_of(model, OURS, cache, ids[:1], (60,)), full[:1])  # another batch, too


def test_a_growing_cache_is_one_of_full_size(monkeypatch):
    monkeypatch.setattr(packed_layer, "FIRST_CAPACITY", 40)
    ids = tokens(5, 1, 250)
    splits = (30, 150)
    model = tiny()
    growing = RotQuantCache(POLICY, model.config)
    found = logits_of(model, OURS, growing, ids, splits)
    assert growing.layers[0].store.capacity == 296
    fixed = RotQuantCache(POLICY, model.config, max_length=250)
    assert torch.equal(found, logits_of(model, OURS, fixed, ids, splits))
    assert fixed.get_max_cache_shape() == fixed.get_max_length() == 250 and growing.get_max_length() == -1
    with torch.no_grad(), pytest.raises(KVCacheFull, match="max_length is 250 tokens per sequence") as full:
        model(ids[:, :1], past_key_values=fixed)
    assert full.value.needed == 251 and fixed.get_seq_length() == 250


def test_the_report_counts_the_arrays():
    model = tiny()
    cache = RotQuantCache(POLICY, model.config, kv_layers="0=f16", max_length=256)
    assert cache.nbytes == 0 and cache.report()["layers"] == []
    logits_of(model, OURS, cache, IDS, SPLITS)
    report = cache.report()
    arrays = [tensor for layer in cache.layers for tensor in layer.store._arrays.layers]
    assert report["nbytes"] == cache.nbytes == sum(tensor.numpy().nbytes for tensor in arrays)
    first, second = report["layers"]
    assert first["bits_per_element"] == 16 and first["policy"] == "" and first["tokens"] == [90, 90]
    assert second["k"] == "hurwitz3" and second["policy"] == "sinks=3,recent=2,center=32"
    center = (32 + 4) * 8 / 32 / 64  # of a block of 32 tokens: int8 and a scale
    assert second["bits_per_element"] == (second["k_bits"] + second["v_bits"]) / 2 + center
    assert report["bytes_per_token"] == first["bytes_per_token"] + second["bytes_per_token"]
    assert first["packed_attention"] and report["f16_bytes_per_token"] == 512


def test_windows_keep_their_ring_and_refuse_what_is_gone():
    model = tiny("sliding")
    cache = RotQuantCache("f16", model.config, max_length=600)
    logits_of(model, OURS, cache, tokens(6, 1, 200), (190,))
    for layer in cache.report()["layers"]:
        assert layer["window"] == 40 and layer["nbytes"] == 96 * layer["f16_bytes_per_token"]  # 2 tiles and one more
    assert not cache.is_croppable
    with pytest.raises(UsageError, match="window of 40 tokens"):
        cache.crop(-100)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 200
    cache.crop(-1)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 199
