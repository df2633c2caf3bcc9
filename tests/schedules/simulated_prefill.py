"""The simulated GPU with what prefill attention uses besides: copies of parts, powers of two, pairs of float16."""

from __future__ import annotations

import numpy as np

from .simulated_decode import DecodeBlock, DecodeGPU
from .simulated_gpu import WARP, dtype_of
from .simulated_tensor_cores import TensorCoreBlock


class PrefillGPU(DecodeGPU):
    """Runs one launch; blocks one after the other."""

    def block(self, count, variables):
        """The block of ``count`` threads."""
        return PrefillBlock(self, count, variables)


class PrefillBlock(DecodeBlock):
    """The threads of one block; copies happen when they are asked for."""

    def call_ptx_ld(self, args, words, expr) -> None:
        """Also float32, whose bits stand in memory of another dtype."""
        load = TensorCoreBlock.call_ptx_ld if words[-1] == "f32" else DecodeBlock.call_ptx_ld
        load(self, args, words, expr)

    def call_ptx_cp_async_cg_src_size(self, args, words, expr) -> None:
        """Zeros stand for what is not there."""
        size, before = self.value(args[3]), self.active
        assert np.isin(size, (0, 16)).all()
        self.active = before & (size == 16)
        self.call_ptx_cp_async_cg(args[:3], words, expr)
        self.active = before & (size == 0)
        self._copy(args[0], [np.zeros(self.threads, np.uint32)] * 4)
        self.active = before

    def call_ptx_cp_async_ca(self, args, words, expr) -> None:
        assert int(args[2].value) == 4
        self._copy(args[0], self._units(*self._address(args[1]), 1, np.dtype("u4")))

    def _copy(self, target, units) -> None:
        buffer, at = self._address(target)
        unit = np.dtype(dtype_of(buffer))
        assert ((at * unit.itemsize)[self.active] % (4 * len(units)) == 0).all()
        self.write(buffer, at, list(np.ascontiguousarray(np.stack(units, -1)).view(unit).T))

    def call_ptx_ex2(self, args, words, expr) -> None:
        self._set(args[0], np.exp2(self.value(args[1])))

    def value_Mod(self, expr):
        return np.fmod(self.value(expr.a), self.value(expr.b))

    def call_ptx_add_half(self, args, words, expr) -> None:
        self._two_halves(args, np.add)

    def call_ptx_fma_half(self, args, words, expr) -> None:
        a, b, c = (self._words(v).reshape(-1, 1).view(np.float16).astype(np.float64) for v in args[1:])
        self._set(args[0], (a * b + c).astype(np.float16).view(np.uint32)[:, 0])

    def call_ptx_ldmatrix(self, args, words, expr) -> None:
        """Also transposed: a lane has two rows of a column instead of two columns of a row."""
        if not any("trans" in word for word in words):
            super().call_ptx_ldmatrix(args, words, expr)
            return
        *targets, address = args
        rows = np.stack(self.read(*self._address(address), 8), -1)
        lane, first = self.lane % WARP, self.lane // WARP * WARP
        for m, target in enumerate(targets):
            pair = np.stack([rows[first + 8 * m + 2 * (lane % 4) + k, lane // 4] for k in range(2)], -1)
            self._set(target, np.ascontiguousarray(pair).view(np.uint32)[:, 0])
