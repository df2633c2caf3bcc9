"""Caches of random but valid contents: one layer's arrays, as the kernels take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import TOKENS, Codec, KVFormat, TileLayout
from rotquant_tvm.formats.centre import centre_words
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.site_shape import SiteShape

from .device import BenchmarkDevice
from .settings import Settings

_LINEAR_STEP = {8: 1 / 64, 4: 1 / 4}
"""What makes values of about 1 of a linear format's codes, by its bits."""


@dataclass(frozen=True)
class CacheSpec:
    """How one layer's keys and values are stored, for ``batch`` sequences of up to ``capacity`` tokens."""

    codec_k: Codec
    codec_v: Codec
    policy: CachePolicy
    batch: int
    kv_heads: int
    capacity: int

    @classmethod
    def of(cls, kv_cache: str, settings: Settings, batch: int, capacity: int) -> CacheSpec:
        """Read a configuration; raises ``FormatError`` or ``UsageError``."""
        config = KVCacheConfig.parse(kv_cache)
        codecs = config.codecs(0, 1, settings.head_dim)
        return cls(*codecs, config.layer_policy(0, 1), batch, settings.kv_heads, capacity)

    @property
    def head_dim(self) -> int:
        """The head dimension."""
        return self.codec_k.head_dim

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """The K and V codec."""
        return self.codec_k, self.codec_v

    @property
    def layout(self) -> TileLayout:
        """The packed tiles' layout."""
        return TileLayout(self.codec_k.format, self.codec_v.format, self.head_dim)

    @property
    def tiles(self) -> int:
        """Packed tiles per sequence and kv head."""
        return self.policy.packed_tiles(self.capacity)

    def site(self, settings: Settings, chunk: bool) -> SiteShape:
        """The attention that reads this cache."""
        k, v = (codec.format.name for codec in self.codecs)
        heads, scale = (settings.heads, self.kv_heads, self.head_dim), 1 / math.sqrt(self.head_dim)
        return SiteShape(k, v, *heads, scale, None, settings.dtype, chunk, policy=self.policy.name)

    def packed(self, lengths: Sequence[int]) -> NDArray[np.int32]:
        """How many tokens behind the sinks are in tiles once these lengths were reached token by token."""
        values = np.asarray(lengths, np.int32)
        return self.policy.packed_after(np.zeros_like(values), values, chunk=False)

    def stored_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes of all that is stored of sequences of these lengths: whole tiles, centres and 16-bit tokens."""
        total = 0
        for length, packed in zip(lengths, self.packed(lengths), strict=True):
            total += -(-int(packed) // TOKENS) * self.layout.tile_bytes
            if self.policy.center:
                total += -(-int(packed) // self.policy.center) * 4 * centre_words(self.head_dim)
            total += (length - int(packed)) * 2 * self.head_dim * 2
        return total * self.kv_heads

    def random(self, device: BenchmarkDevice) -> list[Any]:
        """Arrays in the order of ``segment_arguments``, the counts left out, with random contents."""
        arrays = [device.argument(self._random_tiles(device))]
        if self.policy.center:
            blocks = -(-self.tiles * TOKENS // self.policy.center)
            centres = device.words((self.batch, self.kv_heads, blocks, centre_words(self.head_dim)))
            scales = device.uniform(0.2 / 127, 0.5 / 127, (self.batch, self.kv_heads, blocks), "float32")
            device.view(centres, "float32")[..., -1] = scales
            arrays.append(device.argument(centres))
        if self.policy.segmented:
            rows = (self.batch, self.kv_heads, 2, self.policy.slots, self.head_dim)
            arrays.append(device.argument(device.normal(rows, "float16")))
        return arrays

    def _random_tiles(self, device: BenchmarkDevice) -> Any:
        """Any bits are valid codes; gains are such that values are about 1, and 16-bit values are normal."""
        lead, layout = (self.batch, self.kv_heads, self.tiles), self.layout
        words = device.words((*lead, layout.tile_bytes // 4))
        halves = device.view(words, "float16")
        for role, codec in zip("kv", self.codecs, strict=True):
            codes, gains = (layout.sections[f"{role}_{part}"] for part in ("codes", "gains"))
            place = slice(gains.offset // 2, (gains.offset + gains.nbytes) // 2)
            low, high = _gain_range(codec.format, self.head_dim)
            halves[..., place] = device.uniform(low, high, (*lead, gains.nbytes // 2), "float16")
            if codec.format.bits == 16:
                dtype = "float16" if codec.format.codebook == "half" else "bfloat16"
                place = slice(codes.offset // 2, (codes.offset + codes.nbytes) // 2)
                device.view(words, dtype)[..., place] = device.normal((*lead, codes.nbytes // 2), dtype)
        return words


def _gain_range(kv_format: KVFormat, head_dim: int) -> tuple[float, float]:
    scale = _LINEAR_STEP[kv_format.bits] if kv_format.codebook == "linear" else math.sqrt(head_dim)
    return 0.5 * scale, 1.5 * scale
