"""PlanarQuant (= IsoQuant-2D): a Givens rotation of every pair of neighbours, by uniform random angles."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...errors import FormatError
from ..rotation import BlockLayer, RotationFamily, Structure


def givens(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [[cos, −sin], [sin, cos]] of each angle: [n] -> [n, 2, 2]."""
    c, s = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([c, -s], axis=-1), np.stack([s, c], axis=-1)], axis=-2)


def _structure(head_dim: int) -> Structure:
    if head_dim % 2:
        raise FormatError(f"planar needs an even head_dim, not {head_dim}; use rotor or dense")
    return ((2, 1),)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    return (BlockLayer.from_blocks(givens(generator.uniform(0.0, 2.0 * np.pi, head_dim // 2))),)


FAMILY = RotationFamily(
    name="planar",
    spelling="planar{bits}",
    gain="norm",
    structure=_structure,
    draw=_draw,
    aliases=("iso{bits}-2d",),
)
