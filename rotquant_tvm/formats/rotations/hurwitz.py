"""Strided Hurwitz: layers of quartets at several strides, each multiplied by a Hurwitz unit (±1±i±j±k)/2.

IsoQuant's block with a unit whose product needs only additions, and a stride permutation between the layers
so that the whole head is mixed. The strides are 1, 4 and d/4, and 16 too at the multiples of 64 from 256 on; every
multiple of 16 can take them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import FormatError
from ..quaternion import left_matrix
from ..rotation import BlockLayer, RotationFamily, Structure


def _structure(head_dim: int) -> Structure:
    if head_dim < 32 or head_dim % 16:
        raise FormatError(f"hurwitz needs a multiple of 16 from 32 as head_dim, not {head_dim}; use dense")
    strides = (1, 4, 16, head_dim // 4) if head_dim >= 256 and head_dim % 64 == 0 else (1, 4, head_dim // 4)
    return tuple((4, stride) for stride in strides)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    for _, stride in structure:
        units = generator.integers(0, 2, (head_dim // 4, 4)).astype(np.float64) - 0.5
        yield BlockLayer.from_blocks(left_matrix(units), stride)


FAMILY = RotationFamily(
    name="hurwitz", spelling="hurwitz{bits}", gain="mse", structure=_structure, draw=_draw
)
