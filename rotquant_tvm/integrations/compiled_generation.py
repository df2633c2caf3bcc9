"""A compiled library as a model of transformers: its ``generate``, with all of its options, drives our sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UsageError
from ..runtime import CompiledLibrary, Session
from .token_columns import TokenColumns


class SessionCache(Cache):
    """A session as the cache that ``generate`` hands from step to step; padding is not stored."""

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[])
        self.session = session
        self.columns = TokenColumns(session.batch)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, padding included."""
        return self.columns.count

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The session's capacity."""
        return self.session.capacity

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
        """Append the real tokens among ids [batch, columns]; returns float32 [batch, vocab] after them."""
        if ids.shape[0] != self.columns.batch:
            raise UsageError(f"the session holds {self.columns.batch} sequences and was given {ids.shape[0]}")
        columns, new = self.columns.extended(ids.shape[1], mask)
        packed = new.packed(ids.cpu(), 1).numpy()
        if new.whole and ids.shape[1] == 1:
            logits = self.session.decode(packed)
        else:
            logits = self.session.prefill([row[:count] for row, count in zip(packed, new.lengths, strict=True)])
        self.columns = columns
        return logits

    def reset(self) -> None:
        """Forget all tokens."""
        self.session.reset()
        self.columns = TokenColumns(self.session.batch)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns, or keep as many as a positive number says."""
        held = self.columns.count
        keep = min(tokens_to_remove, held) if tokens_to_remove > 0 else max(held + tokens_to_remove, 0)
        columns = self.columns.cropped(keep)
        self.session.crop(columns.lengths)
        self.columns = columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i a copy of sequence ``beam_idx[i]``."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices``, in their order; bool [batch] keeps those that are true."""
        chosen = torch.as_tensor(indices)
        self._select((chosen.nonzero().reshape(-1) if chosen.dtype == torch.bool else chosen).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._select(np.repeat(np.arange(self.columns.batch), repeats).tolist())

    def _select(self, rows: Sequence[int]) -> None:
        if list(rows) != list(range(self.columns.batch)):
            self.session.reorder(rows)
            self.columns = self.columns.select(rows)


class CompiledForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A library as a causal LM: ``CompiledForCausalLM(library).generate(input_ids, do_sample=True, …)``.

    ``capacity``: tokens per sequence of the sessions that calls without a cache start (None: the library's).
    Sampling, logits processors, stopping criteria, streamers, padded batches and beams are transformers'; a library
    computes the logits after the last token alone, so speculative decoding is refused. Nothing can be trained.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, library: CompiledLibrary, capacity: int | None = None) -> None:
        info = library.info
        sizes: dict[str, Any] = {"num_hidden_layers": len(info.layers), "vocab_size": info.vocab_size}
        super().__init__(PretrainedConfig(**sizes))
        ends, first = sorted(library.eos_token_ids) or None, min(library.eos_token_ids, default=None)
        self.library, self.capacity = library, capacity
        self.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=ends, pad_token_id=first
        )

    @property
    def device(self) -> torch.device:
        """Where ids are expected and logits are returned."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate must not make a cache: the first call of forward starts a session

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SessionCache | None = None,
        logits_to_keep: int = 1,
        return_dict: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Append ``input_ids`` [batch, columns]; returns logits [batch, 1, vocab] and the cache.

        ``attention_mask``: [batch, columns held and new], 0 where there is padding. Raises ``UsageError`` for a cache
        of another kind or for more logits than the last, ``KVCacheFull`` if the tokens do not fit.
        """
        if logits_to_keep != 1 and input_ids.shape[1] > 1:
            raise UsageError("a compiled library computes the logits after the last token only (logits_to_keep=1)")
        if past_key_values is None:
            past_key_values = SessionCache(self.library.session(batch=input_ids.shape[0], capacity=self.capacity))
        if not isinstance(past_key_values, SessionCache):
            raise UsageError(f"past_key_values is a {type(past_key_values).__name__}; a compiled library has its own")
        logits: Any = torch.from_numpy(past_key_values.step(input_ids, attention_mask))[:, None]
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
