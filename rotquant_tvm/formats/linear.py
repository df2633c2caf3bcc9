"""Linear codes in blocks of 32 elements, one fp16 scale each: llama.cpp's q8_0 and q4_0.

    q8_0  scale = amax/127                    code = x/scale rounded to even, in ±127      x̂ = scale · code
    q4_0  scale = (the element that is largest in magnitude)/−8, so with a sign of its own
          code = ⌊x/scale + 8 + 1/2⌋, in 0 … 15                                            x̂ = scale · (code − 8)

Codes are chosen for the scale as it is stored. At q4_0 the largest element lies on the code 0 exactly, and the
range has one step more on its side than on the other; of equal ones the first counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .gains import HALF_MAX

LINEAR_BLOCK = 32
"""How many neighbouring elements share one scale."""

LINEAR_LIMIT = 127
"""The largest code of q8_0."""

NIBBLE_ZERO = 8
"""The code of q4_0 that stands for 0."""


def encode_linear(x: NDArray[Any], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Encode x [..., d] in 8 or 4 bits: codes uint8 [..., d] (int8 bit patterns at 8 bits), scales [..., ⌈d/32⌉]."""
    dim = x.shape[-1]
    blocks = -(-dim // LINEAR_BLOCK)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, blocks * LINEAR_BLOCK - dim)]
    padded = np.pad(x, padding).reshape(*x.shape[:-1], blocks, LINEAR_BLOCK)
    if bits == 8:
        largest = np.abs(padded).max(-1) / LINEAR_LIMIT
    else:
        at = np.abs(padded).argmax(-1)[..., None]
        largest = np.take_along_axis(padded, at, -1)[..., 0] / -NIBBLE_ZERO
    gain = np.clip(largest, -HALF_MAX, HALF_MAX).astype(np.float16)
    scale = gain.astype(x.dtype)[..., None]
    quotient = np.divide(padded, scale, out=np.zeros_like(padded), where=scale != 0)
    if bits == 8:
        codes = np.clip(np.rint(quotient), -LINEAR_LIMIT, LINEAR_LIMIT).astype(np.int8).view(np.uint8)
    else:
        codes = np.clip(np.floor(quotient + (NIBBLE_ZERO + 0.5)), 0, 15).astype(np.uint8)
    flat = codes.reshape(*x.shape[:-1], blocks * LINEAR_BLOCK)[..., :dim]
    return np.ascontiguousarray(flat), gain


def linear_values(codes: NDArray[Any], bits: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return what codes of 8 or 4 bits stand for, in units of their scale."""
    values: NDArray[Any] = (codes.view(np.int8) if bits == 8 else codes.astype(np.int8) - NIBBLE_ZERO).astype(dtype)
    return values


def scale_of_elements(gain: NDArray[Any], dim: int) -> NDArray[Any]:
    """Return the scale [..., dim] of each element, from those of the blocks [..., ⌈dim/32⌉]."""
    return np.repeat(gain, LINEAR_BLOCK, axis=-1)[..., :dim]
