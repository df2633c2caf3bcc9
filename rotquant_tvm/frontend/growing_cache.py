"""The cache handed to a transformers model while it is imported: it concatenates and refuses the rest."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from rotquant_tvm.errors import ModelError


class GrowingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer [batch, kv_heads, length, head_dim], or None before the first token."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None
        self.updated = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is allocated ahead."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values; return all of them. Raises ModelError on a second append in a step."""
        if self.updated:
            raise ModelError("the model appends twice to one layer of its cache in one step")
        self.updated = True
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys visible after the append, offset of the first)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No bound."""
        return -1


class GrowingCache(Cache):
    """A cache whose step is ``concat(past, new)``; ``past`` is a (keys, values) pair per layer, or empty."""

    layers: list[Any]  # of GrowingLayer

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]], model_type: str) -> None:
        if past:
            super().__init__(layers=[GrowingLayer(k, v) for k, v in past])
        else:
            super().__init__(layer_class_to_replicate=GrowingLayer)
        self.model_type = model_type

    def layer_of(self, keys: torch.Tensor, values: torch.Tensor) -> int | None:
        """Return the layer whose present these very tensors are, or None."""
        for index, layer in enumerate(self.layers):
            if layer.updated and layer.keys is keys and layer.values is values:
                return index
        return None

    def presents(self) -> list[torch.Tensor]:
        """Return keys and values of every layer, in the order k_0, v_0, k_1."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            f"{self.model_type!r} keeps more than keys and values between steps (a recurrent or indexed "
            "state), which is not supported"
        )

    update_conv_state = _refuse
    update_recurrent_state = _refuse
    update_indexer = _refuse
    has_previous_state = _refuse
