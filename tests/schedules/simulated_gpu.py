"""A GPU simulated in NumPy: runs TIRx kernels block by block, all threads of a block in step.

Slow and exact enough for tests where there is no GPU: it finds wrong indices, masks, shuffles among lanes that are not
there, reads of what was never written and accesses beyond a buffer. It knows the instructions that the kernels on plain
vectors use, and says the name of one that it does not know. What it cannot find are races: threads run in step.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import tvm

WARP = 32
SPECIAL = ("blockIdx.x", "blockIdx.y", "blockIdx.z")


def dtype_of(expr) -> str:
    """The dtype of an expression or of a buffer's elements."""
    found = getattr(expr.ty, "dtype", expr.ty)
    return str(getattr(found, "dtype", found))


class SimulatedGPU:
    """Runs one kernel on NumPy arrays, in place: ``SimulatedGPU(func)(*arrays)``."""

    def __init__(self, func) -> None:
        self.func = func

    def __call__(self, *arrays) -> None:
        self.scalars, self.memory = {}, {}
        for param, array in zip(self.func.params, arrays, strict=True):
            assert array.flags.c_contiguous and str(array.dtype) == dtype_of(param), (param, array.dtype)
            for size, expr in zip(array.shape, param.ty.shape, strict=True):
                if type(expr).__name__ == "Var":
                    assert self.scalars.setdefault(expr, size) == size
                else:
                    assert int(expr) == size, (param, array.shape)
            self.memory[param] = array.reshape(-1)
        with np.errstate(all="ignore"):
            self._launch(self.func.body, {})

    def _launch(self, stmt, extents) -> None:
        while type(stmt).__name__ == "IfThenElse":  # of two launches
            stmt = stmt.then_case if self._host(stmt.condition) else stmt.else_case
        while type(stmt).__name__ == "AttrStmt" and stmt.attr_key == "thread_extent":
            extents[str(stmt.node.thread_tag)] = (stmt.node.var, int(self._host(stmt.value)))
            stmt = stmt.body
        blocks = [extents[name] for name in SPECIAL if name in extents]
        thread, count = extents["threadIdx.x"]
        assert count % WARP == 0
        for place in itertools.product(*(range(size) for _, size in blocks)):
            values = {var: np.full(count, i) for (var, _), i in zip(blocks, place, strict=True)}
            _Block(self, count, {**values, thread: np.arange(count)}).run(stmt)

    def _host(self, expr):
        return _Block(self, 1, {}).value(expr)[0]


class _Block:
    """The threads of one block; a value is an array with an entry per thread."""

    def __init__(self, gpu, threads, variables) -> None:
        self.gpu, self.threads, self.variables = gpu, threads, dict(variables)
        self.lane = np.arange(threads)
        self.local, self.shared, self.sizes = {}, {}, {}
        self.active = np.ones(threads, bool)

    # Statements

    def run(self, stmt) -> None:
        getattr(self, "run_" + type(stmt).__name__)(stmt)

    def run_SeqStmt(self, stmt) -> None:
        for part in stmt.seq:
            self.run(part)

    def run_AllocBuffer(self, stmt) -> None:
        buffer = stmt.buffer
        size = int(np.prod([int(n) for n in buffer.ty.shape]))
        scope, dtype = str(buffer.scope()) if callable(getattr(buffer, "scope", None)) else "", dtype_of(buffer)
        junk = np.frombuffer(b"\xa5" * (size * np.dtype(dtype).itemsize), dtype)
        if "shared" in scope:
            self.shared[buffer] = junk.copy()
        else:
            self.local[buffer] = np.tile(junk, (self.threads, 1))

    def run_AttrStmt(self, stmt) -> None:
        self.run(stmt.body)

    def run_BufferStore(self, stmt) -> None:
        self.write(stmt.buffer, self.offset(stmt.buffer, stmt.indices), [self.value(stmt.value)])

    def run_Bind(self, stmt) -> None:
        self.variables[stmt.var] = self.value(stmt.value)

    def run_Evaluate(self, stmt) -> None:
        self.value(stmt.value)

    def run_IfThenElse(self, stmt) -> None:
        condition, before = self.value(stmt.condition).astype(bool), self.active
        for part, taken in ((stmt.then_case, condition), (stmt.else_case, ~condition)):
            self.active = before & taken
            if part is not None and self.active.any():
                self.run(part)
        self.active = before

    def run_For(self, stmt) -> None:
        first, extent = (self.value(v) for v in (stmt.min, stmt.extent))
        assert (extent == extent[0]).all() and (first == first[0]).all()
        for k in range(int(extent[0])):
            self.variables[stmt.loop_var] = first + k
            self.run(stmt.body)

    def run_While(self, stmt) -> None:
        before = self.active
        while True:
            self.active = self.active & self.value(stmt.condition).astype(bool)
            if not self.active.any():
                break
            self.run(stmt.body)
        self.active = before

    # Memory

    def offset(self, buffer, indices):
        shape = [self.value(n) for n in buffer.ty.shape]
        flat = np.zeros(self.threads, np.int64)
        for index, size in zip(indices, shape, strict=True):
            flat = flat * size.astype(np.int64) + self.value(index).astype(np.int64)
        return flat

    def read(self, buffer, at, count=1):
        """Values of consecutive elements, one array each."""
        if buffer in self.local:
            rows = self.local[buffer]
            return [rows[self.lane, self._checked(at + k, rows.shape[1], buffer)] for k in range(count)]
        memory = self.shared[buffer] if buffer in self.shared else self.gpu.memory[buffer]
        return [memory[self._checked(at + k, len(memory), buffer)] for k in range(count)]

    def write(self, buffer, at, values) -> None:
        for k, value in enumerate(values):
            if buffer in self.local:
                rows = self.local[buffer]
                rows[self.lane[self.active], at[self.active] + k] = value[self.active]
                continue
            memory = self.shared[buffer] if buffer in self.shared else self.gpu.memory[buffer]
            place = self._checked(at + k, len(memory), buffer)
            memory[place[self.active]] = value[self.active].astype(memory.dtype)

    def _checked(self, at, size, buffer):
        inside = (at >= 0) & (at < size)
        assert inside[self.active].all(), f"{buffer} has {size} elements: {at[self.active & ~inside][:4]}"
        return np.where(inside, at, 0)

    # Expressions

    def value(self, expr):
        found = getattr(self, "value_" + type(expr).__name__, None)
        if found is None:
            raise NotImplementedError(type(expr).__name__)
        return np.broadcast_to(found(expr), self.threads)

    def _immediate(self, expr):
        return np.asarray(expr.value).astype(_numpy(dtype_of(expr)))

    value_IntImm = value_FloatImm = _immediate

    def value_Var(self, expr):
        if expr in self.variables:
            return self.variables[expr]
        return np.asarray(self.gpu.scalars[expr])

    def value_TensorLoad(self, expr):
        return self.read(expr.source, self.offset(expr.source, expr.indices))[0]

    def value_Cast(self, expr):
        return self.value(expr.value).astype(_numpy(dtype_of(expr)))

    def value_Select(self, expr):
        return np.where(*(self.value(v) for v in (expr.condition, expr.true_value, expr.false_value)))

    def value_Not(self, expr):
        return ~self.value(expr.a).astype(bool)

    def value_Call(self, expr):
        name = expr.op.name.removeprefix("tirx.").replace(".", "_")
        emit = getattr(self, "call_" + name, None)
        if emit is None:
            raise NotImplementedError(f"{expr.op.name} {[str(a) for a in expr.args]}")
        words = [str(a.value) for a in expr.args if type(a).__name__ == "StringImm"]
        result = emit([a for a in expr.args if type(a).__name__ != "StringImm"], [w for w in words if w], expr)
        return np.zeros(self.threads, np.int32) if result is None else result

    def call_reinterpret(self, args, words, expr):
        return np.ascontiguousarray(self.value(args[0])).view(_numpy(dtype_of(expr)))

    def call_fabs(self, args, words, expr):
        return np.abs(self.value(args[0]))

    def call_nearbyint(self, args, words, expr):
        return np.rint(self.value(args[0]))

    def call_floor(self, args, words, expr):
        return np.floor(self.value(args[0]))

    def call_if_then_else(self, args, words, expr):
        return np.where(*(self.value(a) for a in args))

    def _set(self, target, value) -> None:
        value = np.ascontiguousarray(np.broadcast_to(value, self.threads)).view(_numpy(dtype_of(target)))
        self.write(target.source, self.offset(target.source, target.indices), [value])

    def _address(self, expr):
        """(buffer, flat index) of ``address_of``, seen as generic or shared memory."""
        while expr.op.name != "tirx.address_of":
            expr = expr.args[0]
        load = expr.args[0]
        return load.source, self.offset(load.source, load.indices)

    def call_ptx_ld(self, args, words, expr) -> None:
        *targets, address = args
        buffer, at = self._address(address)
        unit = np.dtype(f"u{int(words[-1][1:]) // 8}")
        for target, value in zip(targets, self._units(buffer, at, len(targets), unit), strict=True):
            self._set(target, value)

    call_ptx_ld_vec = call_ptx_ld

    def _units(self, buffer, at, count, unit):
        size = np.dtype(_numpy(dtype_of(buffer))).itemsize
        assert ((at * size)[self.active] % (unit.itemsize * count) == 0).all(), f"{buffer}: an unaligned access"
        elements = self.read(buffer, at, unit.itemsize * count // size)
        block = np.stack(elements, -1)
        return np.ascontiguousarray(block).view(unit).T

    def call_ptx_st(self, args, words, expr) -> None:
        address, *values = args
        buffer, at = self._address(address)
        dtype = _numpy(dtype_of(buffer))
        size = np.dtype(dtype).itemsize
        assert ((at * size)[self.active] % (4 * len(values)) == 0).all(), f"{buffer}: an unaligned access"
        block = np.stack([np.ascontiguousarray(self.value(v)).view(np.uint32) for v in values], -1)
        self.write(buffer, at, list(np.ascontiguousarray(block).view(dtype).T))

    call_ptx_st_vec = call_ptx_st

    def _whole_warps(self) -> None:
        warps = self.active.reshape(-1, WARP)
        assert (warps.all(1) | ~warps.any(1)).all(), "lanes of a warp are missing"

    def call_ptx_shfl_sync(self, args, words, expr) -> None:
        self._whole_warps()
        target, *operands = args
        value, operand, control, members = (self.value(a) for a in operands)
        assert (members == 0xFFFFFFFF).all()
        lane, segment = self.lane % WARP, control.astype(np.int64) >> 8
        if words[0] == "bfly":
            source = lane ^ operand.astype(np.int64)
        else:
            assert words[0] == "idx"
            source = (lane & segment) | (operand.astype(np.int64) & ~segment & WARP - 1)
        self._set(target, value[self.lane // WARP * WARP + source])

    def call_cuda_any_sync(self, args, words, expr):
        self._whole_warps()
        return np.repeat((self.value(args[1]) != 0).reshape(-1, WARP).any(1), WARP).astype(np.int32)

    def call_cuda_cta_sync(self, args, words, expr) -> None:
        assert self.active.all(), "threads of a block do not meet"

    def call_cuda_warp_sync(self, args, words, expr) -> None:
        self._whole_warps()

    def call_ptx_griddepcontrol(self, args, words, expr) -> None:
        """One kernel runs at a time."""

    def call_ptx_fma(self, args, words, expr) -> None:
        a, b, c = (self.value(v).astype(np.float64) for v in args[1:])
        exact = a * b + c
        result = exact.astype(np.float32)
        if "rp" in words:
            result = np.where(result < exact, np.nextafter(result, np.float32(np.inf)), result)
        if "rz" in words:
            result = np.where(np.abs(result) > np.abs(exact), np.nextafter(result, np.float32(0)), result)
        if "sat" in words:
            result = np.clip(np.nan_to_num(result, nan=0), 0, 1).astype(np.float32)
        self._set(args[0], result)

    def call_ptx_rsqrt(self, args, words, expr) -> None:
        self._set(args[0], (1 / np.sqrt(self.value(args[1]))).astype(np.float32))

    def call_ptx_set(self, args, words, expr) -> None:
        assert words[0] == "gt"
        self._set(args[0], (self.value(args[1]) > self.value(args[2])).astype(np.float32))

    def call_ptx_prmt(self, args, words, expr) -> None:
        low, high, selector = (np.ascontiguousarray(self.value(v)).view(np.uint32) for v in args[1:])
        both = np.stack([low, high], -1).view(np.uint8)
        picked = [both[self.lane, selector >> 4 * k & 7] for k in range(4)]
        self._set(args[0], np.ascontiguousarray(np.stack(picked, -1)).view(np.uint32)[:, 0])

    def call_ptx_cvt_f16x2_f32(self, args, words, expr) -> None:
        high, low = (self.value(v).astype(np.float16) for v in args[1:])
        self._set(args[0], np.ascontiguousarray(np.stack([low, high], -1)).view(np.uint32)[:, 0])

    def call_ptx_cvt_bf16x2_f32(self, args, words, expr) -> None:
        high, low = (self.value(v).astype(ml_dtypes.bfloat16) for v in args[1:])
        self._set(args[0], np.ascontiguousarray(np.stack([low, high], -1)).view(np.uint32)[:, 0])


def _numpy(dtype: str):
    return np.dtype({"bool": bool, "bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))


def _binary(function):
    def evaluate(self, expr):
        a, b = (self.value(v) for v in (expr.a, expr.b))
        return function(a, b)

    return evaluate


_ARITHMETIC = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": lambda a, b: a / b if a.dtype.kind == "f" else np.trunc(a / b).astype(a.dtype),
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.fmin,
    "Max": np.fmax,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "LShift": np.left_shift,
    "RShift": np.right_shift,
}
for _name, _function in _ARITHMETIC.items():
    setattr(_Block, "value_" + _name, _binary(_function))


def cuda_target(arch: str = "sm_90a") -> tvm.target.Target:
    """A GPU that need not be there."""
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 232448,
            "max_num_threads": 1024,
            "thread_warp_size": WARP,
            "host": "llvm",
        }
    )
