"""Rotations as layers of small blocks: one form for every family, in NumPy, TensorIR and the artifact.

A rotation is an orthogonal d×d map. Every family is written as a product of block-diagonal layers, each a
set of ``block × block`` matrices acting on entries ``stride`` apart. Which layers a family has (its
*structure*) depends only on the family and the head dimension, so kernels are generic in the coefficients.
A family is one file in ``rotations/``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import FormatError, UsageError

Float64Array = NDArray[np.float64]
Structure = tuple[tuple[int, int], ...]


def block_reads(head_dim: int, block: int, stride: int) -> NDArray[np.int64]:
    """Return int64 [d, block]: the entries of x that each entry of y = layer(x) reads.

    At stride 1 the last block may overlap its neighbour, so that ``head_dim`` need not be a multiple of
    ``block`` (the overlapping coefficients are zero).

    Raises ``FormatError`` if the blocks do not fit the head dimension.
    """
    if block < 1 or stride < 1 or block * stride > head_dim:
        raise FormatError(f"a layer of blocks of {block} at stride {stride} does not fit head_dim {head_dim}")
    if stride > 1 and head_dim % (block * stride):
        raise FormatError(
            f"a layer of blocks of {block} at stride {stride} needs a head_dim that is a multiple of "
            f"{block * stride}, not {head_dim}; use another stride"
        )
    i = np.arange(head_dim)
    if stride == 1:
        base = np.minimum(i // block * block, head_dim - block)
    else:
        base = i - (i // stride) % block * stride
    return base[:, None] + np.arange(block) * stride


@dataclass(frozen=True, eq=False)
class BlockLayer:
    """One layer: y[i] = Σ_j coefficients[i, j] · x[base(i) + j·stride], with base(i) as in ``block_reads``.

    ``coefficients`` is float64 [d, block]; row i is row i of that layer's sparse d×d matrix.
    """

    block: int
    stride: int
    coefficients: Float64Array

    def __post_init__(self) -> None:
        coefficients = np.array(self.coefficients, dtype=np.float64)
        if coefficients.ndim != 2 or coefficients.shape[1] != self.block:
            raise FormatError(f"coefficients must be [d, {self.block}], not {list(coefficients.shape)}")
        coefficients.setflags(write=False)
        object.__setattr__(self, "coefficients", coefficients)
        block_reads(len(coefficients), self.block, self.stride)

    @classmethod
    def from_blocks(cls, blocks: Float64Array, stride: int = 1) -> BlockLayer:
        """Build a layer from matrices [d/block, block, block], in the order of each one's first entry."""
        count, block, _ = blocks.shape
        i = np.arange(count * block)
        owner = i // (block * stride) * stride + i % stride
        return cls(block, stride, blocks[owner, i // stride % block])

    @property
    def head_dim(self) -> int:
        """The head dimension d."""
        return len(self.coefficients)

    @cached_property
    def reads(self) -> NDArray[np.int64]:
        """int64 [d, block]: which entries of the input each row of ``coefficients`` multiplies."""
        return block_reads(self.head_dim, self.block, self.stride)

    @cached_property
    def matrix(self) -> Float64Array:
        """The layer as a float64 [d, d] matrix M, with y = M x."""
        matrix = np.zeros((self.head_dim, self.head_dim))
        np.add.at(matrix, (np.arange(self.head_dim)[:, None], self.reads), self.coefficients)
        matrix.setflags(write=False)
        return matrix

    def transpose(self) -> BlockLayer:
        """Return the transposed layer, with the same block and stride."""
        columns = np.arange(self.head_dim)[:, None]
        return BlockLayer(self.block, self.stride, self.matrix[self.reads, columns])


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal d×d map: ``layers`` applied in order (none: the identity)."""

    head_dim: int
    layers: tuple[BlockLayer, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer.head_dim != self.head_dim:
                raise FormatError(f"a layer of head_dim {layer.head_dim} in a rotation of {self.head_dim}")

    @classmethod
    def draw(cls, family: str, head_dim: int, seed: int | Sequence[int] = 0) -> Rotation:
        """Draw a rotation of a family; the same (family, head_dim, seed) gives the same rotation.

        A compiled library holds the drawn ``data``; loading one never draws again.

        Raises ``FormatError`` for an unknown family or a head dimension it cannot take, and ``UsageError``
        for a negative seed.
        """
        if min(np.ravel(seed), default=0) < 0:
            raise UsageError(f"seed {seed} is negative; use a seed of 0 or more")
        structure = rotation_structure(family, head_dim)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        layers = tuple(rotation_family(family).draw(head_dim, structure, generator))
        return cls(head_dim, layers)

    @classmethod
    def from_data(cls, head_dim: int, structure: Structure, data: ArrayLike) -> Rotation:
        """Rebuild a rotation from its ``structure`` and stored ``data`` (float32 [sum of d·block])."""
        flat = np.asarray(data, dtype=np.float64).ravel()
        sizes = [head_dim * block for block, _ in structure]
        if sum(sizes) != flat.size:
            raise FormatError(f"rotation data has {flat.size} values, not the {sum(sizes)} of {structure}")
        parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
        layers = (
            BlockLayer(block, stride, part.reshape(head_dim, block))
            for (block, stride), part in zip(structure, parts, strict=True)
        )
        return cls(head_dim, tuple(layers))

    @property
    def identity(self) -> bool:
        """Whether this is the identity, with no layers."""
        return not self.layers

    @property
    def structure(self) -> Structure:
        """The (block, stride) of each layer, in order of application."""
        return tuple((layer.block, layer.stride) for layer in self.layers)

    @property
    def data(self) -> NDArray[np.float32]:
        """float32 [sum of d·block]: the layers' coefficients in C order, concatenated."""
        parts = [layer.coefficients.ravel() for layer in self.layers]
        return np.concatenate([np.empty(0), *parts]).astype(np.float32)

    def matrix(self) -> Float64Array:
        """Return R as float64 [d, d], with apply(x) = R x."""
        matrix = np.eye(self.head_dim)
        for layer in self.layers:
            matrix = layer.matrix @ matrix
        return matrix

    def apply(self, x: ArrayLike) -> NDArray[Any]:
        """Return R x for x of shape [..., d], in float32 if x is float32 and in float64 otherwise."""
        y = np.asarray(x)
        if y.ndim == 0 or y.shape[-1] != self.head_dim:
            raise UsageError(f"x has shape {list(y.shape)}; its last axis must be head_dim {self.head_dim}")
        y = y.astype(np.float32 if y.dtype == np.float32 else np.float64)
        for layer in self.layers:
            y = y @ layer.matrix.T.astype(y.dtype)
        return y

    def inverse(self) -> Rotation:
        """Return Rᵀ: the layers reversed and each transposed."""
        return Rotation(self.head_dim, tuple(layer.transpose() for layer in reversed(self.layers)))


@dataclass(frozen=True)
class RotationFamily:
    """A family of rotations, as its one file in ``rotations/`` declares it (under the name ``FAMILY``).

    name        the family's name, as in ``KVFormat.rotation``.
    spelling    the word of its KV formats, with ``{bits}``: ``"iso{bits}-full"``; "" if it has none.
    gain        the published gain rule, the default of its KV formats.
    structure   head_dim -> ((block, stride), …); raises ``FormatError`` naming what to use instead.
    draw        (head_dim, structure, generator) -> the layers.
    aliases     further spellings of the same format, with ``{bits}``.
    """

    name: str
    spelling: str
    gain: str
    structure: Callable[[int], Structure]
    draw: Callable[[int, Structure, np.random.Generator], Iterable[BlockLayer]]
    aliases: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def rotation_families() -> dict[str, RotationFamily]:
    """Return every family by name, one per module of ``rotations/``."""
    package = importlib.import_module(".rotations", __package__)
    modules = (
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    )
    return {module.FAMILY.name: module.FAMILY for module in modules}


def rotation_family(family: str) -> RotationFamily:
    """Return a family by name; raises ``FormatError`` naming the known ones."""
    from .sketch import FAMILY as GAUSSIAN  # not a rotation, but drawn, stored and applied as one

    families = rotation_families()
    if family == GAUSSIAN.name:
        return GAUSSIAN
    if family not in families:
        raise FormatError(f"unknown rotation '{family}'; known: {', '.join(sorted(families))}")
    return families[family]


def rotation_structure(family: str, head_dim: int) -> Structure:
    """Return the (block, stride) of each layer of a family at a head dimension.

    Raises ``FormatError`` for an unknown family, or a head dimension it cannot take (saying what to use
    instead).
    """
    structure = rotation_family(family).structure(head_dim)
    for block, stride in structure:
        block_reads(head_dim, block, stride)
    return structure
