"""A compiled library as a model of transformers: its ``generate``, with all of its options, drives our sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
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

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None, keep: int = 1) -> np.ndarray:
        """Append the real tokens among ids [batch, columns].

        Returns float32 logits [batch, keep, vocab]: with ``keep`` 1 those after the last real token, else those after
        the last ``keep`` columns (NaN where there is padding).
        """
        if ids.shape[0] != self.columns.batch:
            raise UsageError(f"the session holds {self.columns.batch} sequences and was given {ids.shape[0]}")
        columns, new = self.columns.extended(ids.shape[1], mask)
        packed = new.packed(ids.cpu(), 1).numpy()
        rows = [row[:count] for row, count in zip(packed, new.lengths, strict=True)]
        if keep > 1:
            real = np.ones((len(rows), keep), bool) if columns.real is None else columns.real[:, -keep:]
            logits = self._verify(rows, real, keep < ids.shape[1])
        elif new.whole and ids.shape[1] == 1:
            logits = self.session.decode(packed)[:, None]
        else:
            logits = self.session.prefill(rows)[:, None]
        self.columns = columns
        return logits

    def _verify(self, rows: Sequence[np.ndarray], real: np.ndarray, prompt: bool) -> np.ndarray:
        """Append ``rows``; returns the logits after the last columns, of which ``real`` bool [batch, columns] tells.

        A ``prompt`` is all before these and the first of them. It is prefilled, as without a draft behind it.
        """
        session, draft = self.session, real[:, 1:] if prompt else real
        kept = draft.sum(axis=1)
        starts = [len(row) - count for row, count in zip(rows, kept, strict=True)]
        session.check_room(session.lengths + [len(row) for row in rows])
        logits = np.full((*real.shape, session.info.vocab_size), np.nan, np.float32)
        broken = np.zeros(len(rows), bool)
        with session.cache.unchanged_on_error():
            if any(starts):
                found = session.prefill([row[:start] for row, start in zip(rows, starts, strict=True)])
                broken = np.isnan(found).any(axis=1) & (np.array(starts) > 0)
                logits[real[:, 0], 0] = found[real[:, 0]]
            if draft.any():
                found = session.verify([row[start:] for row, start in zip(rows, starts, strict=True)])
                logits[:, -draft.shape[1] :][draft] = found[np.arange(found.shape[1]) < kept[:, None]]
        logits[broken] = np.nan
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
    Sampling, logits processors, stopping criteria, streamers, padded batches and beams are transformers'. Speculative
    decoding (``assistant_model=``, ``prompt_lookup_num_tokens=``) needs a library compiled with ``every_logit``, others
    refuse it. Nothing can be trained.
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

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        *arguments: Any,
    ) -> None:
        given = (generation_config, model_kwargs, generation_mode, batch_size, *arguments)
        super()._prepare_cache_for_generation(*given)  # type: ignore[misc]
        if generation_mode == GenerationMode.ASSISTED_GENERATION:  # which wants the cache before the first call
            self.library.check_every_logit()
            if model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = self._new_cache(batch_size)

    def _new_cache(self, batch: int) -> SessionCache:
        return SessionCache(self.library.session(batch=batch, capacity=self.capacity))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SessionCache | None = None,
        logits_to_keep: int = 1,
        return_dict: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Append ``input_ids`` [batch, columns]; returns logits [batch, kept, vocab] and the cache.

        ``attention_mask``: [batch, columns held and new], 0 where there is padding. ``logits_to_keep``: after how many
        of the columns, the last ones, logits are wanted; 0: after all (NaN after padding), 1: after the last token.
        Raises ``UsageError`` for a cache of another kind, or for more logits than the last of a library compiled
        without ``every_logit``; ``KVCacheFull`` if the tokens do not fit.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise UsageError(f"logits_to_keep is {logits_to_keep!r}; give the number of last columns, 0 for all")
        keep = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        if keep > 1:
            self.library.check_every_logit()
        if past_key_values is None:
            past_key_values = self._new_cache(input_ids.shape[0])
        if not isinstance(past_key_values, SessionCache):
            raise UsageError(f"past_key_values is a {type(past_key_values).__name__}; a compiled library has its own")
        logits: Any = torch.from_numpy(past_key_values.step(input_ids, attention_mask, keep))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
