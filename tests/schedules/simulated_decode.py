"""The simulated GPU with what decode attention uses besides: integer tensor cores, bulk copies, counters."""

from __future__ import annotations

import itertools

import numpy as np

from .simulated_gpu import SPECIAL, WARP, dtype_of
from .simulated_tensor_cores import APART, RING, TensorCoreBlock, TensorCoreGPU


class DecodeGPU(TensorCoreGPU):
    """Runs one launch over scratch that the function allocates; blocks one after the other; ``grid``: how many."""

    def _launch(self, stmt, extents) -> None:
        name = type(stmt).__name__
        if name == "AllocBuffer":
            size = int(np.prod([int(self._host(n)) for n in stmt.buffer.ty.shape]))
            self.memory[stmt.buffer] = np.full(size, np.nan, dtype_of(stmt.buffer))
            return
        if name != "AttrStmt":
            super()._launch(stmt, extents)
            return
        while type(stmt).__name__ == "AttrStmt":
            if stmt.attr_key == "thread_extent":
                extents[str(stmt.node.thread_tag)] = (stmt.node.var, int(self._host(stmt.value)))
            stmt = stmt.body
        blocks = [extents[name] for name in SPECIAL if name in extents]
        thread, count = extents["threadIdx.x"]
        self.grid = {name: size for name, (_, size) in extents.items()}
        for place in itertools.product(*(range(size) for _, size in blocks)):
            values = {var: np.full(count, i) for (var, _), i in zip(blocks, place, strict=True)}
            self.block(count, {**values, thread: np.arange(count)}).run(stmt)

    def block(self, count, variables):
        """The block of ``count`` threads."""
        return DecodeBlock(self, count, variables)


class DecodeBlock(TensorCoreBlock):
    """The threads of one block; bulk copies happen when they are asked for."""

    def run_AttrStmt(self, stmt) -> None:
        self.run(stmt.body)

    def call_exp2(self, args, words, expr):
        return np.exp2(self.value(args[0]))

    call_prim_if_then_else = TensorCoreBlock.call_if_then_else

    def call_prim_log2(self, args, words, expr):
        return np.log2(self.value(args[0]))

    _nothing = TensorCoreBlock._nothing
    call_ptx_fence_mbarrier_init = call_ptx_mbarrier = call_cuda_mbarrier_wait = _nothing
    call_ptx_mbarrier_init = call_ptx_mbarrier_arrive_expect_tx_state = _nothing

    def call_ptx_prefetch(self, args, words, expr) -> None:
        buffer, at = self._address(args[0])
        self._checked(at, len(self.gpu.memory[buffer]), buffer)

    def call_ptx_cp_async_bulk_g2s_cluster(self, args, words, expr) -> None:
        (target, at), (source, start) = (self._address(arg) for arg in args[:2])
        count = int(self.value(args[2])[self.active][0]) // 4
        assert count % 4 == 0
        for thread in np.flatnonzero(self.active):
            assert at[thread] % 4 == 0 and start[thread] % 4 == 0
            assert 0 <= at[thread] and at[thread] + count <= len(self.shared[target])
            copied = self.gpu.memory[source][start[thread] : start[thread] + count]
            assert len(copied) == count
            self.shared[target][at[thread] : at[thread] + count] = copied

    def call_ptx_cp_async_cg_src_size(self, args, words, expr) -> None:
        """A unit of four words, of which those past the source's size become 0."""
        (target, at), (source, start) = (self._address(arg) for arg in args[:2])
        assert int(args[2].value) == 16
        sizes = self.value(args[3])
        for thread in np.flatnonzero(self.active):
            count, first = int(sizes[thread]) // 4, start[thread]
            assert sizes[thread] % 4 == 0 and 0 <= count <= 4 and at[thread] % 4 == 0 and first % 4 == 0
            assert 0 <= first and first + count <= len(self.gpu.memory[source])
            unit = np.zeros(4, np.uint32)
            unit[:count] = self.gpu.memory[source][first : first + count]
            self.shared[target][at[thread] : at[thread] + 4] = unit

    def call_ptx_ld(self, args, words, expr) -> None:
        """Also at an address in shared memory that is a number."""
        *targets, address = args
        if dtype_of(address) != "uint32":
            super().call_ptx_ld(args, words, expr)
            return
        unit = np.dtype(f"u{int(words[-1][1:]) // 8}")
        (target,), place = targets, self.value(address).astype(np.int64) - RING
        (number,) = set(place[self.active] // APART)
        buffer, memory = list(self.shared.items())[number]
        place -= number * APART
        assert (place[self.active] % unit.itemsize == 0).all(), f"{buffer}: an unaligned access"
        units = memory.view(unit)
        loaded = units[self._checked(place // unit.itemsize, len(units), buffer)]
        self._set(target, loaded if unit.itemsize == 4 else loaded.astype(dtype_of(target)))

    def call_ptx_mad_int(self, args, words, expr) -> None:
        assert words == ["lo", "u32"]
        a, b, c = (self._words(v) for v in args[1:])
        self._set(args[0], a * b + c)

    def call_ptx_prmt(self, args, words, expr) -> None:
        low, high, selector = (self._words(v) for v in args[1:])
        both = np.stack([low, high], -1).view(np.uint8)
        picked = []
        for k in range(4):
            chosen = selector >> np.uint32(4 * k)
            byte = both[self.lane, chosen & 7]
            picked.append(np.where(chosen & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint8))
        self._set(args[0], np.ascontiguousarray(np.stack(picked, -1)).view(np.uint32)[:, 0])

    def call_ptx_lop3(self, args, words, expr) -> None:
        target, *operands, table = args
        a, b, c = (self._words(v) for v in operands)
        result = np.zeros_like(a)
        for row in range(8):
            if int(table.value) >> row & 1:
                terms = [x if row >> (2 - n) & 1 else ~x for n, x in enumerate((a, b, c))]
                result |= terms[0] & terms[1] & terms[2]
        self._set(target, result)

    def call_ptx_add(self, args, words, expr) -> None:
        assert words[0] == "rm"
        exact = self.value(args[1]).astype(np.float64) + self.value(args[2])
        result = exact.astype(np.float32)
        self._set(args[0], np.where(result > exact, np.nextafter(result, np.float32(-np.inf)), result))

    def call_ptx_cvt(self, args, words, expr) -> None:
        assert words[0] == "rni"
        self._set(args[0], np.rint(self.value(args[1])).astype(np.int32))

    def call_ptx_mma_int(self, args, words, expr) -> None:
        depth = 32 if "m16n8k32" in words else 16
        kinds = [np.dtype({"s8": "i1", "u8": "u1"}[word]) for word in words if word in ("s8", "u8")]
        sums, operands, first = args[:4], args[4:-4], depth // 8
        left_words, right_words = operands[:first], operands[first:]
        lane, warp = self.lane % WARP, self.lane // WARP
        g, t = lane // 4, lane % 4
        count = self.threads // WARP
        left, right = np.zeros((count, 16, depth), np.int64), np.zeros((count, depth, 8), np.int64)
        for part, word in enumerate(left_words):
            for k, byte in enumerate(self._words(word).reshape(-1, 1).view(kinds[0]).T):
                left[warp, g + 8 * (part % 2), 4 * t + k + 16 * (part // 2)] = byte
        for part, word in enumerate(right_words):
            for k, byte in enumerate(self._words(word).reshape(-1, 1).view(kinds[1]).T):
                right[warp, 4 * t + k + 16 * part, g] = byte
        product = left @ right
        for part, target in enumerate(sums):
            start = self._words(args[-4 + part]).view(np.int32).astype(np.int64)
            value = start + product[warp, g + 8 * (part // 2), 2 * t + part % 2]
            assert (np.abs(value[self.active]) < 2**31).all(), "an integer sum overflows"
            self._set(target, value.astype(np.int32))

    def _two_halves(self, args, function) -> None:
        a, b = (self._words(v).reshape(-1, 1).view(np.float16) for v in args[1:])
        self._set(args[0], np.ascontiguousarray(function(a, b)).view(np.uint32)[:, 0])

    def call_ptx_sub_half(self, args, words, expr) -> None:
        self._two_halves(args, np.subtract)

    def call_ptx_mul_half(self, args, words, expr) -> None:
        self._two_halves(args, np.multiply)

    def call_ptx_atom(self, args, words, expr) -> None:
        target, address, value = args
        buffer, at = self._address(address)
        before = np.zeros(self.threads, np.uint32)
        for thread in np.flatnonzero(self.active):
            before[thread] = self.gpu.memory[buffer][at[thread]]
            self.gpu.memory[buffer][at[thread]] += int(self.value(value)[thread])
        self._set(target, before)
