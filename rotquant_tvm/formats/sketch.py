"""Sign sketches: the signs of S v, S Gaussian, from which inner products with v are estimated without bias (QJL).

With m = d rows, entries of S drawn from N(0, 1), and ‖v‖ stored beside the signs,

    ⟨q, v⟩ ≈ ‖v‖ · √(π/2)/m · ⟨S q, sign(S v)⟩ = ⟨q, ṽ⟩,    ṽ = ‖v‖ · √(π/2)/m · Sᵀ sign(S v)

The estimate is linear in what is stored, so a decoded vector ṽ exists; it is far from v (the squared error is about
(π/2)‖v‖²) and serves inner products alone. ``qjl1`` is the sketch of the vector itself; in ``turbo3+qjl``
(TurboQuant-Prod) it is that of the *rotated* residual of a 2-bit code. S plays a rotation's part and is stored like
one, but is not orthogonal: ⟨S q, S v⟩ is not ⟨q, v⟩.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .rotation import BlockLayer, Rotation, RotationFamily, Structure

_STREAM = 0x516A4C
"""Keeps a sketch's draws apart from those of the rotation of the same seed."""


@dataclass(frozen=True)
class SignCodebook:
    """The two values ±√(π/2)/d that a sign stands for."""

    head_dim: int
    bits = 1

    @cached_property
    def grid(self) -> NDArray[np.int8]:
        """int8 [2]: −1, 1."""
        return np.array([-1, 1], np.int8)

    @cached_property
    def scale(self) -> np.float32:
        """√(π/2)/d."""
        return np.float32(np.sqrt(np.pi / 2) / self.head_dim)

    @cached_property
    def centroids(self) -> NDArray[np.float32]:
        """float32 [2]: grid · scale."""
        return self.grid.astype(np.float32) * self.scale

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """float32 [1]: 0."""
        return np.zeros(1, np.float32)

    def nearest(self, y: ArrayLike, norm: ArrayLike = 1.0) -> NDArray[np.uint8]:
        """Return uint8 codes, the shape of ``y``: whether y > 0."""
        return (np.asarray(y) > 0).astype(np.uint8)

    def decode(self, codes: NDArray[Any], dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Return the values of codes."""
        values: NDArray[Any] = self.centroids.astype(dtype)[codes]
        return values

    def middle(self) -> int:
        """Return the code of the elements of a vector of zeros."""
        return 1


def draw_sketch(head_dim: int, seed: int | Sequence[int] = 0) -> Rotation:
    """Draw S for vectors of ``head_dim``, a dense layer; the same arguments give the same S."""
    return Rotation.draw(FAMILY.name, head_dim, [*(int(part) for part in np.ravel(seed)), _STREAM])


def _structure(head_dim: int) -> Structure:
    return ((head_dim, 1),)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    return (BlockLayer(head_dim, 1, generator.standard_normal((head_dim, head_dim))),)


FAMILY = RotationFamily(name="gaussian", spelling="", gain="raw", structure=_structure, draw=_draw)
"""Where a format names its rotation, "gaussian" says that a sketch stands in its place."""
