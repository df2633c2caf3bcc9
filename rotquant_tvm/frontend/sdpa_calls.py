"""Our attention for models that call torch's own, outside of transformers' attention interface (Falcon).

Such a model asks transformers for a mask of the kind ``sdpa`` and hands it to ``scaled_dot_product_attention``. While
it is imported, both are answered by what ``attention_interface`` answers elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rotquant_tvm.frontend.attention_interface import answer_mask, attend

_NAME = "sdpa"


@contextmanager
def sdpa_calls(model: PreTrainedModel) -> Iterator[None]:
    """Answer the calls of ``model``, and of nothing beside it; needs a recording (``attention_interface``)."""
    config, functional = model.config, torch.nn.functional
    before, original = config._attn_implementation_internal, functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        # torch's is_causal aligns the first query with the first key, which a step with a past does not want.
        out, _ = attend(model, query, key, value, attn_mask, scaling=scale, is_causal=False if is_causal else None)
        return out.transpose(1, 2)

    config._attn_implementation_internal = _NAME
    functional.scaled_dot_product_attention = attention
    ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = answer_mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS.pop(_NAME)
        functional.scaled_dot_product_attention = original
        config._attn_implementation_internal = before
