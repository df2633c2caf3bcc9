"""Quaternions as 4×4 matrices: the blocks of the iso, rotor and hurwitz rotations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


def left_matrix(q: Float64Array) -> Float64Array:
    """Return L [..., 4, 4] with L v = q v for quaternions q [..., 4] in the order (1, i, j, k)."""
    a, b, c, d = np.moveaxis(q, -1, 0)
    rows = [[a, -b, -c, -d], [b, a, -d, c], [c, d, a, -b], [d, -c, b, a]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def right_matrix(q: Float64Array) -> Float64Array:
    """Return M [..., 4, 4] with M v = v q for quaternions q [..., 4] in the order (1, i, j, k)."""
    a, b, c, d = np.moveaxis(q, -1, 0)
    rows = [[a, -b, -c, -d], [b, a, d, -c], [c, -d, a, b], [d, c, -b, a]]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def conjugate(q: Float64Array) -> Float64Array:
    """Return the conjugate of quaternions [..., 4]."""
    conjugated: Float64Array = q * np.array([1.0, -1.0, -1.0, -1.0])
    return conjugated


def random_units(generator: np.random.Generator, count: int) -> Float64Array:
    """Draw unit quaternions [count, 4], uniform on the sphere."""
    q = generator.standard_normal((count, 4))
    units: Float64Array = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return units
