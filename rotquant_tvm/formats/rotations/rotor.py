"""RotorQuant: every triple is a vector v of Cl(3,0) turned by a random rotor, R v R̃, written as a 3×3 matrix.

The even multivectors of Cl(3,0) are the quaternions, so a uniform rotor is a uniform unit quaternion. Two
entries left over by the triples are turned as a planar pair and a single one is kept: the rotation stays d×d,
with nothing padded.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import FormatError
from ..quaternion import conjugate, left_matrix, random_units, right_matrix
from ..rotation import BlockLayer, RotationFamily, Structure
from .planar import givens


def _structure(head_dim: int) -> Structure:
    if head_dim < 3:
        raise FormatError(f"rotor needs a head_dim of 3 or more, not {head_dim}; use planar")
    return ((3, 1),)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    triples, tail = divmod(head_dim, 3)
    q = random_units(generator, triples)
    turns = (left_matrix(q) @ right_matrix(conjugate(q)))[:, 1:, 1:]
    coefficients = np.zeros((head_dim, 3))
    coefficients[: 3 * triples] = turns.reshape(3 * triples, 3)
    # The rows of the tail read the last three entries; the ones that belong to the last triple get no weight.
    if tail == 2:
        coefficients[-2:, 1:] = givens(generator.uniform(0.0, 2.0 * np.pi, 1))[0]
    elif tail == 1:
        coefficients[-1, 2] = 1.0
    return (BlockLayer(3, 1, coefficients),)


FAMILY = RotationFamily(name="rotor", spelling="rotor{bits}", gain="raw", structure=_structure, draw=_draw)
