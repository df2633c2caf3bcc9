"""Float32 numbers as integers of 15 bits and a sign, in two int8 parts, for CPU kernels that multiply bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .byte_ops_llvm import pick_bytes
from .vector_ops import LANES, across, cast, lane_numbers, lanes, register, splat

Expr = Any
LARGEST = 32500.0
"""The integer of the largest of some numbers; two int8 parts reach 127·256 + 127."""
_LOW_OFFSET = 128
"""Makes the lower part a signed byte."""


def store_parts(out: Any, first: Expr, stride: int, number: Any, place: Callable[[int], int]) -> None:
    """Store the lower part of sixteen integers as vector ``first`` of ``out``, the upper ``stride`` vectors on.

    Byte k of a vector is of the integer in lane ``place(k)`` of the one-vector int32 buffer ``number``.
    """
    moved = register(1, "uint32")
    shifted = cast(number[lanes(0)], "uint32") + splat(_LOW_OFFSET, "uint32")
    T.buffer_store(moved, shifted ^ splat(_LOW_OFFSET, "uint32"), [lanes(0)])
    for part in range(2):
        value = pick_bytes(moved[lanes(0)], lambda k, part=part: 4 * place(k) + part)
        T.buffer_store(out, value, [lanes((first + part * stride) * LANES)])


def cleaned(vectors: Sequence[Any]) -> Expr:
    """Make zeros of float32 vectors with an infinity or a NaN among them, which no integer is.

    Returns what their results need added: NaN then, else 0.
    """
    size = register()
    T.buffer_store(size, splat(0.0), [lanes(0)])
    for vector in vectors:
        T.buffer_store(size, size[lanes(0)] + tir.abs(vector[lanes(0)]), [lanes(0)])
    across(size, lambda a, b: a + b)
    finite = size[lanes(0)] < splat(3e38)
    for vector in vectors:
        T.buffer_store(vector, tir.Select(finite, vector[lanes(0)], splat(0.0)), [lanes(0)])
    return tir.Select(finite, splat(0.0), splat(math.nan))


def largest_magnitude(vectors: Sequence[Any]) -> Expr:
    """The largest magnitude of the elements of float32 vectors, in every lane; at least 1e-30."""
    size = register()
    T.buffer_store(size, splat(1e-30), [lanes(0)])
    for vector in vectors:
        T.buffer_store(size, tir.max(size[lanes(0)], tir.abs(vector[lanes(0)])), [lanes(0)])
    across(size, tir.max)
    return size[lanes(0)]


def fractions(x: int) -> Expr:
    """Sixteen fractions, those of tokens 16x … of a tile; the 32 of a tile are spread evenly.

    Numbers are rounded down after a fraction is added. Rounded to the nearest, a thousand tokens whose weight is a
    2^-17 of the largest would count as nothing.
    """
    number = (lane_numbers() + splat(LANES * x, "int32")) * splat(19, "int32") & splat(31, "int32")
    return (cast(number, "float32") + splat(0.5)) * splat(1 / 32)
