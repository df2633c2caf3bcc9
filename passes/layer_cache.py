"""The arrays that hold one layer's keys and values, as Relax types and as the compiled library describes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import TOKENS, Codec, TileLayout
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.window_ring import WindowRing

from .find_attention import AttentionSite

Size = Any


@dataclass(frozen=True)
class LayerCache:
    """How the keys and values of one attention site are stored."""

    site: AttentionSite
    codec_k: Codec
    codec_v: Codec
    policy: CachePolicy

    @classmethod
    def of(cls, site: AttentionSite, count: int, config: KVCacheConfig) -> LayerCache:
        """Return the cache of a site, one of ``count``; raises ``FormatError`` for its head dimension."""
        codecs = config.codecs(site.index, count, site.head_dim)
        return cls(site, *codecs, config.layer_policy(site.index, count))

    @property
    def ring(self) -> WindowRing | None:
        """The ring that the tiles are, if the layer has a window."""
        return WindowRing(self.site.window, self.policy) if self.site.window else None

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """The K and V codec."""
        return self.codec_k, self.codec_v

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile: 32 tokens of one kv head."""
        return TileLayout(self.codec_k.format, self.codec_v.format, self.site.head_dim).tile_bytes

    def types(self, batch: Size, tiles: Size, blocks: Size) -> dict[str, relax.TensorType]:
        """The arrays in order, by name; ``blocks`` counts the centres."""
        heads, head_dim = self.site.kv_heads, self.site.head_dim
        types = {"cache": relax.TensorType([batch, heads, tiles, self.tile_bytes // 4], "uint32")}
        if self.policy.center:
            types["centre"] = relax.TensorType([batch, heads, blocks, centre_words(head_dim)], "uint32")
        if self.policy.segmented:
            types["plain"] = relax.TensorType([batch, heads, 2, self.policy.slots, head_dim], "float16")
        return types

    def parameters(self, batch: Size) -> list[relax.Var]:
        """Variables for the arrays; all layers of one policy and window have as many tiles."""
        window = f"_window{self.site.window}" if self.ring else ""
        suffix = window if self.policy.segmented else f"_straight{window}"
        tiles, blocks = tirx.Var(f"tiles{suffix}", "int64"), tirx.Var(f"blocks{window}", "int64")
        return [
            relax.Var(f"{name}_{self.site.index}", type_) for name, type_ in self.types(batch, tiles, blocks).items()
        ]

    def created(self, batch: Size, capacity: Size) -> list[relax.TensorType]:
        """The types of the arrays for ``capacity`` tokens (a symbolic size).

        The tiles are as many as ``CachePolicy.packed_tiles`` says, or as ``WindowRing`` does if these are fewer.
        """
        policy = self.policy
        one = tirx.const(1, "int64")
        longest = capacity - (policy.sinks + policy.recent)
        if policy.block == 1:
            tiles = tvm.tirx.max((longest + (TOKENS - 1)) // TOKENS, one)
        else:
            tiles = tvm.tirx.max(longest // policy.block, one) * (policy.block // TOKENS)
        if self.ring is not None:
            tiles = tvm.tirx.min(tiles, tirx.const(self.ring.tiles, "int64"))
        blocks = tiles // (policy.center // TOKENS) if policy.center else one
        return list(self.types(batch, tiles, blocks).values())

    def describe(self) -> dict[str, Any]:
        """What ``kv_cache_info()`` says of the layer (plain data)."""
        described = {
            "kv_heads": self.site.kv_heads,
            "head_dim": self.site.head_dim,
            "k": self.codec_k.format.name,
            "v": self.codec_v.format.name,
            "tile_bytes": self.tile_bytes,
        }
        if self.policy.segmented:
            described["policy"] = asdict(self.policy)
        if self.ring is not None:
            described |= {"window": self.ring.window, "tokens_kept": self.ring.tokens}
        return described
