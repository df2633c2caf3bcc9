"""What a compiled library says of its KV cache: the JSON of ``kv_cache_info()``, checked and typed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from rotquant_tvm.errors import ArtifactError

INFO_VERSION = 1
LAYOUT_VERSION = 1
TILE_TOKENS = 32


@dataclass(frozen=True)
class LayerInfo:
    """The cache of one layer: its shape and the KV formats of its keys and values."""

    kv_heads: int
    head_dim: int
    k: str
    v: str
    tile_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sequence takes in this layer, all kv heads together."""
        return self.kv_heads * self.tile_bytes / TILE_TOKENS


@dataclass(frozen=True)
class KVCacheInfo:
    """The checked form of a library's ``kv_cache_info()``; ``document`` is the JSON it came from."""

    layers: tuple[LayerInfo, ...]
    vocab_size: int
    max_position: int
    dtype: str
    weights: tuple[str, ...]
    document: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_document(cls, document: object, where: str = "kv_cache_info") -> KVCacheInfo:
        """Check a parsed JSON document.

        ``where`` names its origin in messages. Raises ArtifactError for another version, a missing
        entry or an entry of the wrong kind.
        """
        if not isinstance(document, Mapping):
            raise ArtifactError(f"{where}: expected a JSON object; compile the model again")
        check_version(document, "version", INFO_VERSION, where)
        check_version(document, "layout_version", LAYOUT_VERSION, where)
        layers = entry(document, "layers", list, where)
        names = entry(document, "weights", list, where)
        if not layers or not all(isinstance(name, str) for name in names):
            raise ArtifactError(
                f"{where}: 'layers' is empty or 'weights' holds no names; compile the model again"
            )
        return cls(
            layers=tuple(_layer(layer, f"{where}.layers[{index}]") for index, layer in enumerate(layers)),
            vocab_size=positive(document, "vocab_size", where),
            max_position=positive(document, "max_position", where),
            dtype=entry(document, "dtype", str, where),
            weights=tuple(names),
            document=dict(document),
        )

    @classmethod
    def from_json(cls, text: str, where: str = "kv_cache_info") -> KVCacheInfo:
        """Parse and check the string that the library's ``kv_cache_info()`` returns; raises ArtifactError."""
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{where}: not valid JSON ({error}); compile the model again") from error
        return cls.from_document(document, where)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of cache per token and sequence, all layers together."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of a cache for ``batch`` sequences of ``capacity`` tokens, rounded up to whole tiles."""
        tiles = -(-capacity // TILE_TOKENS)
        return batch * tiles * sum(layer.kv_heads * layer.tile_bytes for layer in self.layers)


def _layer(document: object, where: str) -> LayerInfo:
    if not isinstance(document, Mapping):
        raise ArtifactError(f"{where}: expected a JSON object; compile the model again")
    return LayerInfo(
        kv_heads=positive(document, "kv_heads", where),
        head_dim=positive(document, "head_dim", where),
        k=entry(document, "k", str, where),
        v=entry(document, "v", str, where),
        tile_bytes=positive(document, "tile_bytes", where),
    )


def entry(document: Mapping[str, Any], key: str, kind: type | UnionType, where: str) -> Any:
    """Return ``document[key]``, or raise ArtifactError if it is absent or not of ``kind``."""
    if key not in document:
        raise ArtifactError(f"{where}: no entry {key!r}; compile the model again")
    value = document[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = getattr(kind, "__name__", kind)
        raise ArtifactError(f"{where}: {key!r} is {value!r}, expected {expected}; compile the model again")
    return value


def positive(document: Mapping[str, Any], key: str, where: str) -> int:
    """Return the positive integer ``document[key]``; raises ArtifactError otherwise."""
    value: int = entry(document, key, int, where)
    if value < 1:
        raise ArtifactError(f"{where}: {key!r} is {value}, expected 1 or more; compile the model again")
    return value


def check_version(document: Mapping[str, Any], key: str, expected: int, where: str) -> None:
    """Raise ArtifactError unless ``document[key]`` is the version that this release reads."""
    value = document.get(key)
    if value != expected or isinstance(value, bool):
        raise ArtifactError(
            f"{where}: {key} is {value!r} and this release reads {expected}; "
            "compile the model again with this release"
        )
