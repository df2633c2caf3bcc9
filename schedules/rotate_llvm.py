"""Rotate vectors on CPUs: the vector form of ``ops.rotate``, for rotations made of small blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import block_reads
from rotquant_tvm.ops.rotate import RotationShape
from rotquant_tvm.ops.site_shape import OP_ATTR

from .attention_core_llvm import wide
from .vector_ops import LANES, cast, lanes, pick, register

Expr = Any
ROWS = 64
"""Rows per task; up to so many run on the calling thread, since waking another takes longer."""
LARGEST_BLOCK = 4


def rotate_llvm(shape: RotationShape, _target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """Build the kernel, with the parameters of ``ops.rotate``; None for dense rotations, where it would not help."""
    if any(block > LARGEST_BLOCK for block, _ in shape.structure) or not shape.structure:
        return None
    head_dim, size = shape.head_dim, shape.coefficients
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    rows = sizes[0] * sizes[1] * sizes[2]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("rotate")
        T.func_attr({OP_ATTR: "rotate", "tirx.noalias": True, "tirx.is_scheduled": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), shape.dtype))
        coefficients = T.arg("coefficients", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((*sizes, head_dim), shape.dtype))

        def task(first: Expr, count: Expr) -> None:
            columns = T.alloc_buffer((size,), "float32")
            _transpose(shape, coefficients, columns)
            with T.serial(0, count) as step:
                row = first + step
                at = [row // (sizes[1] * sizes[2]), row // sizes[2] % sizes[1], row % sizes[2]]
                _rotate_row(shape, columns, lambda dim: wide(x, at, dim), lambda dim, v: T.buffer_store(
                    y, cast(v, shape.dtype), [*at, lanes(dim)]
                ))

        tasks = (rows + (ROWS - 1)) // ROWS
        with T.sblock("all"):
            T.reads(x[0 : sizes[0], 0 : sizes[1], 0 : sizes[2], 0:head_dim], coefficients[0:size])
            T.writes(y[0 : sizes[0], 0 : sizes[1], 0 : sizes[2], 0:head_dim])
            with T.If(rows <= ROWS):
                with T.Then(), T.serial(0, 1) as _:
                    task(tir.const(0, "int64"), rows)
                with T.Else(), T.parallel(0, tasks) as index:
                    task(index * ROWS, tir.min(rows - index * ROWS, tir.const(ROWS, "int64")))
    return builder.get()


def _pick_elements(load: Callable[[int], Expr], positions: np.ndarray) -> Expr:
    """A vector of the elements at ``positions`` [16]; ``load(n)`` gives elements 16n … 16n+15."""
    sources = sorted({int(p) // LANES for p in positions})
    if len(sources) == 1 and (positions % LANES == np.arange(LANES)).all():
        return load(sources[0])
    vectors = [load(n) for n in sources]
    if len(vectors) == 3:  # LLVM wants a power of two
        vectors.append(vectors[-1])
    return pick(vectors, lambda k: sources.index(int(positions[k]) // LANES) * LANES + int(positions[k]) % LANES)


def _transpose(shape: RotationShape, coefficients: Any, columns: Any) -> None:
    """Coefficients [dim, block] of each layer as [block, dim], so that a vector of them fits a vector of dims."""
    offset = 0
    for block, _ in shape.structure:
        with T.serial(0, shape.head_dim) as dim:
            for j in range(block):
                value = coefficients[offset + dim * block + j]
                T.buffer_store(columns, value, [offset + j * shape.head_dim + dim])
        offset += block * shape.head_dim


def _rotate_row(
    shape: RotationShape, columns: Any, load: Callable[[Expr], Expr], store: Callable[[Expr, Expr], None]
) -> None:
    count = shape.head_dim // LANES
    source, target = register(count), register(count)
    for n in range(count):
        T.buffer_store(source, load(LANES * n), [lanes(LANES * n)])
    offset = 0
    for block, stride in shape.structure:
        reads = block_reads(shape.head_dim, block, stride)
        for n in range(count):
            total = None
            for j in range(block):
                positions = reads[LANES * n : LANES * (n + 1), j]
                value = _pick_elements(lambda m, s=source: s[lanes(LANES * m)], positions)
                product = value * columns[lanes(offset + j * shape.head_dim + LANES * n)]
                total = product if total is None else total + product
            T.buffer_store(target, total, [lanes(LANES * n)])
        source, target = target, source
        offset += block * shape.head_dim
    for n in range(count):
        store(LANES * n, source[lanes(LANES * n)])
