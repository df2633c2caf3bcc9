"""What decode attention on CUDA lets a search choose, and what its rule chooses."""

from __future__ import annotations

import tvm

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_target import dynamic_shared_memory, multiprocessors
from .decode_softmax_cuda import SumSlots
from .query_rotation_cuda import SharedRows
from .tile_centres_cuda import FEW_COLUMNS, TileCentres
from .trellis_tables_cuda import TrellisTables, is_trellis

KNOBS: dict[str, tuple[int, ...]] = {
    "warps": (4, 8, 16),
    "stages": (1, 2),
    "blocks": (132, 264),
    "resident": (0, 2),
    "splits": (16, 64),
    "least": (1, 2),
}
"""Warps per block; tiles in flight per warp at most; blocks that a launch aims at; blocks per multiprocessor that the
compiler must leave registers for (0: no matter); splits of a stream at most, where these give every multiprocessor a
block; tiles that a warp has at least."""

RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that every block takes besides its own."""


def default_knobs(shape: SiteShape, target: tvm.target.Target) -> dict[str, int]:
    """What the rule chooses: as many warps as a multiprocessor has registers for, in one wave of blocks."""
    least = 2 if TileLayout(*(codec.format for codec in shape.codecs()), shape.head_dim).tile_bytes <= 8192 else 1
    common = {"splits": 16, "least": least}
    if any(is_trellis(codec) for codec in shape.codecs()):
        return _trellis_knobs(shape, target) | common
    if shape.group <= 4 and shape.head_dim <= 128:
        warps, resident = 8, 2  # at most 128 registers a lane
    else:
        warps, resident = 4, 3 if shape.head_dim <= 128 else 2
    return {
        "warps": warps,
        "stages": 2,
        "blocks": resident * multiprocessors(target),
        "resident": resident,
        **common,
    }


def _trellis_knobs(shape: SiteShape, target: tvm.target.Target) -> dict[str, int]:
    """Two blocks of 8 warps where a multiprocessor has memory for their tables; else one, of as many as it holds."""
    wide = (shape.group > 4) + (shape.head_dim > 128)
    if not wide and _trellis_bytes(shape, 8) + RESERVED <= (dynamic_shared_memory(target) + RESERVED) // 2:
        return {"warps": 8, "stages": 1, "blocks": 2 * multiprocessors(target), "resident": 2}
    return {"warps": (16, 12, 8)[wide], "stages": 2, "blocks": multiprocessors(target), "resident": 0}


def _trellis_bytes(shape: SiteShape, warps: int) -> int:
    """Shared memory of a block of so many warps with a tile each."""
    codecs, sizes = shape.codecs(), (min(shape.group, 8), shape.head_dim)
    words = warps * (TileLayout(codecs[0].format, codecs[1].format, shape.head_dim).tile_bytes // 4 + 2)
    words += warps * TileCentres.words(shape.head_dim, FEW_COLUMNS) if shape.cache_policy.center else 0
    words += SharedRows.words(*sizes) if shape.rotated else 0
    words += SumSlots.words(warps, *sizes) if shape.cache_policy.segmented else 0
    return 4 * (words + TrellisTables.words(codecs))
