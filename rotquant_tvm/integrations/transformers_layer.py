"""One layer of ``RotQuantCache``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ..errors import ModelError, UsageError
from ..kv_cache_config import KVCacheConfig
from .attention_geometry import AttentionGeometry, layer_rotations
from .packed_layer import PackedLayer, kernel_dtype
from .token_columns import TokenColumns
from .transformers_attention import NAME, PENDING, AttentionRequest


@dataclass(frozen=True, eq=False)
class CacheSettings:
    """What the layers of a cache share; ``model`` is the configuration that the model itself reads."""

    kv_cache: KVCacheConfig
    model: PretrainedConfig
    count: int
    max_length: int | None

    def __deepcopy__(self, _memo: dict[int, Any]) -> CacheSettings:
        return self

    @property
    def fused(self) -> bool:
        """Whether the model's attention is ours now."""
        return bool(self.model._attn_implementation == NAME)

    def fitted(self, head_dim: int) -> KVCacheConfig:
        """The cache configuration for layers of a head dimension; raises ``FormatError``."""
        return self.kv_cache.fitted([head_dim] * self.count)[0]


class RotQuantLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Packed keys and values of layer ``index``; its arrays are made when the first tokens come."""

    is_compileable = False
    is_sliding = False  # windows are in the masks: those of all layers have one size
    supports_early_init = False

    def __init__(self, settings: CacheSettings, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings, self.index = settings, index
        self.store: PackedLayer | None = None
        self.columns = TokenColumns(0)  # of no batch yet
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note batch, dtype and device; what else must be known comes with the first attention."""
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.columns.count == 0:
            self.columns = TokenColumns(key_states.shape[0])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values [batch, kv_heads, columns, head_dim].

        With our attention they are returned as they are, and stored when it is computed. With another one they are
        stored now, and all keys and values of the sequences are returned, dequantized.
        """
        self._settled()
        if key_states.shape != value_states.shape:
            shapes = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise ModelError(f"layer {self.index}: keys and values must have one shape, and theirs are {shapes}")
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UsageError("a packed cache passes no gradients on; run the model under torch.no_grad()")
        self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.columns.batch:
            raise UsageError(
                f"the cache holds {self.columns.batch} sequences and was given {key_states.shape[0]}; reset() it, or "
                "batch_repeat_interleave() or batch_select_indices() it first"
            )
        if not self.settings.fused:
            return self._dequantized(key_states, value_states)
        self._pending = (key_states, value_states)
        setattr(key_states, PENDING, self)
        return key_states, value_states

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, request: AttentionRequest
    ) -> torch.Tensor:
        """Append what ``update`` took and attend; returns [batch, columns, heads, head_dim]."""
        delattr(key, PENDING)
        pending, self._pending = self._pending, None
        if pending is None or pending[0] is not key or pending[1] is not value:
            raise ModelError(f"{request.name} does not read its keys and values as its cache returned them")
        if query.shape[3] != key.shape[3]:
            raise ModelError(f"{request.name} has queries of head_dim {query.shape[3]} and keys of {key.shape[3]}")
        if request.mask.past != self.columns.count:
            raise UsageError(
                f"layer {self.index} holds {self.columns.count} columns and the model counts {request.mask.past}: an "
                "earlier call ended with an error; reset() the cache"
            )
        window = request.mask.window
        columns, new = request.mask.extended(self.columns)
        if window is not None and columns.gaps:
            raise UsageError("a layer with a sliding window cannot have padding between real tokens; pad on the left")
        scale = float(np.float32(request.scale))  # models spell 1/sqrt(head_dim) in ways that differ in the last digit
        sizes = (query.shape[1], key.shape[1], key.shape[3], scale, window, request.softcap)
        output = self._prepare(key, *sizes).attend(query, key, value, new)
        self.columns = columns
        return output

    def _dequantized(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append without an attention of ours: padding is stored like any token, and the model masks it."""
        warnings.warn(_slow(self.settings.model._attn_implementation), stacklevel=2)
        heads, (columns, new) = key.shape[1], self.columns.extended_whole(key.shape[2])
        store = self._prepare(key, heads, heads, key.shape[3], 1.0, None, None, readable=True)
        step = key.shape[2] == 1
        past = None if step or not self.columns.count else store.read()
        store.attend(torch.zeros_like(key), key, value, new)
        self.columns = columns
        if step:  # as in our attention: a step's token is stored before it is read
            keys, values = store.read()
            return keys.to(key.dtype), values.to(value.dtype)
        if past is None:
            return key, value
        keys, values = (torch.cat([old.to(x.dtype), x], dim=2) for old, x in zip(past, (key, value), strict=True))
        return keys, values

    def _prepare(
        self,
        key: torch.Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        readable: bool = False,
    ) -> PackedLayer:
        """Return a store for this attention, device and batch; one that holds tokens must be the one wanted."""
        settings = self.settings
        config = settings.fitted(head_dim)
        policy = config.layer_policy(self.index, settings.count)
        formats, dtype = config.layer(self.index, settings.count).name, kernel_dtype(key)
        geometry = AttentionGeometry(
            heads, kv_heads, head_dim, scale, window, softcap, dtype, formats, policy.name, readable
        )
        store = self.store
        if store is not None and store.geometry == geometry and store.device == key.device:
            if store.batch == key.shape[0]:
                return store
        if self.columns.count:
            raise UsageError(
                f"layer {self.index} was filled by another attention (implementation, heads, scale, window, dtype or "
                "device differ); reset() the cache"
            )
        rotations = layer_rotations(config, self.index, settings.count, head_dim)
        store = PackedLayer(geometry, rotations, key.device, key.shape[0], settings.max_length)
        self.store = store
        return store

    def _settled(self) -> None:
        if self._pending is not None:
            raise ModelError(
                f"layer {self.index}: the model did not attend to what the cache returned through the implementation "
                f"{NAME!r}, though its configuration says so; use model.set_attn_implementation('sdpa') with it"
            )

    def get_seq_length(self) -> int:
        """Columns held, padding included."""
        self._settled()
        return self.columns.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask is for: all columns."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """``max_length``, or -1 for none."""
        return -1 if self.settings.max_length is None else self.settings.max_length

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before there are any."""
        return self.columns.batch or -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether any number of tokens can be taken back: a layer with a window gives tokens up."""
        return self.store is None or self.store.geometry.window is None

    def reset(self) -> None:
        """Forget all tokens; the arrays stay."""
        self._pending, self.columns, self.is_initialized = None, TokenColumns(0), False
        if self.store is not None:
            self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns, or keep as many columns as a positive number says."""
        columns = self.cropped(tokens_to_remove)
        if columns is not None and self.store is not None:
            self.store.crop(columns.lengths)
            self.columns = columns

    def cropped(self, tokens_to_remove: int) -> TokenColumns | None:
        """The columns after a crop, None if there is nothing to remove; raises ``UsageError`` if it is impossible."""
        held = self.get_seq_length()
        keep = min(tokens_to_remove, held) if tokens_to_remove > 0 else max(held + tokens_to_remove, 0)
        if keep == held:
            return None
        columns = self.columns.cropped(keep)
        if self.store is not None:
            self.store.check_crop(columns.lengths)
        return columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i a copy of sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.get_seq_length():
            self._select(np.repeat(np.arange(self.columns.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices``, in their order; bool [batch] keeps those that are true."""
        if self.get_seq_length():
            chosen = torch.as_tensor(indices).cpu()
            chosen = chosen.nonzero().reshape(-1) if chosen.dtype == torch.bool else chosen
            self._select(chosen.numpy())

    def _select(self, rows: np.ndarray) -> None:
        if np.array_equal(rows, np.arange(self.columns.batch)):
            return
        if self.store is not None:
            self.store.select(rows.tolist())
        self.columns = self.columns.select(rows.tolist())


def _slow(implementation: str | None) -> str:
    return (
        f"the model's attention is {implementation!r}: RotQuantCache dequantizes all keys and values in every step; "
        f"model.set_attn_implementation({NAME!r}) reads them packed"
    )
