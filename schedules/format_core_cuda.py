"""The core that there is for a format, on CUDA, and where it holds vectors."""

from __future__ import annotations

from rotquant_tvm.formats import LINEAR_BLOCK
from rotquant_tvm.ops.codec_shape import CodecShape

from .held_rotation_cuda import Structure
from .linear_core_cuda import HalfCore, LinearCore
from .vector_core_cuda import VectorCore
from .vector_lanes_cuda import ITEM_BYTES, VectorLanes

COMPARED_DTYPES = ("float16", "float32")
"""The dtypes of vectors for which kernels have been compared with the reference on a GPU."""
_COMPARED_HEAD_DIM = 256
"""Up to which head dimension those of rotations with several layers have been."""

FormatCore = VectorCore | LinearCore | HalfCore


def compared(shape: CodecShape) -> bool:
    """Whether kernels of this shape have been compared with the reference on a GPU; rules decline the others."""
    known = shape.codebook == "lloyd" and shape.dtype in COMPARED_DTYPES
    return known and compared_rotation(shape.structure, shape.head_dim)


def compared_rotation(structure: Structure, head_dim: int) -> bool:
    """Whether kernels of a rotation's structure have been compared with the reference on a GPU."""
    return len(structure) <= 1 or head_dim <= _COMPARED_HEAD_DIM


def format_core(
    shape: CodecShape,
    elements: int,
    *,
    codes: bool,
    table: bool | None = None,
    weights: int | None = None,
    staged: int = 1,
    exchange: int = 0,
) -> FormatCore | None:
    """Plan the core of a format, with about ``elements`` elements to a lane; None if there is none.

    ``codes``, ``table``, ``weights``, ``staged`` and ``exchange`` are those of ``VectorCore``.
    """
    if shape.dtype not in ITEM_BYTES:
        return None
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements)
    if VectorCore.possible(shape, lanes):
        options = {"weights": weights, "staged": bool(staged), "exchange": bool(exchange)}
        return VectorCore(shape, lanes, codes=codes, table=table, **options)
    if HalfCore.possible(shape, lanes):
        return HalfCore(shape, lanes)
    if shape.codebook == "linear":
        lanes = VectorLanes(shape.head_dim, shape.dtype, max(lanes.lanes, LINEAR_BLOCK // lanes.access))
        return LinearCore(shape, lanes)
    return None
