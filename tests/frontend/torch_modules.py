"""Small decoders as people write them by hand, each with its cache in another place."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS, LENGTH = 97, 128, 4, 2, 32, 2, 64


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the module in eval mode; norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.15, generator=generator).add_(0.5 if parameter.ndim == 1 else 0.0)
    return module.eval()


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], heads, HEAD_DIM).transpose(1, 2)


def rotary_table() -> torch.Tensor:
    """[length, head_dim / 2, 2]: cosine and sine, pairs of neighbours."""
    angles = torch.arange(LENGTH)[:, None] / 100.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate_pairs(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring dimensions of x [batch, heads, seq, head_dim] by the rows of a table [seq, head_dim / 2, 2]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[..., 0], table[..., 1]
    turned = [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin]
    return torch.stack(turned, dim=-1).flatten(3).type_as(x)


class Block(nn.Module):
    """Attention over keys and values that ``cached`` (a subclass's) returns, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        parts = self.qkv(self.norm(x)).split(sizes, dim=-1)
        return tuple(split_heads(part, heads) for part, heads in zip(parts, (HEADS, KV_HEADS, KV_HEADS), strict=True))

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.silu(self.up(self.mlp_norm(x))))


class PastDecoder(nn.Module):
    """Takes past keys and values and returns the grown ones; the positions are an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("rotary", rotary_table(), persistent=False)

    def forward(self, tokens, positions, past):
        x = self.embedding(tokens)
        seq, length = tokens.shape[1], past[0][0].shape[2] + tokens.shape[1]
        visible = torch.arange(length)[None, :] <= torch.arange(length - seq, length)[:, None]
        table = self.rotary[positions][:, None]
        presents = []
        for block, (past_k, past_v) in zip(self.blocks, past, strict=True):
            q, k, v = block.project(x)
            q, k = rotate_pairs(q, table), rotate_pairs(k, table)
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            presents.append((k, v))
            attended = functional.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
            x = block.finish(x, attended)
        return self.head(x), presents


class KVCache(nn.Module):
    """Keys and values in buffers of fixed length, written at positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, KV_HEADS, LENGTH, HEAD_DIM))
        self.register_buffer("v_cache", torch.zeros(1, KV_HEADS, LENGTH, HEAD_DIM))

    def update(self, input_pos, k, v):
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class BufferDecoder(nn.Module):
    """Keeps its cache in buffers; the mask and the rotary embedding are rows of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.caches = nn.ModuleList(KVCache() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("rotary", rotary_table(), persistent=False)
        self.register_buffer("causal_mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), persistent=False)

    def forward(self, idx, input_pos):
        x = self.embedding(idx)
        mask, table = self.causal_mask[None, None, input_pos], self.rotary[input_pos]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            q, k, v = block.project(x)
            q, k = rotate_pairs(q, table), rotate_pairs(k, table)
            k, v = cache.update(input_pos, k, v)
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
            x = block.finish(x, functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0))
        return self.head(x)


class WrittenDecoder(BufferDecoder):
    """Takes its caches as arguments and writes them in place, [batch, length, kv_heads, head_dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.caches = nn.ModuleList()

    def forward(self, idx, input_pos, caches):
        x = self.embedding(idx)
        mask, table = self.causal_mask[input_pos], self.rotary[input_pos]
        for block, (k_cache, v_cache) in zip(self.blocks, caches, strict=True):
            q, k, v = block.project(x)
            q, k = rotate_pairs(q, table), rotate_pairs(k, table)
            k_cache[:, input_pos], v_cache[:, input_pos] = k.transpose(1, 2), v.transpose(1, 2)
            k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
            x = block.finish(x, functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
        return self.head(x)


class PlainDecoder(nn.Module):
    """Has no cache, learned positions and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, idx):
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            q, k, v = block.project(x)
            x = block.finish(x, functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        return self.head(self.norm(x))
