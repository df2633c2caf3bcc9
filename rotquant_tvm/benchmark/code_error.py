"""How far what a kernel quantized is from what the NumPy reference makes of the same vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotquant_tvm.formats import Codec, EncodedKV

Array = NDArray[Any]

GAIN_TOLERANCE = 2.0**-9
"""Relative: two units of a gain's last place, which the order of a sum decides."""

STEP_TOLERANCE = 0.02
"""Of a coordinate's standard deviation: far below any codebook's step, far above fp16's rounding."""


def code_error(codec: Codec, x: Array, found: EncodedKV) -> float:
    """Return the share of codes, or of gains if that is more, that are not the reference's.

    Of a trellis, whose search may end on another path as short: by how much the squared error is more, relative.
    """
    expected = codec.encode(x, np.float32)
    if codec.format.codebook == "trellis":
        ours, best = (np.square(codec.decode(e) - x).sum() for e in (found, expected))
        return float(abs(ours / best - 1))
    codes = float(np.mean(found.codes != expected.codes))
    if not expected.gain.size:
        return codes
    ours, theirs = found.gain.astype(np.float64), expected.gain.astype(np.float64)
    return max(codes, float(np.mean(~(np.abs(ours - theirs) <= GAIN_TOLERANCE * np.abs(theirs)))))


def roundtrip_error(codec: Codec, x: Array, found: Array) -> float:
    """Return the share of coordinates, in the rotated basis, that are off by a step of the codebook."""
    expected = codec.decode_rotated(codec.encode(x, np.float32))
    deviation = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(codec.head_dim)
    return float(np.mean(~(np.abs(codec.rotate(found.astype(np.float64)) - expected) <= STEP_TOLERANCE * deviation)))
