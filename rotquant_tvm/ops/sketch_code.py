"""The arithmetic of a sign sketch, emitted into a TensorIR definition (mathematics: ``formats.sketch``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..formats import HALF_MAX, Codec, SignCodebook
from .axes import Axes
from .tile_access import u32

Expr = Any
Element = Callable[[Expr], Expr]


def emit_residual_sketch(
    axes: Axes,
    codec: Codec,
    coefficients: Any,
    vectors: tuple[Any, Any],
    code: tuple[Callable[[], Expr], Element, Element],
    store_code: Callable[[Expr, Expr], None],
    store_gain: Callable[[Expr, Expr], None],
) -> None:
    """Quantize a rotated vector and sketch what is left of it.

    ``vectors`` are the rotated vector and scratch of its size; ``code`` computes, from the former, the fp16 gain (in
    one lane), a dimension's code and that code's value. ``coefficients`` are ``Codec.coefficients``.
    """
    y, residual = vectors
    gain_of, code_of, value_of = code
    head_dim, first = codec.head_dim, codec.rotation.data.size
    kept = T.sblock_alloc_buffer((1,), "float32", scope=axes.scratch)
    with axes.lanes(1) as _:
        gain = gain_of()
        T.buffer_store(kept, gain.astype("float32"), [0])
        store_gain(0, gain)
    with axes.lanes(head_dim) as dim:
        T.buffer_store(residual, y[dim] - kept[0] * value_of(dim), [dim])
    with axes.lanes(1) as _:
        total = _sum(head_dim, lambda j: residual[j] * residual[j])
        norm = tir.min(tir.sqrt(total), tir.const(HALF_MAX, "float32"))
        store_gain(1, norm.astype("float16"))
    with axes.lanes(head_dim) as dim:
        total = _sum(head_dim, lambda j: coefficients[first + dim * head_dim + j] * residual[j])
        sign = tir.Select(total > tir.const(0, "float32"), u32(1 << codec.format.bits), u32(0))
        store_code(dim, code_of(dim) | sign)


def sign_value(codec: Codec, code: Expr) -> Expr:
    """What the sign in a uint32 code stands for, ±√(π/2)/d, before the residual's norm."""
    scale = tir.const(float(SignCodebook(codec.head_dim).scale), "float32")
    return tir.Select((code >> u32(codec.format.bits) & u32(1)) == u32(0), -scale, scale)


def sketch_element(codec: Codec, transposed: Any, first: int, sign: Element, dim: Expr) -> Expr:
    """Element ``dim`` of Sᵀ applied to ``sign(j)``; Sᵀ is stored in ``transposed`` from element ``first``."""
    return _sum(codec.head_dim, lambda j: transposed[first + dim * codec.head_dim + j] * sign(j))


def _sum(count: int, term: Element) -> Expr:
    total = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(total, tir.const(0, "float32"), [0])
    with T.serial(0, count) as index:
        T.buffer_store(total, total[0] + term(index), [0])
    return total[0]
