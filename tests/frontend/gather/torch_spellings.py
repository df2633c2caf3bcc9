"""Attention as people write it in torch, several spellings in one module."""

from __future__ import annotations

import math

import torch
from torch import nn

HEADS, KV_HEADS, DIM = 4, 2, 8
GROUP = HEADS // KV_HEADS


def eager(q, k, v, mask):
    """transformers' eager attention, with its repeated heads and its softmax in float32."""
    batch, _, length, dim = k.shape
    wide, merged = (batch, KV_HEADS, GROUP, length, dim), (batch, HEADS, length, dim)
    k, v = (x[:, :, None].expand(wide).reshape(merged) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(nn.functional.dropout(weights, p=0.5, training=False), v).transpose(1, 2).contiguous()


def fused(q, k, v, mask):
    """The fused operator, with a boolean mask; decompositions spell it out."""
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask > -1, scale=0.2, enable_gqa=True)


def fused_causal(q, k, v, mask):
    k, v = (x.repeat_interleave(GROUP, dim=1) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def capped_einsum(q, k, v, mask):
    """Grouped heads and soft-capping in einsum."""
    q = q.reshape(q.shape[0], KV_HEADS, GROUP, q.shape[2], DIM)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) / math.sqrt(DIM)
    scores = 30 * torch.tanh(scores / 30)
    scores = scores.masked_fill(mask[:, :, None] < -1, -1e9)
    return torch.einsum("bhgqk,bhkd->bqhgd", scores.softmax(-1), v).flatten(2)


def batched(q, k, v, mask):
    """Products of rank 3, and the mask as one minus zeros and ones."""
    batch, _, seq, dim = q.shape
    k, v = (torch.repeat_interleave(x, GROUP, dim=1).reshape(batch * HEADS, -1, dim) for x in (k, v))
    scores = torch.bmm(q.reshape(batch * HEADS, seq, dim) * dim**-0.5, k.transpose(1, 2))
    hidden = (1.0 - (mask > -1).to(q.dtype)) * torch.finfo(q.dtype).min
    scores = scores.view(batch, HEADS, seq, -1) + hidden
    scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).view(batch * HEADS, seq, -1)
    return torch.bmm(scores.softmax(-1), v).view(batch, HEADS, seq, dim)


SPELLINGS = {
    "eager": (eager, KV_HEADS, 0.3, 0.0),
    "fused": (fused, KV_HEADS, 0.2, 0.0),
    "fused_causal": (fused_causal, KV_HEADS, DIM**-0.5, 0.0),
    "capped_einsum": (capped_einsum, KV_HEADS, DIM**-0.5, 30.0),
    "batched": (batched, KV_HEADS, DIM**-0.5, 0.0),
}
"""Function, kv heads, scale and soft-capping."""


class AllSpellings(nn.Module):
    """Every spelling of one attention over the same tensors."""

    def forward(self, q, k, v, mask):
        return tuple(function(q, k, v, mask) for function, *_ in SPELLINGS.values())


def inputs(seq: int = 3, length: int = 5, batch: int = 2, blind: bool = True) -> list[torch.Tensor]:
    """Queries, keys, values and an additive mask; ``blind``: it hides every key from the first query of a row."""
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, seq), (KV_HEADS, length), (KV_HEADS, length)
    tensors = [torch.randn(batch, heads, count, DIM, generator=generator) for heads, count in shapes]
    visible = torch.ones(batch, 1, seq, length, dtype=torch.bool).tril(length - seq)
    visible[0, :, 0] &= not blind
    return [*tensors, torch.where(visible, 0.0, torch.finfo(torch.float32).min)]


def dynamic_shapes() -> dict:
    batch, seq, length = (torch.export.Dim(name) for name in ("batch", "seq", "length"))
    kv = {0: batch, 2: length}
    return {"q": {0: batch, 2: seq}, "k": kv, "v": kv, "mask": {0: batch, 2: seq, 3: length}}
