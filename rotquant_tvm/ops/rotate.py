"""Rotate: an orthogonal map on the last axis, from the layers of a ``Rotation``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .axes import Axes
from .vector_code import Structure, emit_rotation, f32, rotation_size

ROTATION_ATTR = "rotquant.rotation"


@dataclass(frozen=True)
class RotationShape:
    """What a rotate kernel is specialized on; the kernel carries it as an attribute."""

    structure: tuple[tuple[int, int], ...]
    head_dim: int
    dtype: str

    @property
    def coefficients(self) -> int:
        """How many coefficients the kernel takes."""
        return rotation_size(self.structure, self.head_dim)

    @staticmethod
    def of(func: tvm.tirx.PrimFunc) -> RotationShape | None:
        """Read the shape that a function carries, if any."""
        text = func.attrs.get(ROTATION_ATTR) if func.attrs is not None else None
        if text is None:
            return None
        record = json.loads(str(text))
        return RotationShape(tuple(tuple(layer) for layer in record["structure"]), record["head_dim"], record["dtype"])


def rotate(structure: Structure, head_dim: int, dtype: str, axes: Axes) -> tvm.tirx.PrimFunc:
    """Build ``rotate(x, coefficients, y)`` for a rotation's ``structure`` (``Rotation.structure``).

    Shapes: x, y ``dtype`` [n0, n1, n2, head_dim]; coefficients float32 (``Rotation.data``; its inverse's data and
    structure un-rotate).
    """
    sizes = [tir.Var(f"n{i}", "int64") for i in range(3)]
    rows = sizes[0] * sizes[1] * sizes[2]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("rotate")
        shape = json.dumps(asdict(RotationShape(tuple(structure), head_dim, dtype)))
        T.func_attr({"rotquant.op": "rotate", ROTATION_ATTR: shape, "tirx.noalias": True})
        x = T.arg("x", T.buffer((*sizes, head_dim), dtype))
        coefficients = T.arg("coefficients", T.buffer((rotation_size(structure, head_dim),), "float32"))
        y = T.arg("y", T.buffer((*sizes, head_dim), dtype))
        with axes.blocks(rows) as block, T.sblock("row"):
            row = T.axis.spatial(rows, block)
            at = (row // (sizes[1] * sizes[2]), row // sizes[2] % sizes[1], row % sizes[2])
            T.reads(x[(*at, slice(0, head_dim))], coefficients[0 : rotation_size(structure, head_dim)])
            T.writes(y[(*at, slice(0, head_dim))])
            buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(2)]
            with axes.lanes(head_dim) as dim:
                T.buffer_store(buffers[0], f32(x[(*at, dim)]), [dim])
            result = emit_rotation(axes, structure, head_dim, coefficients, *buffers)
            with axes.lanes(head_dim) as dim:
                T.buffer_store(y, result[dim].astype(dtype), [*at, dim])
    return builder.get()
