"""The core that there is for a format, on CUDA, and where it holds vectors."""

from __future__ import annotations

from rotquant_tvm.formats import LINEAR_BLOCK
from rotquant_tvm.ops.codec_shape import CodecShape

from .held_rotation_cuda import REGISTER_WEIGHTS
from .linear_core_cuda import HalfCore, LinearCore
from .vector_core_cuda import VectorCore
from .vector_lanes_cuda import ITEM_BYTES, VectorLanes

FormatCore = VectorCore | LinearCore | HalfCore


def format_core(
    shape: CodecShape,
    elements: int,
    *,
    codes: bool,
    table: bool | None = None,
    weights: int = REGISTER_WEIGHTS,
) -> FormatCore | None:
    """Plan the core of a format, with about ``elements`` elements to a lane; None if there is none.

    ``codes``, ``table`` and ``weights`` are those of ``VectorCore``.
    """
    if shape.dtype not in ITEM_BYTES:
        return None
    lanes = VectorLanes.choose(shape.head_dim, shape.dtype, elements)
    if VectorCore.possible(shape, lanes):
        return VectorCore(shape, lanes, codes=codes, table=table, weights=weights)
    if HalfCore.possible(shape, lanes):
        return HalfCore(shape, lanes)
    if shape.codebook == "linear":
        lanes = VectorLanes(shape.head_dim, shape.dtype, max(lanes.lanes, LINEAR_BLOCK // lanes.access))
        return LinearCore(shape, lanes)
    return None
