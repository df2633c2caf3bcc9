"""Splitting a chunk's keys into centres and remainders, for simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops
from rotquant_tvm.formats.centre import decode_centre, encode_centre


@pytest.mark.parametrize(("sinks", "center"), [(0, 32), (4, 64), (5, 0), (200, 32)])
def test_remainder_and_centre(kernels, rng, poisoned, sinks, center):
    """Against NumPy block by block; tokens past a row's length do not move its means."""
    lengths = np.array([150, 1, 97], np.int32)
    x = rng.standard_normal((3, 2, 150, 48)).astype(np.float32) + 3
    kernel = kernels.build(ops.split_centre, 2, 48, "float32", sinks, center)
    outputs = [poisoned(x.shape, x.dtype) for _ in range(2)]
    remainder, centre = kernels.run(kernel, x, lengths, *outputs, writes=(2, 3))
    np.testing.assert_allclose(remainder + centre, np.where(centre == x, x, remainder + centre), atol=1e-6)
    for b, length in enumerate(lengths):
        kept = slice(0, min(sinks, length))
        np.testing.assert_array_equal(centre[b, :, kept], x[b, :, kept].astype(np.float16).astype(np.float32))
        assert not remainder[b, :, kept].any()
        for first in range(sinks, length, center or 32):
            part = slice(first, min(first + (center or 32), length))
            mean = x[b, :, part].mean(1) if center else np.zeros((2, 48))
            stored = decode_centre(encode_centre(mean))[:, None]
            step = np.abs(mean).max() / 127
            assert (np.abs(centre[b, :, part] - stored) <= 1.1 * step).all()
            np.testing.assert_allclose(remainder[b, :, part], x[b, :, part] - centre[b, :, part], atol=1e-5)
