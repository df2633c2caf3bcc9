"""Decode attention of serving libraries, where they are installed: FlashInfer and vLLM, over 16-bit pages.

A preparation takes q [batch, heads, 1, d] and k, v [batch, kv_heads, tokens, d] on CUDA, and returns the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PAGE = 16
"""Tokens per page; vLLM's default."""

WORKSPACE_BYTES = 128 << 20


def flashinfer(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """Plan and return FlashInfer's batched paged decode, on tensor cores as it advises for grouped queries."""
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, kv_heads, tokens, head_dim = k.shape
    pages, last = -(-tokens // PAGE), (tokens - 1) % PAGE + 1
    cache = torch.stack([_pages(x, pages) for x in (k, v)], dim=1)  # [pages, 2, PAGE, kv_heads, d]
    counts = {"dtype": torch.int32, "device": k.device}
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=k.device), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(batch + 1, **counts) * pages,
        torch.arange(batch * pages, **counts),
        torch.full((batch,), last, **counts),
        q.shape[1],
        kv_heads,
        head_dim,
        PAGE,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    query = q.squeeze(2)
    return lambda: wrapper.run(query, cache)


def vllm(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """Return vLLM's FlashAttention over its pages."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    batch, _, tokens, _ = k.shape
    pages = -(-tokens // PAGE)
    counts = {"dtype": torch.int32, "device": k.device}
    options = {
        "max_seqlen_q": 1,
        "cu_seqlens_q": torch.arange(batch + 1, **counts),
        "max_seqlen_k": tokens,
        "seqused_k": torch.full((batch,), tokens, **counts),
        "block_table": torch.arange(batch * pages, **counts).view(batch, pages),
        "causal": True,
    }
    query, keys, values = q.squeeze(2), _pages(k, pages), _pages(v, pages)
    return lambda: flash_attn_varlen_func(query, keys, values, **options)


def _pages(x: Any, pages: int) -> Any:
    """[batch, kv_heads, tokens, d] as [batch · pages, PAGE, kv_heads, d], the last page padded with zeros."""
    import torch

    batch, kv_heads, tokens, head_dim = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, pages * PAGE - tokens))
    by_token = padded.transpose(1, 2).reshape(batch * pages, PAGE, kv_heads, head_dim)
    return by_token.contiguous()


LIBRARIES: dict[str, tuple[str, Callable[[Any, Any, Any], Callable[[], Any]]]] = {
    "FlashInfer": ("flashinfer", flashinfer),
    "vLLM": ("vllm", vllm),
}
"""By name: the package that must be installed, and the preparation."""
