"""TurboQuant, the fast form: D₂ · H_d/√d · D₁ with the Walsh–Hadamard matrix H and random signs D.

H is the product of radix-4 butterflies at strides 1, 4, 16, … and one of radix 2 at stride d/2 if log₂ d is
odd; the signs are folded into the first and the last layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...errors import FormatError
from ..rotation import BlockLayer, RotationFamily, Structure

_H2 = np.array([[1.0, 1.0], [1.0, -1.0]])


def _structure(head_dim: int) -> Structure:
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise FormatError(f"turbo needs a power of two as head_dim, not {head_dim}; use hurwitz or dense")
    log2 = head_dim.bit_length() - 1
    radix4 = tuple((4, 4**layer) for layer in range(log2 // 2))
    return radix4 + (((2, head_dim // 2),) if log2 % 2 else ())


def _draw(head_dim: int, structure: Structure, generator: np.random.Generator) -> Iterable[BlockLayer]:
    first, last = generator.integers(0, 2, (2, head_dim)) * 2.0 - 1.0
    layers = []
    for block, stride in structure:
        hadamard = _H2 / np.sqrt(2.0) if block == 2 else np.kron(_H2, _H2) / 2.0
        layers.append(BlockLayer.from_blocks(np.tile(hadamard, (head_dim // block, 1, 1)), stride))
    head = layers[0]
    layers[0] = BlockLayer(head.block, head.stride, head.coefficients * first[head.reads])
    tail = layers[-1]
    layers[-1] = BlockLayer(tail.block, tail.stride, tail.coefficients * last[:, None])
    return layers


FAMILY = RotationFamily(name="turbo", spelling="turbo{bits}", gain="norm", structure=_structure, draw=_draw)
