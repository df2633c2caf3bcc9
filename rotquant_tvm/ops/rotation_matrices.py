"""The rotations that prefill attention does itself, as matrices: what a kernel takes, and the arrays that it is given.

A query is compared with keys, and where two of them compete a rounded matrix decides between them. Where queries are
float16, the keys' matrix therefore comes as two of them: rounded, and what rounding took from it. The values' one is
applied to a sum, which no later step magnifies, and stays one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from ..formats import Codec
from ..formats.rotation import Rotation

ENOUGH = 1e-6
"""An entry that float16 holds up to this needs no second term: float32 coefficients do not know it better."""


def rotation_matrices(codec_k: Codec, codec_v: Codec, dtype: str) -> tuple[Any, Any]:
    """Declare what a ``rotated`` kernel takes after the lengths: R of the keys' rotation, then of the values' one.

    Float16 where ``dtype`` is, else float32; R [head_dim, head_dim], and of keys [2·head_dim, head_dim] where
    ``key_terms`` is 2. One that is the identity is left out, and None here.
    """

    def declared(name: str, codec: Codec, terms: int) -> Any:
        size = (terms * codec.head_dim, codec.head_dim)
        return None if codec.rotation.identity else T.arg(name, T.buffer(size, matrix_dtype(dtype)))

    return declared("rotation_k", codec_k, key_terms(codec_k, dtype)), declared("rotation_v", codec_v, 1)


def rotation_arguments(
    codecs: Sequence[Codec], rotations: Sequence[Rotation], dtype: str
) -> list[NDArray[np.float16 | np.float32]]:
    """The arrays for ``rotation_matrices`` of ``codecs``, with ``rotations`` [K, V] of the same families in them."""
    arguments = []
    for codec, rotation, terms in zip(codecs, rotations, (key_terms(codecs[0], dtype), 1), strict=True):
        if not codec.rotation.identity:
            arguments.append(_terms(rotation.matrix(), terms, dtype))
    return arguments


def key_terms(codec: Codec, dtype: str) -> int:
    """How many matrices the keys' rotation is the sum of: 2 where ``dtype`` is float16 and that does not hold it.

    A drawn rotation tells for its family: random angles never are such numbers, quaternions of integers always.
    """
    if dtype != "float16" or codec.rotation.identity:
        return 1
    matrix = codec.rotation.matrix()
    return 1 if np.abs(matrix - matrix.astype(np.float16)).max() <= ENOUGH else 2


def matrix_dtype(dtype: str) -> str:
    """The dtype of ``rotation_matrices`` where queries have ``dtype``."""
    return "float16" if dtype == "float16" else "float32"


def _terms(matrix: NDArray[np.float64], terms: int, dtype: str) -> NDArray[np.float16 | np.float32]:
    rounded = matrix.astype(matrix_dtype(dtype))
    if terms == 1:
        return rounded
    return np.concatenate([rounded, (matrix - rounded).astype(rounded.dtype)])
