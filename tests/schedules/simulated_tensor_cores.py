"""The simulated GPU with what the kernels of linear layers use besides.

These are asynchronous copies (which are done at once), the tensor cores of a warp and of a warpgroup, a choice of
launches by the number of rows, and views of the arguments' memory.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

from . import simulated_gpu
from .simulated_gpu import SPECIAL, WARP, SimulatedGPU, dtype_of

GROUP = 4 * WARP
ROW_BYTES = 128
"""Bytes of a row of an operand that a warpgroup's tensor cores read."""
RING = 64
"""Where dynamic shared memory begins, in bytes: no more than that is promised."""
APART = 1 << 20
"""Bytes from one array in shared memory to the next."""


class TensorCoreGPU(SimulatedGPU):
    """Runs the launches that the function's host code chooses."""

    def __call__(self, *arrays) -> None:
        self.scalars, self.memory = {}, {}
        for param, array in zip(self.func.params, arrays, strict=True):
            assert array.flags.c_contiguous and str(array.dtype) == dtype_of(param), (param, array.dtype)
            for size, expr in zip(array.shape, param.ty.shape, strict=True):
                free = type(expr).__name__ == "Var"
                assert (self.scalars.setdefault(expr, size) if free else self._host(expr)) == size, param
            self.memory[param] = array.reshape(-1)
        with np.errstate(all="ignore"):
            self._launch(self.func.body, {})

    def _launch(self, stmt, extents) -> None:
        name = type(stmt).__name__
        if extents or name == "AttrStmt":
            while type(stmt).__name__ == "AttrStmt" and stmt.attr_key == "thread_extent":
                extents[str(stmt.node.thread_tag)] = (stmt.node.var, int(self._host(stmt.value)))
                stmt = stmt.body
            blocks = [extents[name] for name in SPECIAL if name in extents]
            thread, count = extents["threadIdx.x"]
            for place in itertools.product(*(range(size) for _, size in blocks)):
                values = {var: np.full(count, i) for (var, _), i in zip(blocks, place, strict=True)}
                TensorCoreBlock(self, count, {**values, thread: np.arange(count)}).run(stmt)
        elif name == "SeqStmt":
            for part in stmt.seq:
                self._launch(part, {})
        elif name == "DeclBuffer":
            self.memory[stmt.buffer] = self.memory[stmt.data.args[0]]
        elif name == "IfThenElse":
            self._launch(stmt.then_case if self._host(stmt.condition) else stmt.else_case, {})
        else:
            raise NotImplementedError(name)


class TensorCoreBlock(simulated_gpu._Block):
    """The threads of one block."""

    def run_For(self, stmt) -> None:
        """A loop whose length may differ from warp to warp."""
        first, extent = (self.value(v) for v in (stmt.min, stmt.extent))
        before = self.active
        for k in range(int(extent[before].max(initial=0))):
            self.active = before & (k < extent)
            self.variables[stmt.loop_var] = first + k
            self.run(stmt.body)
        self.active = before

    def _words(self, expr):
        return np.ascontiguousarray(self.value(expr)).view(np.uint32)

    def _halves(self, expr, dtype=np.float16):
        """[threads, 2] float16 or bfloat16 of a word."""
        return self._words(expr).reshape(-1, 1).view(dtype).astype(np.float64)

    def call_exp(self, args, words, expr):
        return np.exp(self.value(args[0]))

    def call_rsqrt(self, args, words, expr):
        return 1 / np.sqrt(self.value(args[0]))

    def _nothing(self, args, words, expr) -> None:
        """What orders accesses: they are in order here."""

    call_ptx_cp_async_commit_group = call_ptx_cp_async_wait_group = _nothing
    call_ptx_fence_proxy = call_ptx_fence_proxy_async = call_ptx_fence = _nothing
    call_ptx_wgmma_fence = call_ptx_wgmma_commit_group = call_ptx_wgmma_wait_group = _nothing

    def call_ptx_cp_async_cg(self, args, words, expr) -> None:
        target, source = (self._address(arg) for arg in args[:2])
        assert int(args[2].value) == 16
        values = self._units(*source, 4, np.dtype("u4"))
        buffer, at = target
        unit = np.dtype(dtype_of(buffer))
        assert ((at * unit.itemsize)[self.active] % 16 == 0).all()
        self.write(buffer, at, list(np.ascontiguousarray(np.stack(values, -1)).view(unit).T))

    def call_ptx_ldmatrix(self, args, words, expr) -> None:
        *targets, address = args
        buffer, at = self._address(address)
        rows = np.stack(self.read(buffer, at, 8), -1)  # [threads, 8] 16-bit words: lane 8m + r has row r of matrix m
        for m, target in enumerate(targets):
            lane = self.lane % WARP
            source = self.lane // WARP * WARP + 8 * m + lane // 4
            pair = np.stack([rows[source, 2 * (lane % 4) + k] for k in range(2)], -1)
            self._set(target, np.ascontiguousarray(pair).view(np.uint32)[:, 0])

    def call_ptx_mma(self, args, words, expr) -> None:
        assert "m16n8k16" in words or "m16n8k8" in words
        parts = 2 if "m16n8k16" in words else 1  # eights of the inner dimension
        dtype = ml_dtypes.bfloat16 if "bf16" in words else np.float16
        sums, *halves = args[:4], *(self._halves(x, dtype) for x in args[4 : 4 + 3 * parts])
        a, b = halves[: 2 * parts], halves[2 * parts :]
        lane, warp = self.lane % WARP, self.lane // WARP
        g, t = lane // 4, lane % 4
        count = self.threads // WARP
        left, right = np.zeros((count, 16, 8 * parts)), np.zeros((count, 8 * parts, 8))
        for part in range(2 * parts):
            for k in range(2):
                left[warp, g + 8 * (part % 2), 2 * t + k + 8 * (part // 2)] = a[part][:, k]
        for part in range(parts):
            for k in range(2):
                right[warp, 2 * t + k + 8 * part, g] = b[part][:, k]
        product = left @ right
        for part, target in enumerate(sums):
            before = self.value(args[4 + 3 * parts + part])
            value = before + product[warp, g + 8 * (part // 2), 2 * t + part % 2]
            self._set(target, value.astype(np.float32))

    def call_cuda_cvta_generic_to_shared(self, args, words, expr):
        buffer, at = self._address(args[0])
        first = RING + list(self.shared).index(buffer) * APART
        return (first + at * np.dtype(dtype_of(buffer)).itemsize).astype(np.uint32)

    def call_ptx_wgmma_f16_ss(self, args, words, expr) -> None:
        *sums, a, b, scale, _, _, _, _ = args
        assert self.value(scale).all() and self.active.all()
        columns = len(sums) * 2
        lane, warp, group = self.lane % WARP, self.lane // WARP % 4, self.lane // GROUP
        starts = [self.value(x)[::GROUP].astype(np.uint64) for x in (a, b)]
        products = np.stack(
            [self._operand(x, 64) @ self._operand(y, columns).T for x, y in zip(*starts, strict=True)]
        )
        for k, target in enumerate(sums):
            row = 16 * warp + lane // 4 + 8 * (k // 2 % 2)
            column = 8 * (k // 4) + 2 * (lane % 4) + k % 2
            self._set(target, (self.value(target) + products[group, row, column]).astype(np.float32))

    def _operand(self, descriptor, rows):
        """[rows, 16] that a descriptor of permuted parts tells, from the only shared array."""
        descriptor = int(descriptor)
        assert descriptor >> 62 == 1 and descriptor >> 32 & 0x3FFF == 8 * ROW_BYTES >> 4
        (memory,) = self.shared.values()
        start = (descriptor & 0x3FFF) << 4
        row, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
        place = start + row * ROW_BYTES + 2 * k
        place ^= (place >> 7 & 7) << 4
        return memory.view(np.float16)[(place - RING) // 2].astype(np.float64)
