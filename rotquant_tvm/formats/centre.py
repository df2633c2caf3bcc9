"""Centres of K: the mean key of a block, stored as int8 times one scale.

A centre is subtracted from the keys of its block before they are quantized and comes back exactly (attention adds
⟨q, centre⟩ to the block's scores), so its own rounding costs nothing but a slightly larger remainder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LIMIT = 127


def centre_words(head_dim: int) -> int:
    """Return the 32-bit words of a centre: ``head_dim`` int8, then a float32 scale."""
    return head_dim // 4 + 1


def encode_centre(mean: ArrayLike) -> NDArray[np.uint32]:
    """Encode means [..., d] as uint32 [..., d/4 + 1]: codes round(mean/scale) in ±127, scale = max|mean|/127."""
    values = np.asarray(mean, np.float32)
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(LIMIT)
    ratio = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    codes = np.clip(np.rint(ratio), -LIMIT, LIMIT).astype(np.int8)
    return np.concatenate([np.ascontiguousarray(codes).view(np.uint32), scale.view(np.uint32)], axis=-1)


def decode_centre(words: ArrayLike) -> NDArray[Any]:
    """Undo ``encode_centre``: uint32 [..., d/4 + 1] -> float32 [..., d]."""
    stored = np.ascontiguousarray(words, dtype=np.uint32)
    codes = np.ascontiguousarray(stored[..., :-1]).view(np.int8)
    decoded: NDArray[Any] = codes.astype(np.float32) * np.ascontiguousarray(stored[..., -1:]).view(np.float32)
    return decoded
