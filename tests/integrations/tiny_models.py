"""Small random models of transformers, and a DynamicCache that stores what a format makes of keys and values."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from rotquant_tvm.kv_cache_config import KVCacheConfig

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POLICY = "hurwitz3,sinks=3,recent=2,center=32"
CAPPED = {"sliding_window": 40, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0}
SLIDING = {"layer_types": ["sliding_attention"] * 2}
KINDS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "wide": lambda: LlamaConfig(**SIZES | {"head_dim": 64}),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=40),
    "gemma2": lambda: Gemma2Config(**SIZES, **CAPPED),
    "sliding": lambda: Gemma2Config(**SIZES, **CAPPED, **SLIDING),
}


@cache
def tiny(kind: str = "llama"):
    """A model; gemma2's layers have a window of 40 and none in turn (``sliding``: all one), and soft-capped scores.

    A GPU's own kernels take the heads of ``wide``.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    return model


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 61, shape))


def padded(ids: torch.Tensor, lengths, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of which the first ``lengths[i]`` ids are real, padded to one length; ids and attention mask."""
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[longest - length :] = 1 if side == "left" else row[longest - length :]
        if side == "right":
            row[:length] = 1
    result = torch.zeros_like(mask)
    for out, real, row, length in zip(result, mask, ids, lengths, strict=True):
        out[real.bool()] = row[:length]
    return result, mask


@torch.no_grad()
def logits_of(model, implementation, cache, ids, splits, mask=None, positions=None) -> torch.Tensor:
    """Logits of ids [batch, columns], given in pieces that end at ``splits`` and then one by one."""
    model.set_attn_implementation(implementation)
    edges = [0, *splits, *range(splits[-1] + 1, ids.shape[1] + 1)]
    found = []
    for start, stop in pairwise(edges):
        extra = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if positions is not None:
            extra["position_ids"] = positions[:, start:stop]
        found.append(model(ids[:, start:stop], past_key_values=cache, **extra).logits)
    return torch.cat(found, dim=1)


class FakeQuantLayer(DynamicLayer):
    """Keeps what a codec makes of keys and values; a chunk's own tokens are seen as they are, a step's are not."""

    def __init__(self, codecs) -> None:
        super().__init__()
        self.codecs = codecs

    def update(self, key_states, value_states, *_, **__):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        stored = []
        for codec, x in zip(self.codecs, new, strict=True):
            stored.append(torch.from_numpy(codec.decode(codec.encode(x.numpy()))).to(x.dtype))
        past = (self.keys, self.values)
        self.keys, self.values = (torch.cat(pair, dim=-2) for pair in zip(past, stored, strict=True))
        seen = stored if key_states.shape[-2] == 1 else new
        return tuple(torch.cat(pair, dim=-2) for pair in zip(past, seen, strict=True))


class FakeQuantCache(DynamicCache):
    """Every layer with the codecs that a compile gives it; without a policy."""

    def __init__(self, kv_cache: str, count: int = 2, head_dim: int = 32) -> None:
        super().__init__()
        config = KVCacheConfig.parse(kv_cache)
        self.layers = [FakeQuantLayer(config.codecs(index, count, head_dim)) for index in range(count)]
        self.layer_class_to_replicate = None
