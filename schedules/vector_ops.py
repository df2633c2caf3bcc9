"""Sixteen-lane float32 vectors in TensorIR, for CPU kernels laid out by hand.

LLVM splits them to what the CPU has, so one kernel serves AVX-512, AVX2 and SSE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

Expr = Any
LANES = 16
CACHE_LINE = 64
LOWEST_EXPONENT = -126.0


def lanes(first: Expr) -> Expr:
    """The index of sixteen consecutive elements."""
    return tir.Ramp(first, 1, LANES)


def splat(value: Expr, dtype: str = "float32") -> Expr:
    """One value in every lane."""
    return tir.Broadcast(tir.const(value, dtype) if isinstance(value, int | float) else value, LANES)


def cast(value: Expr, dtype: str) -> Expr:
    """Lane-wise cast."""
    return value.astype(f"{dtype}x{LANES}")


def pick(vectors: Sequence[Expr], index: Callable[[int], int]) -> Expr:
    """Lane k is element ``index(k)`` of the vectors in a row."""
    return tir.Shuffle(list(vectors), [tir.const(index(k), "int32") for k in range(LANES)])


def lane_numbers() -> Expr:
    """0, 1, … 15 as int32."""
    return tir.Ramp(tir.const(0, "int32"), tir.const(1, "int32"), LANES)


def register(count: int = 1, dtype: str = "float32") -> Any:
    """A buffer of ``count`` vectors that stays in registers as long as it is indexed by constants; fifteen at most.

    TVM puts buffers of less than 1,024 bytes on the stack, where LLVM makes registers of them. Larger ones, and any
    of the scope "local", come from the runtime's workspace: a call each, and every store to them is kept.
    """
    return T.alloc_buffer((count * LANES,), dtype)


def prefetch(element: Expr) -> None:
    """Ask for the cache line of a buffer's element, to be read soon."""
    read, keep, data = (tir.const(value, "int32") for value in (0, 3, 1))
    T.evaluate(tir.call_intrin("void", "tirx.prefetch", tir.address_of(element), read, keep, data))


def side_by_side(*shapes: tuple[int, str]) -> list[Any]:
    """Buffers of so many vectors and a type of 32 bits, one after the other in one piece of memory.

    Apart, each larger one would begin at a page, and their beginnings would drive each other out of the first cache.
    """
    memory = T.alloc_buffer((sum(vectors for vectors, _ in shapes) * LANES,), "uint32")
    buffers, first = [], 0
    for vectors, dtype in shapes:
        buffers.append(T.decl_buffer((vectors * LANES,), dtype, data=memory.data, elem_offset=first))
        first += vectors * LANES
    return buffers


def across(vector: Any, combine: Callable[[Expr, Expr], Expr]) -> None:
    """Reduce the lanes of a one-vector buffer; every lane ends up with the result."""
    for step in (8, 4, 2, 1):
        value = vector[lanes(0)]
        T.buffer_store(vector, combine(value, pick([value], lambda k, step=step: k ^ step)), [lanes(0)])


def sum_of_fours(source: Any, first: Expr) -> Expr:
    """Lane k is the sum of elements 4k … 4k+3 of sixty-four from ``first``."""

    def of_pairs(a: Expr, b: Expr) -> Expr:
        return pick([a, b], lambda k: 2 * k) + pick([a, b], lambda k: 2 * k + 1)

    vectors = [source[lanes(first + LANES * i)] for i in range(4)]
    return of_pairs(of_pairs(*vectors[:2]), of_pairs(*vectors[2:]))


def _exp2_coefficients() -> list[float]:
    """2^f on [-1/2, 1/2] by a polynomial of degree 6 through Chebyshev points: relative error 2e-8."""
    points = 0.5 * np.cos(np.pi * (np.arange(7) + 0.5) / 7)
    return [float(c) for c in np.polyfit(points, np.exp2(points), 6)]


def exp2(x: Expr) -> Expr:
    """2^x for x ≤ 0; below 2^-126 it is 2^-126."""
    x = tir.max(x, splat(LOWEST_EXPONENT))
    whole = tir.nearbyint(x)
    fraction = x - whole
    coefficients = _exp2_coefficients()
    value = splat(coefficients[0])
    for c in coefficients[1:]:
        value = value * fraction + splat(c)
    exponent = cast(whole, "int32") + splat(127, "int32") << splat(23, "int32")
    return value * tir.reinterpret(f"float32x{LANES}", exponent)
