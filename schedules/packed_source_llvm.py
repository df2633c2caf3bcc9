"""Feeds packed tiles to the CPU attention core."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Codec, KeyLayout, TileLayout

from .attention_core_llvm import AttentionCore
from .split_values_llvm import SplitValues
from .tile_values_llvm import TileGains, TileValues
from .trellis_llvm import TrellisValues
from .vector_ops import lanes, splat

Expr = Any


def tile_values(
    codec: Codec, layout: TileLayout | KeyLayout, role: str, target: tvm.target.Target
) -> TileValues | TrellisValues | SplitValues:
    """What unpacks the codes of a codec's format (of a sketched one, those that are not signs)."""
    kinds = {"trellis": TrellisValues, "split": SplitValues}
    return kinds.get(codec.format.codebook, TileValues)(codec, layout, role, target)


class PackedSource:
    """Unpacks tiles of a cache into a core's keys, values and gains."""

    def __init__(
        self, core: AttentionCore, codecs: tuple[Codec, Codec], layout: TileLayout, target: tvm.target.Target
    ) -> None:
        self.core, self.codecs, self.layout = core, codecs, layout
        self.values = [tile_values(c, layout, role, target) for c, role in zip(codecs, "kv", strict=True)]
        self.gains = [TileGains(layout, role) for role in "kv"]
        self.tables = [values.table() for values in self.values]
        most = max(values.scratch_words for values in self.values)
        self.words = T.alloc_buffer((most * 32,), "uint32")

    def load(self, cache: Any, tile: list[Expr]) -> None:
        """Unpack the tile at ``cache[(*tile, :)]``."""

        def words(first: Expr) -> Expr:
            return cache[(*tile, lanes(first))]

        outputs = (self.core.keys, self.core.values)
        targets = (self.core.gain_k, self.core.gain_v)
        for index in range(2):
            values, gains = self.values[index], self.gains[index]
            values.unpack(words, self.tables[index], self.words, outputs[index])
            if self.codecs[index].codebook is not None:
                gains.in_token_order(words, targets[index], values.unit)
                continue
            if self.codecs[index].format.codebook == "linear":
                gains.scale_blocks(words, self.core.head_dim, outputs[index])
            for s in range(2):
                T.buffer_store(targets[index], splat(1.0), [lanes(16 * s)])
