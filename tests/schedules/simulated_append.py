"""The simulated GPU with what append uses besides: copies that may be empty, and sums that are rounded or clipped."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
from rotquant_tvm.schedules import append_cuda

from .cuda_targets import target_of
from .simulated_decode import DecodeBlock, DecodeGPU
from .simulated_gpu import dtype_of


class AppendGPU(DecodeGPU):
    """Runs one launch."""

    def block(self, count, variables):
        return AppendBlock(self, count, variables)


class AppendBlock(DecodeBlock):
    """The threads of one block."""

    def call_ptx_cp_async_cg_src_size(self, args, words, expr) -> None:
        """Copy 16 bytes, of which those past the source's size are zeros; a source of none is not read."""
        target, source = (self._address(arg) for arg in args[:2])
        assert int(args[2].value) == 16
        size, before = self.value(args[3]), self.active
        assert np.isin(size[before], (0, 16)).all()
        buffer, at = target
        unit = np.dtype(dtype_of(buffer))
        assert ((at * unit.itemsize)[before] % 16 == 0).all()
        self.write(buffer, at, [np.zeros(self.threads, unit)] * (16 // unit.itemsize))
        self.active = before & (size == 16)
        if self.active.any():
            values = self._units(*source, 4, np.dtype("u4"))
            self.write(buffer, at, list(np.ascontiguousarray(np.stack(values, -1)).view(unit).T))
        self.active = before

    def call_ptx_add(self, args, words, expr) -> None:
        exact = self.value(args[1]).astype(np.float64) + self.value(args[2])
        if "sat" in words:
            self._set(args[0], np.clip(np.nan_to_num(exact, nan=0), 0, 1).astype(np.float32))
            return
        assert "rz" in words
        result = exact.astype(np.float32)
        self._set(args[0], np.where(np.abs(result) > np.abs(exact), np.nextafter(result, np.float32(0)), result))

    def call_sqrt(self, args, words, expr):
        return np.sqrt(self.value(args[0]))

    def value_BitwiseNot(self, expr):
        return ~self.value(expr.a)


def append_on_few_multiprocessors(shape, codecs, cache, sources, before, new, after=()):
    """The cache after an append on a GPU of two multiprocessors, so that warps have several tiles.

    ``codecs``: whose rotations these are. ``after``: what the definition waits for besides, an attention's output.
    """
    counts = np.array(new, np.int32)
    heads = after[0].shape[2] if after else 0
    with patch.object(append_cuda, "multiprocessors", return_value=2):
        kernel = append_cuda.append_kernel(shape, target_of("sm_90a"), after=heads, warps=4)
    rotations = [codec.coefficients for codec in codecs]
    cache = cache.copy()
    arrays = (*sources, *rotations, np.array(before, np.int32) + counts, counts, *after)
    AppendGPU(kernel)(cache, *(np.ascontiguousarray(array) for array in arrays))
    return cache
