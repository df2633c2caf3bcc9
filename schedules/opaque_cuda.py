"""Numbers that the compiler cannot see through, on CUDA."""

from __future__ import annotations

from typing import Any

from .cuda_ops import i32, prmt, u32

Expr = Any


def again(value: Expr) -> Expr:
    """An int32 in a form that the compiler takes for another, or for one that it does not know."""
    return i32(prmt(u32(value), u32(0), u32(0x3210)))
