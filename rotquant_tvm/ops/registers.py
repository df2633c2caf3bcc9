"""Values of one lane: immediates, and accumulators that need no barriers."""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

Expr = Any


def f32(value: Expr) -> Expr:
    """Cast to float32 (a Python number becomes an immediate)."""
    return tir.const(value, "float32") if isinstance(value, (int, float)) else value.astype("float32")


def registers(count: int) -> Any:
    """Float32 accumulators of one lane, cleared (in shared scratch every step would need a barrier)."""
    buffer = T.alloc_buffer((count,), "float32", scope="local")
    for index in range(count):
        T.buffer_store(buffer, f32(0), [index])
    return buffer


def register(value: Expr) -> Expr:
    """Keep an integer in a register; the compiler would analyze a formula at every statement that uses it."""
    buffer = T.alloc_buffer((1,), str(value.ty.dtype), scope="local")
    T.buffer_store(buffer, value, [0])
    return buffer[0]
