"""What a compiled attention depends on, beside its tensors and rotations; layers alike in it share one library."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..cache_policy import CachePolicy
from ..errors import ModelError
from ..formats import Rotation, TileLayout
from ..kv_cache_config import KVCacheConfig, LayerFormats


@dataclass(frozen=True)
class AttentionGeometry:
    """Heads, softmax scale, window and softcap of one attention, its KV formats (``K/V``) and its cache policy.

    ``dtype``: of queries, new keys and values and of the output, "float32" or "float16". ``readable``: the library also
    has a function that returns all stored keys and values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    dtype: str
    formats: str
    policy: str
    readable: bool = False

    def config(self) -> KVCacheConfig:
        """The cache configuration of this one layer."""
        return KVCacheConfig(LayerFormats.parse(self.formats), policy=CachePolicy.parse(self.policy))

    def key(self) -> str:
        """A text that two geometries share only if they are equal."""
        return json.dumps(asdict(self), sort_keys=True)

    def check(self) -> AttentionGeometry:
        """Return itself; raises ``ModelError`` for heads that do not fit, ``FormatError`` for the head dimension."""
        if self.heads % self.kv_heads:
            raise ModelError(f"{self.heads} query heads are no multiple of {self.kv_heads} key heads")
        formats = self.config().formats
        for fmt in (formats.k, formats.v):
            fmt.check(self.head_dim)
        return self

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of one kv head."""
        formats = self.config().formats
        return TileLayout(formats.k, formats.v, self.head_dim).tile_bytes


ROTATIONS = ("rotation_k", "inverse_k", "rotation_v", "inverse_v")
"""Coefficients that a library takes, in this order; identities are left out."""


def layer_rotations(config: KVCacheConfig, index: int, count: int, head_dim: int) -> dict[str, Rotation]:
    """The rotations of layer ``index`` of ``count`` and their inverses, by the names in ``ROTATIONS``.

    They are what a compile of the whole model draws for that layer.
    """
    codecs = config.codecs(index, count, head_dim)
    pairs = [rotation for codec in codecs for rotation in (codec.rotation, codec.inverse_rotation)]
    return {
        name: rotation for name, rotation in zip(ROTATIONS, pairs, strict=True) if not rotation.identity
    }
