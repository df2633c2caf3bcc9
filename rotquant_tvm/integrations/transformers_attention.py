"""The attention implementation ``rotquant_cache`` of transformers, which reads packed caches.

transformers asks one registered function for a mask and another for attention. The first answers with a
:class:`PackedMask`, which says what was asked. The second knows keys that ``RotQuantCache.update`` gave out and lets
their layer attend. For other caches, and without one, it computes what transformers' ``sdpa`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ..errors import ModelError, UsageError
from ..frontend.attention_interface import is_causal_mask
from .token_columns import NewTokens, TokenColumns

NAME = "rotquant_cache"
PENDING = "_rotquant_pending"
"""Attribute of the keys that ``update`` returns: who stores them."""

# Arguments that do not change what one inference step computes; any other must be absent, None or False.
_WITHOUT_EFFECT = {"position_ids", "position_embeddings", "use_cache", "cache_position", "layer_idx"}
_MEANING = {"s_aux": " (attention sinks)", "indices": " (sparse attention)", "position_bias": " (a bias by position)"}


class PackedMask:
    """What a model asked of its mask; all layers of one call share it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self._checked = False
        self._tensor: torch.Tensor | None = None
        self._last: tuple[TokenColumns, tuple[TokenColumns, NewTokens]] | None = None

    @property
    def window(self) -> int | None:
        """How many tokens are visible, the token itself included; None: all before it."""
        return self.request.get("local_size")

    @property
    def past(self) -> int:
        """Columns that the model takes for its past."""
        return int(self.request.get("q_offset", 0))

    def check(self, name: str) -> None:
        """Raise ``ModelError`` unless the mask is causal, or causal with a window, padding aside."""
        if self._checked:
            return
        function = self.request["mask_function"]
        own = bool(self.request.get("use_vmap"))  # set where the model adds a mask function of its own
        plain = self.window is None and function is causal_mask_function
        if own or not (plain or is_causal_mask(function, self.window)):
            raise ModelError(
                f"{name} asks for a mask that is neither causal nor causal with a window; use another cache for it"
            )
        self._checked = True

    def extended(self, columns: TokenColumns) -> tuple[TokenColumns, NewTokens]:
        """``columns.extended`` with this call's columns and padding; computed once for layers that hold the same."""
        if self._last is None or not self._last[0].same(columns):
            result = columns.extended(int(self.request["q_length"]), self.request.get("attention_mask"))
            self._last = (columns, result)
        return self._last[1]

    def tensor(self) -> torch.Tensor:
        """The mask as ``sdpa`` takes it, bool [batch, 1, queries, keys]."""
        if self._tensor is None:
            self._tensor = sdpa_mask(**self.request | {"allow_is_causal_skip": False})
        return self._tensor


@dataclass(frozen=True)
class AttentionRequest:
    """What an attention asks for beside its tensors."""

    name: str
    scale: float
    softcap: float | None
    mask: PackedMask


class PendingLayer(Protocol):
    """A layer that has given out new keys and values and waits for their attention."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, request: AttentionRequest
    ) -> torch.Tensor:
        """Append and attend; returns [batch, columns, heads, head_dim]."""


def answer_mask(**request: Any) -> PackedMask:
    """Stand for the mask that transformers asks for."""
    return PackedMask(request)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers; the mask alone decides the window, as in transformers' own."""
    name = type(module).__name__
    for argument, given in kwargs.items():
        if argument not in _WITHOUT_EFFECT and given is not None and given is not False:
            meaning = _MEANING.get(argument, "")
            raise ModelError(f"{name} passes {argument!r}{meaning} to its attention, which {NAME!r} does not support")
    layer: PendingLayer | None = getattr(key, PENDING, None)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, scaling, dropout, is_causal, softcap), None
    if is_causal is False or not isinstance(attention_mask, PackedMask):
        raise ModelError(
            f"{name} attends without a causal mask made by transformers, or with one of its own (4-D); "
            "a packed cache needs causal attention"
        )
    if dropout:
        raise UsageError(f"{name} drops attention at random; call model.eval() first")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UsageError("a packed cache passes no gradients on; run the model under torch.no_grad()")
    attention_mask.check(name)
    scale = float(scaling) if scaling is not None else query.shape[3] ** -0.5
    request = AttentionRequest(name, scale, None if softcap is None else float(softcap), attention_mask)
    return layer.attend(query, key, value, request), None


def _dense(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention to keys and values as they are."""
    if isinstance(mask, PackedMask):
        mask = mask.tensor()
        if mask.shape[-1] != key.shape[2]:
            raise ModelError(
                f"{type(module).__name__} does not read its keys and values as its cache returned them; "
                "use another attention implementation"
            )
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal)[0]
    if mask is None:
        raise ModelError(f"{type(module).__name__} attends without a mask; use another attention implementation")
    group = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, group), repeat_kv(value, group)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[3] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, answer_mask)
