"""Dequantize: the keys and values of a packed cache, in the rotated basis, zero past the lengths."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops

from .cases import CASES, SKETCHES
from .reference import filled_cache, stored_kv

LENGTHS = np.array([0, 1, 31, 32, 33, 96], np.int32)


def tolerance(case, expected):
    """A sketch's share of an element is a sum over d."""
    sketched = any(codec.sketch is not None for codec in case.codecs)
    return 2e-6 * np.nanmax(np.abs(expected[np.isfinite(expected)])) if sketched else 1e-30


@pytest.mark.parametrize("case", CASES + SKETCHES, ids=str)
def test_dequantize_cache_is_the_formats_decode(kernels, rng, poisoned, case):
    cache = filled_cache(rng, case.codecs, case.kv_heads, 3, LENGTHS)
    shape = (len(LENGTHS), case.kv_heads, 96, case.head_dim)
    outputs = [poisoned(shape, "float32") for _ in "kv"]
    kernel = kernels.build(ops.dequantize_cache, *case.codecs, case.kv_heads)
    sketches = [codec.sketch.inverse().data for codec in case.codecs if codec.sketch is not None]
    results = kernels.run(kernel, cache, LENGTHS, *sketches, *outputs, writes=(-2, -1))
    for actual, expected in zip(results, stored_kv(case.codecs, cache), strict=True):
        for b, length in enumerate(LENGTHS):
            close = {"rtol": 1e-6, "atol": tolerance(case, expected)}
            np.testing.assert_allclose(actual[b, :, :length], expected[b, :, :length], **close)
            assert (actual[b, :, length:] == 0).all()
