"""The codebook of TurboQuant's 2.5 and 3.5 bits: the first half of the rotated channels has one bit more.

A Hadamard or dense rotation makes all channels alike, so which half it is does not matter; the two halves have a
codebook each (TurboQuant, arXiv:2504.19874). A code of the first half keeps its low bits with the other codes and its
top bit in a plane of its own (``packing``: the extra section).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .codebook import Codebook


@dataclass(frozen=True)
class SplitCodebook:
    """``bits`` bits for the second half of ``head_dim`` channels, one more for the first."""

    bits: int
    head_dim: int

    @cached_property
    def wide(self) -> Codebook:
        """The codebook of the first half."""
        return Codebook(self.bits + 1, self.head_dim)

    @cached_property
    def narrow(self) -> Codebook:
        """The codebook of the second half."""
        return Codebook(self.bits, self.head_dim)

    def nearest(self, y: ArrayLike, norm: ArrayLike = 1.0) -> NDArray[np.uint8]:
        """Return uint8 codes of y [..., head_dim], as ``Codebook.nearest`` does."""
        first, second = np.split(np.asarray(y), 2, axis=-1)
        return np.concatenate([self.wide.nearest(first, norm), self.narrow.nearest(second, norm)], axis=-1)

    def decode(self, codes: NDArray[Any], dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Return the centroids of codes [..., head_dim]."""
        first, second = np.split(codes, 2, axis=-1)
        return np.concatenate([self.wide.decode(first, dtype), self.narrow.decode(second, dtype)], axis=-1)

    def middle(self) -> NDArray[np.uint8]:
        """Return the codes of a vector of zeros, uint8 [head_dim]."""
        return np.repeat([self.wide.middle(), self.narrow.middle()], self.head_dim // 2).astype(np.uint8)
