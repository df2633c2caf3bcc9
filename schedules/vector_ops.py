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
    """A buffer of ``count`` vectors that stays in registers as long as it is indexed by constants."""
    return T.alloc_buffer((count * LANES,), dtype, scope="local")


def across(vector: Any, combine: Callable[[Expr, Expr], Expr]) -> None:
    """Reduce the lanes of a one-vector buffer; every lane ends up with the result."""
    for step in (8, 4, 2, 1):
        value = vector[lanes(0)]
        T.buffer_store(vector, combine(value, pick([value], lambda k, step=step: k ^ step)), [lanes(0)])


def sum_of_fours(source: Any, first: Expr) -> Expr:
    """Lane k is the sum of elements 4k … 4k+3 of sixty-four from ``first``."""
    vectors = [source[lanes(first + LANES * i)] for i in range(4)]
    parts = [pick(vectors, lambda k, t=t: 4 * k + t) for t in range(4)]
    return (parts[0] + parts[1]) + (parts[2] + parts[3])


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
