"""No rotation: the identity, with no layers (for the 16-bit formats, q8_0, and as a baseline)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..rotation import BlockLayer, RotationFamily, Structure


def _structure(head_dim: int) -> Structure:
    return ()


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    return ()


FAMILY = RotationFamily(name="none", spelling="", gain="raw", structure=_structure, draw=_draw)
