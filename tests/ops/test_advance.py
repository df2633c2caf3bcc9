"""Advance: lengths grow in place."""

from __future__ import annotations

import numpy as np

from rotquant_tvm import ops


def test_lengths_grow_by_the_new_tokens(kernels):
    lengths = np.array([0, 5, 31, 2**20, 7], np.int32)
    new = np.array([3, 0, 1, 512, 0], np.int32)
    after = kernels.run(kernels.build(ops.advance), lengths, new, writes=(0,))
    np.testing.assert_array_equal(after, lengths + new)


def test_one_sequence(kernels):
    lengths, new = np.array([9], np.int32), np.array([1], np.int32)
    after = kernels.run(kernels.build(ops.advance), lengths, new, writes=(0,))
    assert after.tolist() == [10]
