"""Dequantize: the keys and values of a packed cache, in the rotated basis, zero past the lengths."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops

from .cases import CASES
from .reference import filled_cache, stored_kv

LENGTHS = np.array([0, 1, 31, 32, 33, 96], np.int32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequantize_cache_is_the_formats_decode(kernels, rng, poisoned, case):
    cache = filled_cache(rng, case.codecs, case.kv_heads, 3, LENGTHS)
    shape = (len(LENGTHS), case.kv_heads, 96, case.head_dim)
    outputs = [poisoned(shape, "float32") for _ in "kv"]
    kernel = kernels.build(ops.dequantize_cache, *case.codecs, case.kv_heads)
    results = kernels.run(kernel, cache, LENGTHS, *outputs, writes=(2, 3))
    for actual, expected in zip(results, stored_kv(case.codecs, cache), strict=True):
        for b, length in enumerate(LENGTHS):
            np.testing.assert_allclose(actual[b, :, :length], expected[b, :, :length], rtol=1e-6, atol=1e-30)
            assert (actual[b, :, length:] == 0).all()
