"""What a compiled library says of its KV cache: the JSON of ``kv_cache_info()``, checked and typed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from rotquant_tvm.cache_policy import NO_POLICY, TILE_TOKENS, CachePolicy
from rotquant_tvm.errors import ArtifactError, UsageError
from rotquant_tvm.window_ring import WindowRing

INFO_VERSION = 3
"""The version that this release writes. Version 3 says of a layer if it keeps a window's tokens only."""
READABLE = (2, 3)
"""Versions that this release reads. Those before 3 have no such layers, and what they say is the same."""
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class LayerInfo:
    """The cache of one layer: its shape, the KV formats of its keys and values, and its policy.

    ``window``: the layer keeps only what so many tokens need, in a ring of tiles; None keeps every token.
    """

    kv_heads: int
    head_dim: int
    k: str
    v: str
    tile_bytes: int
    policy: CachePolicy = NO_POLICY
    window: int | None = None

    @property
    def ring(self) -> WindowRing | None:
        """The ring that the tiles are, if the layer has a window."""
        return None if self.window is None else WindowRing(self.window, self.policy)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one packed token of one sequence takes in this layer, all kv heads together."""
        centre = self._centre_bytes / self.policy.center if self.policy.center else 0.0
        return self.kv_heads * (self.tile_bytes / TILE_TOKENS + centre)

    def cache_bytes(self, capacity: int) -> int:
        """Bytes of the layer's arrays for one sequence of ``capacity`` tokens, as they are allocated."""
        tiles = self.policy.packed_tiles(capacity) if self.policy.segmented else -(-capacity // TILE_TOKENS)
        if self.ring is not None:
            tiles = min(tiles, self.ring.tiles)
        if not self.policy.segmented:
            return self.kv_heads * self.tile_bytes * tiles
        blocks = tiles * TILE_TOKENS // self.policy.center if self.policy.center else 0
        plain = 4 * self.head_dim * self.policy.slots
        return self.kv_heads * (tiles * self.tile_bytes + blocks * self._centre_bytes + plain)

    @property
    def _centre_bytes(self) -> int:
        return self.head_dim + 4  # int8 codes and a float32 scale


@dataclass(frozen=True)
class KVCacheInfo:
    """The checked form of a library's ``kv_cache_info()``; ``document`` is the JSON it came from.

    ``batch`` is the one number of sequences that the library was compiled for, or None if it takes any;
    ``max_batch`` the most that its kernels take, or None. ``recordable``: a step's launches may be replayed.
    ``every_logit``: there is a function ``verify``, which returns the logits after every token.
    """

    layers: tuple[LayerInfo, ...]
    vocab_size: int
    max_position: int
    dtype: str
    weights: tuple[str, ...]
    batch: int | None = None
    max_batch: int | None = None
    recordable: bool = False
    every_logit: bool = False
    document: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def from_document(cls, document: object, where: str = "kv_cache_info") -> KVCacheInfo:
        """Check a parsed JSON document.

        ``where`` names its origin in messages. Raises ArtifactError for another version, a missing
        entry or an entry of the wrong kind.
        """
        if not isinstance(document, Mapping):
            raise ArtifactError(f"{where}: expected a JSON object; compile the model again")
        check_version(document, "version", READABLE, where)
        check_version(document, "layout_version", (LAYOUT_VERSION,), where)
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
            batch=positive(document, "batch", where) if "batch" in document else None,
            max_batch=positive(document, "max_batch", where) if "max_batch" in document else None,
            recordable=entry(document, "recordable", bool, where) if "recordable" in document else False,
            every_logit=entry(document, "every_logit", bool, where) if "every_logit" in document else False,
            document=dict(document),
        )

    @classmethod
    def from_json(cls, text: str, where: str = "kv_cache_info") -> KVCacheInfo:
        """Parse and check the string that the library's ``kv_cache_info()`` returns; raises ArtifactError."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not valid JSON ({error}); compile the model again") from error
        return cls.from_document(document, where)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of cache per token and sequence, all layers together."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of the arrays of a cache for ``batch`` sequences of ``capacity`` tokens, as they are allocated."""
        return batch * sum(layer.cache_bytes(capacity) for layer in self.layers)

    @property
    def policy(self) -> CachePolicy:
        """The policy that the layers which have one share."""
        return next((layer.policy for layer in self.layers if layer.policy.segmented), CachePolicy())

    @property
    def rings(self) -> tuple[WindowRing, ...]:
        """The different rings of the layers that have a window."""
        return tuple(dict.fromkeys(layer.ring for layer in self.layers if layer.ring is not None))


def _layer(document: object, where: str) -> LayerInfo:
    if not isinstance(document, Mapping):
        raise ArtifactError(f"{where}: expected a JSON object; compile the model again")
    layer = LayerInfo(
        kv_heads=positive(document, "kv_heads", where),
        head_dim=positive(document, "head_dim", where),
        k=entry(document, "k", str, where),
        v=entry(document, "v", str, where),
        tile_bytes=positive(document, "tile_bytes", where),
        policy=_policy(document, where),
        window=positive(document, "window", where) if "window" in document else None,
    )
    if layer.ring is not None and positive(document, "tokens_kept", where) != layer.ring.tokens:
        raise ArtifactError(
            f"{where}: it keeps {document['tokens_kept']} tokens for a window of {layer.window} and this release keeps "
            f"{layer.ring.tokens}; compile the model again with this release"
        )
    return layer


def _policy(document: Mapping[str, Any], where: str) -> CachePolicy:
    options = entry(document, "policy", Mapping, where) if "policy" in document else {}
    try:
        return CachePolicy().changed(options)
    except UsageError as error:
        raise ArtifactError(f"{where}: {error}; compile the model again") from error


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


def check_version(document: Mapping[str, Any], key: str, readable: Sequence[int], where: str) -> None:
    """Raise ArtifactError unless ``document[key]`` is a version that this release reads."""
    value = document.get(key)
    if value not in readable or isinstance(value, bool):
        raise ArtifactError(
            f"{where}: {key} is {value!r} and this release reads {' and '.join(map(str, readable))}; "
            "compile the model again with this release"
        )
