"""Emitting CUDA kernels at the level of instructions: registers, vector accesses, shuffles, tensor cores, bulk copies.

Kernels built with these are TIRx functions (``s_tir=False``): the compiler leaves their loops, barriers and shared
memory as they are. What is unrolled here is unrolled by Python loops over the emitting calls, so that every index of a
register array is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.tirx as tir
from tvm.backend.cuda import op as cuda
from tvm.backend.cuda.ptx import PTXNamespace
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Expr = Any
WARP = 32
FULL_MASK = 0xFFFFFFFF

_PTX = PTXNamespace()


def ptx(instruction: str, *operands: Expr) -> None:
    """Emit one PTX instruction, spelled in full (``"prmt.b32"``); destinations are elements of register arrays."""
    T.evaluate(_PTX[instruction](*operands))


def u32(value: Expr) -> Expr:
    """Cast to uint32 (a Python number becomes an immediate)."""
    return tir.const(value, "uint32") if isinstance(value, int) else value.astype("uint32")


def i32(value: Expr) -> Expr:
    """Cast to int32 (a Python number becomes an immediate)."""
    return tir.const(value, "int32") if isinstance(value, int) else value.astype("int32")


def f32(value: Expr) -> Expr:
    """Cast to float32 (a Python number becomes an immediate)."""
    return tir.const(value, "float32") if isinstance(value, int | float) else value.astype("float32")


def bits_of(value: Expr) -> Expr:
    """The 32 bits of a float32, as uint32."""
    return tir.reinterpret("uint32", value)


def float_of(value: Expr) -> Expr:
    """The float32 whose bits a uint32 is."""
    return tir.reinterpret("float32", value)


class Registers:
    """An array that lives in registers: every index is a Python number."""

    def __init__(self, count: int, dtype: str = "uint32") -> None:
        self.buffer = T.alloc_buffer((count,), dtype, scope="local")
        self.count, self.dtype = count, dtype

    def __getitem__(self, index: int) -> Expr:
        return self.buffer[index]

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self.buffer, value, [index])

    def __iter__(self) -> Any:
        return (self.buffer[index] for index in range(self.count))

    def fill(self, value: Expr) -> None:
        """Set every element."""
        for index in range(self.count):
            self[index] = value


def scalar(value: Expr, dtype: str | None = None) -> Expr:
    """Keep a value in a register of its own; returns the register's read."""
    cell = Registers(1, dtype or str(value.ty.dtype))
    cell[0] = value
    return cell[0]


def shared_array(count: int, dtype: str) -> Any:
    """Dynamic shared memory of a block; arrays of one name must have one type in all kernels of a module."""
    return IRBuilder.name(f"shared_{dtype}", T.alloc_buffer((count,), dtype, scope="shared.dyn"))


def prmt(low: Expr, high: Expr, selector: Expr) -> Expr:
    """Four of the eight bytes of two words, by the nibbles of a selector (uint32)."""
    cell = Registers(1)
    ptx("prmt.b32", cell[0], low, high, selector)
    return cell[0]


def lop3(a: Expr, b: Expr, c: Expr, table: int) -> Expr:
    """Any bitwise function of three words: ``table`` is its truth table (a = 0xF0, b = 0xCC, c = 0xAA)."""
    cell = Registers(1)
    ptx("lop3.b32", cell[0], a, b, c, table)
    return cell[0]


def load_words(target: Registers, at: int, buffer: Any, index: Sequence[Expr], count: int, how: str) -> None:
    """Load 1, 2 or 4 consecutive 32-bit elements of ``buffer`` from ``index`` on, in one access.

    ``how``: the space and cache operators, like ``"shared"``, ``"global.nc"`` or ``"global.cs"``; the address is
    a multiple of the access's size.
    """
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    kind = {"float32": "f32", "int32": "s32"}.get(target.dtype, "u32")
    address = buffer.ptr_to(list(index))
    ptx(f"ld.{how}{vector}.{kind}", *(target[at + k] for k in range(count)), address)


def store_words(buffer: Any, index: Sequence[Expr], values: Sequence[Expr], how: str = "global") -> None:
    """Store 1, 2 or 4 32-bit values in one access; see ``load_words``."""
    vector = {1: "", 2: ".v2", 4: ".v4"}[len(values)]
    kind = {"float32": "f32", "int32": "s32"}.get(str(values[0].ty.dtype), "u32")
    ptx(f"st.{how}{vector}.{kind}", buffer.ptr_to(list(index)), *values)


def shuffle_xor(value: Expr, mask: int) -> Expr:
    """The value of the lane whose number differs by ``mask`` (32-bit types)."""
    cell = Registers(1, str(value.ty.dtype))
    ptx("shfl_sync.bfly.b32", cell[0], value, u32(mask), u32(31), u32(FULL_MASK))
    return cell[0]


def shuffle(value: Expr, lane: Expr) -> Expr:
    """The value of another lane (32-bit types)."""
    cell = Registers(1, str(value.ty.dtype))
    ptx("shfl_sync.idx.b32", cell[0], value, u32(lane), u32(31), u32(FULL_MASK))
    return cell[0]


def across(value: Expr, combine: Any, lanes: Sequence[int]) -> Expr:
    """Combine a value over the lanes that differ by the given powers of two."""
    for mask in lanes:
        value = scalar(combine(value, shuffle_xor(value, mask)))
    return value


def any_lane(condition: Expr) -> Expr:
    """Whether a condition holds in any lane of the warp."""
    return cuda.cuda_any_sync(u32(FULL_MASK), condition.astype("int32")) != 0


def warp_sync() -> None:
    """Wait for the warp's lanes; their shared-memory writes are seen after it."""
    T.evaluate(cuda.cuda_warp_sync())


def block_sync() -> None:
    """Wait for the thread block; its shared-memory writes are seen after it."""
    T.evaluate(cuda.cuda_cta_sync())


def half2(word: Expr) -> tuple[Expr, Expr]:
    """The two float16 of a word, as float32."""
    low = tir.reinterpret("float16", (word & u32(0xFFFF)).astype("uint16"))
    high = tir.reinterpret("float16", (word >> u32(16)).astype("uint16"))
    return low.astype("float32"), high.astype("float32")


def pack_half2(low: Expr, high: Expr) -> Expr:
    """Two float32 as a word of two float16, ``low`` first."""
    cell = Registers(1)
    ptx("cvt.rn.f16x2.f32", cell[0], high, low)
    return cell[0]


def mma_int8(total: Registers, at: int, a: Sequence[Expr], b: Sequence[Expr], b_signed: bool = True) -> None:
    """total[at … at+3] += A·B with A int8 [16, 32] (or [16, 16]) and B int8 or uint8 [32, 8] (or [16, 8]).

    The int32 sums stand in uint32 registers.
    """
    depth = 32 if len(b) == 2 else 16
    kind = "s8" if b_signed else "u8"
    lanes = [total[at + k] for k in range(4)]
    ptx(f"mma.sync.aligned.m16n8k{depth}.row.col.s32.s8.{kind}.s32", *lanes, *a, *b, *lanes)


def mma_half(total: Registers, at: int, a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """total[at … at+3] += A·B with A float16 [16, 16], B float16 [16, 8] (words of two), float32 sums."""
    lanes = [total[at + k] for k in range(4)]
    ptx("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", *lanes, *a, *b, *lanes)
