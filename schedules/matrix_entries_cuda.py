"""The entries of a rotation's matrix: which paths through the layers they are products of, and their 16-bit halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx as tir
from numpy.typing import NDArray

from rotquant_tvm.formats import Codec
from rotquant_tvm.formats.rotation import Structure, block_reads

from .cuda_ops import f32, scalar
from .tile_rows_cuda import brain2, pack_brain2

Expr = Any


def paths(structure: Structure, head_dim: int) -> NDArray[np.int64]:
    """int64 [d, d]: how many products of coefficients an entry of the rotation's matrix is the sum of."""
    count = np.eye(head_dim, dtype=np.int64)
    for block, stride in structure:
        layer = np.zeros((head_dim, head_dim), np.int64)
        np.add.at(layer, (np.arange(head_dim)[:, None], block_reads(head_dim, block, stride)), 1)
        count = layer @ count
    return count


def is_exact(codec: Codec) -> bool:
    """Whether every rotation of the codec's family has entries 0 and powers of two.

    A drawn one tells: random angles never have.
    """
    mantissas = np.abs(np.frexp(codec.rotation.matrix())[0])
    return bool(np.isin(mantissas, (0.0, 0.5)).all())


@dataclass(frozen=True)
class MatrixPath:
    """From ``inputs`` … through the layers to an output: the first layer's coefficients, then one of each other."""

    exists: Expr
    output: Expr
    inputs: Expr
    factors: list[Any]


class Half:
    """A value rounded to 16 bits: its bits (uint32), and its value as float32."""

    def __init__(self, value: Expr, operand: str) -> None:
        if operand == "f16":
            half = scalar(value.astype("float16"), "float16")
            self.bits = scalar(tir.reinterpret("uint16", half).astype("uint32"))
            self.value = half.astype("float32")
        else:
            self.bits = pack_brain2(value, f32(0))
            self.value = brain2(self.bits)[0]
