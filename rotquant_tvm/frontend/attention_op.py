"""Attention, and the choice of the token to predict from, as torch operators that an export keeps whole."""

from __future__ import annotations

import math

import torch


@torch.library.custom_op(
    "rotquant::causal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, int? window, float? softcap=None) -> Tensor",
)
def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Grouped-query attention, the last query aligned with the last key.

    ``q`` [batch, heads, seq, head_dim], ``k`` and ``v`` [batch, kv_heads, length, head_dim]; a query sees
    itself and the ``window`` - 1 keys before it (None: all). Scaled scores s become softcap · tanh(s / softcap),
    unless ``softcap`` is None. Returns [batch, seq, heads, head_dim] in the dtype of ``q``; scores and softmax
    are in float32.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    grouped = q.float().reshape(batch, kv_heads, heads // kv_heads, seq, head_dim)
    scores = grouped @ k.float().transpose(2, 3).unsqueeze(2) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length - seq, length)[:, None] - torch.arange(length)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    weights = scores.masked_fill(~visible.to(scores.device), -math.inf).softmax(-1)
    out = (weights @ v.float().unsqueeze(2)).reshape(batch, heads, seq, v.shape[3])
    return out.to(q.dtype).transpose(1, 2).contiguous()


@causal_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op(
    "rotquant::select_token", mutates_args=(), schema="(Tensor hidden, Tensor last) -> Tensor"
)
def select_token(hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Take token ``last[i]`` of row i: hidden [batch, seq, width], last int32 [batch] → [batch, width]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last.long()].contiguous()


@select_token.register_fake
def _(hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[2])
