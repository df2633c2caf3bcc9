"""Codebooks: Lloyd–Max for one coordinate of a uniform unit vector, on an int8 grid times one scale.

The tables are frozen per (bits, head_dim), so that NumPy, llvm and CUDA agree; ``codebook_generator`` writes
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..errors import FormatError
from .codebook_tables import TABLES

HEAD_DIMS = tuple(TABLES)
"""The head dimensions that KV formats take: the multiples of 16 from 32 to 256, and 512."""

CODEBOOK_BITS = (1, 2, 3, 4)
"""The bit widths that have a codebook."""


@dataclass(frozen=True)
class Codebook:
    """The 2^bits centroids of a bit width (1 to 4) and head dimension (``HEAD_DIMS``).

    Raises ``FormatError`` for other bit widths and head dimensions.
    """

    bits: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.bits not in CODEBOOK_BITS:
            raise FormatError(f"codebooks have 1, 2, 3 or 4 bits, not {self.bits}")
        if self.head_dim not in TABLES:
            raise FormatError(
                f"no codebook for head_dim {self.head_dim}; it must be a multiple of 16 from 32 to 256, or 512"
            )

    @cached_property
    def grid(self) -> NDArray[np.int8]:
        """int8 [2^bits], ascending, antisymmetric: grid[2^bits − 1 − i] = −grid[i]."""
        half = np.array(TABLES[self.head_dim][self.bits - 1][1], dtype=np.int8)
        return _frozen(np.concatenate([-half[::-1], half]))

    @cached_property
    def scale(self) -> np.float32:
        """The factor from the grid to the unit vector's domain."""
        return np.float32(TABLES[self.head_dim][self.bits - 1][0])

    @cached_property
    def centroids(self) -> NDArray[np.float32]:
        """float32 [2^bits]: grid · scale, for coordinates of unit vectors."""
        return _frozen(self.grid.astype(np.float32) * self.scale)

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """float32 [2^bits − 1], ascending: the midpoints of neighbouring centroids."""
        middles = (self.grid[1:].astype(np.float32) + self.grid[:-1].astype(np.float32)) / np.float32(2)
        return _frozen(middles * self.scale)

    def nearest(self, y: ArrayLike, norm: ArrayLike = 1.0) -> NDArray[np.uint8]:
        """Return uint8 codes, the shape of ``y``: how many boundaries b there are with y > b·norm."""
        values = np.asarray(y)
        radius = np.asarray(norm, dtype=values.dtype)
        codes = np.zeros(values.shape, dtype=np.uint8)
        for boundary in self.boundaries.astype(values.dtype):
            codes += values > boundary * radius
        return codes

    def decode(self, codes: NDArray[Any], dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Return the centroids of codes."""
        values: NDArray[Any] = self.centroids.astype(dtype)[codes]
        return values

    def middle(self) -> int:
        """Return the code of the elements of a vector of zeros."""
        return int(2 ** (self.bits - 1))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array
