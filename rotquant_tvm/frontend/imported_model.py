"""What an importer returns: the canonical Relax module, its weights and the tokenizer's data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import tvm


@dataclass(frozen=True)
class TokenizerData:
    """A tokenizer as plain data, enough to run it without transformers.

    Attributes: ``json`` (the text of a ``tokenizer.json``, as ``tokenizers.Tokenizer.from_str`` reads it),
    ``eos_token_ids`` (every id that ends a generation: the tokenizer's own EOS first, then the others,
    ascending), ``bos_token_id`` (or None) and ``chat_template`` (Jinja text, or None).
    """

    json: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    chat_template: str | None


@dataclass(frozen=True)
class ImportedModel:
    """A decoder model in canonical form.

    ``mod["main"]`` takes ids int32 [batch, seq], positions int32 [batch, seq], last int32 [batch] (the index
    of the token of each row whose logits are wanted), past_k_0, past_v_0, … [batch, kv_heads, past, head_dim]
    and then the weights; it returns (logits float32 [batch, vocab], present_k_0, present_v_0, …), or, imported
    with ``every_logit``, logits [batch, seq, vocab] without reading ``last``; each
    present is concat(past, new) along axis 2. Attention is one ``R.nn.attention`` per layer (BSHD,
    ``causal_mask`` "BottomRight"; a ``window_size`` of w lets a token see itself and the w - 1 before it).
    Soft-capped scores stand in the function's attribute ``rotquant.softcaps`` (``step_graph.SOFTCAPS``).

    Attributes: ``weights`` in parameter order (views of the source's memory where possible; None for a model of
    shapes alone), ``weight_names``
    in the same order (the source's own names; a tied weight appears once), ``config`` with the keys
    ``model_type``, ``vocab_size``, ``max_position`` (None if unbounded) and ``layers``, a list of
    (kv_heads, heads, head_dim); ``tokenizer`` is None when the source has none.
    """

    mod: tvm.IRModule
    weights: list[np.ndarray] | None
    weight_names: list[str]
    config: dict[str, Any]
    tokenizer: TokenizerData | None = None

    @property
    def every_logit(self) -> bool:
        """Whether the step returns the logits after every token."""
        return len(self.mod["main"].ret_ty.fields[0].shape) == 3
