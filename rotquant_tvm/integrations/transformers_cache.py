"""``RotQuantCache``: a ``Cache`` of transformers whose keys and values are rotated, quantized and packed."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import ModelError, UsageError
from ..formats import KVFormat
from ..kv_cache_config import KVCacheConfig
from ..runtime.library import require_positive
from .packed_layer import PackedLayer
from .transformers_attention import NAME
from .transformers_layer import CacheSettings, RotQuantLayer

_LAYER_TYPES = ("full_attention", "sliding_attention")


class RotQuantCache(Cache):
    """A packed KV cache for a transformers decoder, used like any other: ``generate(past_key_values=cache)``.

    ``kv_cache``: ``"rq3"``, ``"iso3/planar3"``, ``"hurwitz3,sinks=4,recent=8"`` as ``compile`` takes them, or a
    ``KVCacheConfig``; ``config``: the model's own configuration (``model.config``) or the model. ``kv_layers``
    overrides layers (``"0,-1=f16"``). ``max_length``: tokens per sequence, allocated at once; None grows as tokens
    come.

    The model reads the cache packed after ``model.set_attn_implementation("rotquant_cache")``
    (``RotQuantCache.attention``). With another implementation the cache works too, slowly: it hands out all keys and
    values dequantized in every step. Padding, on either side, is not stored. Kernels are compiled when the first
    tokens come, once per user and shape of attention.

    Raises ``UsageError`` or ``FormatError`` for options that make no sense and ``ModelError`` for a model whose layers
    are no causal attention. Calls raise ``FormatError`` for a head dimension that a format cannot take, ``ModelError``
    for an attention that is not causal and ``KVCacheFull`` beyond ``max_length``; after an error ``reset()`` the cache.
    """

    attention = NAME
    """The name of the attention implementation that reads the cache packed."""

    def __init__(
        self,
        kv_cache: str | KVCacheConfig = "rq3",
        config: PretrainedConfig | PreTrainedModel | None = None,
        *,
        kv_layers: str | None = None,
        max_length: int | None = None,
    ) -> None:
        kv_config = KVCacheConfig.of(kv_cache, kv_layers)
        if kv_config.quantize_chunk:
            raise UsageError("quantize_chunk is for compiled models; RotQuantCache reads a chunk's own tokens raw")
        if max_length is not None:
            require_positive("max_length", max_length)
        model = config.config if isinstance(config, PreTrainedModel) else config
        if not isinstance(model, PretrainedConfig):
            raise UsageError("RotQuantCache needs the model's configuration: RotQuantCache('rq3', model.config)")
        decoder = model.get_text_config(decoder=True)
        count = _layer_count(decoder)
        kv_config.layer(0, count)  # refuses overrides of layers that there are not
        settings = CacheSettings(kv_config, decoder, count, max_length)
        self.settings = settings
        super().__init__(layers=[RotQuantLayer(settings, index) for index in range(count)])

    @property
    def kv_cache(self) -> KVCacheConfig:
        """Formats and policy."""
        return self.settings.kv_cache

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that hold keys and values, as they are allocated now."""
        return sum(layer.store.nbytes for layer in self._packed_layers() if layer.store is not None)

    def _packed_layers(self) -> list[RotQuantLayer]:
        return [layer for layer in self.layers if isinstance(layer, RotQuantLayer)]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """``max_length``, or -1 for none."""
        return int(self.layers[layer_idx].get_max_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns, or keep as many columns as a positive number says.

        Raises ``UsageError``, and changes nothing, where a layer with a window has given up what would be seen.
        """
        for layer in self._packed_layers():
            layer.cropped(tokens_to_remove)
        super().crop(tokens_to_remove)

    def report(self) -> dict[str, Any]:
        """What is stored and what it costs, as plain data.

        ``layers``: for each that holds something its formats, policy, window, tokens per sequence, ``capacity``,
        ``nbytes`` as allocated, ``bytes_per_token`` and ``bits_per_element`` of a packed token (gains and centres
        counted); ``packed_attention``: whether attention reads it packed. Beside them ``kv_cache``, ``nbytes``,
        ``bytes_per_token`` and ``bits_per_element`` of all, and ``f16_bytes_per_token``.
        """
        layers = [_layer_report(layer, layer.store) for layer in self._packed_layers() if layer.store is not None]
        elements = sum(layer["f16_bytes_per_token"] for layer in layers) // 2
        per_token = sum(layer["bytes_per_token"] for layer in layers)
        return {
            "kv_cache": self.kv_cache.name,
            "layers": layers,
            "nbytes": self.nbytes,
            "bytes_per_token": per_token,
            "f16_bytes_per_token": 2 * elements,
            "bits_per_element": 8 * per_token / elements if elements else None,
        }


def _layer_report(layer: RotQuantLayer, store: PackedLayer) -> dict[str, Any]:
    info, geometry = store.info, store.geometry
    elements = 2 * info.kv_heads * info.head_dim
    return {
        "layer": layer.index,
        "k": info.k,
        "v": info.v,
        "policy": info.policy.name,
        "kv_heads": info.kv_heads,
        "head_dim": info.head_dim,
        "window": info.window,
        "tokens": store.lengths.tolist(),
        "capacity": store.capacity,
        "nbytes": store.nbytes,
        "bytes_per_token": info.bytes_per_token,
        "f16_bytes_per_token": 2 * elements,
        "bits_per_element": 8 * info.bytes_per_token / elements,
        "k_bits": KVFormat.parse(info.k).bits_per_element(info.head_dim),
        "v_bits": KVFormat.parse(info.v).bits_per_element(info.head_dim),
        "packed_attention": not geometry.readable,
    }


def _layer_count(config: PretrainedConfig) -> int:
    """The number of cache layers; raises ``ModelError`` if one is anything but causal attention."""
    name = f"{config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; RotQuantCache is for decoders")
    if not getattr(config, "is_causal", True):
        raise ModelError(f"{name} attends in both directions; RotQuantCache is for causal decoders")
    if getattr(config, "num_kv_shared_layers", None):
        raise ModelError(f"{name} has layers that read the keys and values of others, which is not supported")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ModelError(f"{name} attends within chunks of the text, which is not supported")
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for index, kind in enumerate(types):
        if kind not in _LAYER_TYPES:
            raise ModelError(f"{name}: layer {index} is {kind!r}; RotQuantCache stores {' and '.join(_LAYER_TYPES)}")
    return len(types)
