"""What decode attention on CUDA lets a search choose, and what its rule chooses."""

from __future__ import annotations

import tvm

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.site_shape import SiteShape

from .cuda_target import dynamic_shared_memory, multiprocessors
from .decode_softmax_cuda import SumSlots
from .plain_rows_cuda import ROWS
from .query_rotation_cuda import SharedRows
from .tile_centres_cuda import FEW_COLUMNS, TileCentres
from .trellis_tables_cuda import TrellisTables, is_trellis

KNOBS: dict[str, tuple[int, ...]] = {
    "warps": (4, 8, 16),
    "stages": (1, 2),
    "blocks": (132, 264),
    "resident": (0, 2, 4),
    "splits": (16, 64),
    "least": (1, 2),
    "apart": (0, 1, 2, 3),
}
"""Warps per block; tiles in flight per warp at most; blocks that a launch aims at; blocks per multiprocessor that the
compiler must leave registers for (0: no matter); splits of a stream at most, where these give every multiprocessor a
block; tiles that a warp has at least; blocks more per stream for rows in 16 bits, where all blocks run at once."""


def _choice(*values: int) -> dict[str, int]:
    return dict(zip(KNOBS, values, strict=True))


PROMISING = (
    _choice(8, 1, 132, 0, 16, 2, 0),
    _choice(4, 2, 264, 2, 16, 1, 2),
    _choice(8, 2, 264, 0, 16, 2, 1),
    _choice(8, 2, 132, 0, 16, 2, 0),
    _choice(4, 1, 264, 4, 16, 1, 1),
    _choice(8, 1, 264, 0, 16, 2, 0),
    _choice(16, 1, 132, 0, 16, 1, 0),
)
"""What a search tries first: what was best somewhere when all was measured (see ``docs/performance.md``).

One block to a multiprocessor has registers to spare, which keys' centres and 16-bit rows take. Small blocks split short
contexts finely, and many of them hide each other's latencies where there are many sequences.
"""

TURNS = 3
"""Warps of a block with 16-bit rows that have any, where the segments are full."""

RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that every block takes besides its own."""


def default_knobs(shape: SiteShape, target: tvm.target.Target) -> dict[str, int]:
    """What the rule chooses: as many warps as a multiprocessor has registers for, in one wave of blocks."""
    least = 2 if TileLayout(*(codec.format for codec in shape.codecs()), shape.head_dim).tile_bytes <= 8192 else 1
    policy = shape.cache_policy
    # A few warps of each such block have one turn: warps that have rows besides tiles are the last to end, and so would
    # be those of a single block that had all rows (10.4 µs became 11.4 at 1 × 8,192).
    apart = -(-policy.slots // (TURNS * ROWS)) if policy.segmented else 0
    common = {"splits": 16, "least": least, "apart": apart}
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
