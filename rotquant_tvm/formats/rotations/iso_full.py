"""IsoQuant-Full: every quartet v becomes q_L v q̄_R, with two random unit quaternions (all of SO(4))."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import FormatError
from ..quaternion import conjugate, left_matrix, random_units, right_matrix
from ..rotation import BlockLayer, RotationFamily, Structure


def _structure(head_dim: int) -> Structure:
    if head_dim % 4:
        raise FormatError(
            f"iso-full needs a head_dim divisible by 4, not {head_dim}; use planar, rotor or dense"
        )
    return ((4, 1),)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    left = left_matrix(random_units(generator, head_dim // 4))
    right = right_matrix(conjugate(random_units(generator, head_dim // 4)))
    return (BlockLayer.from_blocks(left @ right),)


FAMILY = RotationFamily(
    name="iso-full", spelling="iso{bits}-full", gain="norm", structure=_structure, draw=_draw
)
