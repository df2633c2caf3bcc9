"""Tiles of vectors alone, for search: a tile of the cache without its values.

Sections are those of K in ``TileLayout``, in the same order and each laid out in the same way, so that whatever reads
the keys of a cache's tile reads these.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError
from .codec import EncodedKV
from .kv_format import KVFormat
from .packing import TOKENS, check_encoded, low_bits, pack_codes, pack_gains, pack_plane, unpack_role
from .sections import Section, sections_in_order


@dataclass(frozen=True)
class KeyLayout:
    """The layout of tiles of 32 vectors in a format at a head dimension; ``k`` is the format, as in ``TileLayout``.

    Raises ``FormatError`` if the format cannot take the head dimension.
    """

    k: KVFormat
    head_dim: int

    def __post_init__(self) -> None:
        self.k.check(self.head_dim)

    @cached_property
    def sections(self) -> dict[str, Section]:
        """The sections by name, in storage order: k_codes, k_gains, k_extra."""
        sizes = {
            "k_codes": 4 * self.head_dim * self.k.bits,
            "k_gains": 2 * TOKENS * self.k.gains_per_vector(self.head_dim),
            "k_extra": 4 * self.k.plane_dims(self.head_dim),
        }
        return sections_in_order(sizes)

    @property
    def tile_bytes(self) -> int:
        """Bytes per tile, a multiple of 64."""
        return sum(section.nbytes for section in self.sections.values())

    def pack(self, encoded: EncodedKV) -> NDArray[np.uint8]:
        """Pack encoded vectors [..., 32, d] into tiles: uint8 [..., tile_bytes].

        Raises ``UsageError`` for codes or gains of another shape or dtype, or a code beyond its bits.
        """
        codes, gain = check_encoded(encoded, self.k, self.head_dim)
        parts = (
            pack_codes(low_bits(codes, self.k), "k", self.k.bits),
            pack_gains(gain),
            pack_plane(codes, "k", self.k),
        )
        return np.concatenate(parts, axis=-1)

    def unpack(self, tiles: ArrayLike) -> EncodedKV:
        """Undo ``pack``. Raises ``UsageError`` for tiles of another size or dtype."""
        values = np.asarray(tiles)
        if values.dtype != np.uint8 or values.ndim == 0 or values.shape[-1] != self.tile_bytes:
            raise UsageError(
                f"tiles are {values.dtype} {list(values.shape)}; {self.k.name} at head_dim {self.head_dim} "
                f"needs uint8 [..., {self.tile_bytes}]"
            )
        return unpack_role(values, self.sections, "k", self.k, self.head_dim)
