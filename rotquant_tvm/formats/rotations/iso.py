"""IsoQuant-Fast: every quartet v is a quaternion and becomes q v, with a random unit q (left isoclinic)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import FormatError
from ..quaternion import left_matrix, random_units
from ..rotation import BlockLayer, RotationFamily, Structure


def _structure(head_dim: int) -> Structure:
    if head_dim % 4:
        raise FormatError(f"iso needs a head_dim divisible by 4, not {head_dim}; use planar, rotor or dense")
    return ((4, 1),)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    return (BlockLayer.from_blocks(left_matrix(random_units(generator, head_dim // 4))),)


FAMILY = RotationFamily(name="iso", spelling="iso{bits}", gain="norm", structure=_structure, draw=_draw)
