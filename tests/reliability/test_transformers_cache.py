"""The cache under transformers models when memory or its own capacity ends: refused whole, and usable afterwards."""

from __future__ import annotations

import pytest
import torch
import transformers

from rotquant_tvm import RotQuantCache
from rotquant_tvm.errors import DeviceError, KVCacheFull
from rotquant_tvm.integrations import packed_layer
from rotquant_tvm.runtime import cache_allocation

pytestmark = pytest.mark.full

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    made.set_attn_implementation(RotQuantCache.attention)
    return made


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 60), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, cache, ids):
    return model(ids, past_key_values=cache).logits[:, -1]


def test_no_memory_to_grow(model, ids, monkeypatch):
    monkeypatch.setattr(packed_layer, "FIRST_CAPACITY", 32)
    cache, calm = (RotQuantCache("hurwitz3", model.config) for _ in range(2))
    logits(model, cache, ids[:, :30]), logits(model, calm, ids[:, :30])
    with monkeypatch.context() as patch:
        patch.setattr(cache_allocation, "free_bytes", lambda _device: 1000)
        with pytest.raises(DeviceError, match=r"a KV cache of batch 2 x capacity 64 takes 7\.0 KiB and 1000 bytes are"):
            logits(model, cache, ids[:, 30:40])
    assert cache.get_seq_length() == 30
    assert torch.equal(logits(model, cache, ids[:, 30:40]), logits(model, calm, ids[:, 30:40]))


def test_one_sequence_at_the_end(model, ids):
    cache = RotQuantCache("hurwitz3", model.config, max_length=40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :10] = 0  # the first sequence is shorter: it is the second one that has no room
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache, attention_mask=mask)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        with pytest.raises(KVCacheFull, match=r"max_length is 40 .* needs 41 for sequence 1") as full:
            model(ids[:, 40:41], past_key_values=cache, attention_mask=longer)
        assert full.value.sequence == 1
        assert [layer.store.lengths.tolist() for layer in cache.layers] == [[30, 40]] * 2
        longer[1, -1] = 0  # without a token of it the other one goes on
        found = model(ids[:, 40:41], past_key_values=cache, attention_mask=longer).logits
    assert torch.isfinite(found[0]).all()
    assert [layer.store.lengths.tolist() for layer in cache.layers] == [[31, 40]] * 2
