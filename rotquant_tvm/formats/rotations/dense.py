"""TurboQuant, the dense form: Haar-random orthogonal (QR of a Gaussian, R's diagonal positive)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import FormatError
from ..rotation import BlockLayer, RotationFamily, Structure


def _structure(head_dim: int) -> Structure:
    if head_dim < 1:
        raise FormatError(f"dense needs a head_dim of 1 or more, not {head_dim}")
    return ((head_dim, 1),)


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    q, r = np.linalg.qr(generator.standard_normal((head_dim, head_dim)))
    return (BlockLayer(head_dim, 1, q * np.sign(np.diagonal(r))),)


FAMILY = RotationFamily(name="dense", spelling="dense{bits}", gain="raw", structure=_structure, draw=_draw)
