"""How prefill attention is cut up on CUDA: query rows of a thread block, tokens of a stage, and what they take."""

from __future__ import annotations

from dataclasses import dataclass

from rotquant_tvm.formats import TOKENS

from .cuda_ops import WARP
from .mma_half_cuda import row_pitch

KNOBS: dict[str, tuple[int, ...]] = {"row_tiles": (1, 2), "warps": (2, 4, 8), "tokens": (32, 64, 128), "stages": (1, 2)}
"""Query rows of a warp in units of 16, warps of a block, tokens of a stage, stages that are copied ahead."""
DEFAULTS = (
    {},
    {"tokens": 32, "stages": 1},
    {"warps": 2},
    {"warps": 2, "tokens": 32, "stages": 1},
    {"warps": 2, "tokens": 32, "stages": 1, "row_tiles": 1},
)
"""Changes to the preferred values, in turn, until a block fits into the shared memory that there is."""
REGISTERS = 255
"""Registers that a thread may have; those of sums and scores leave 60 for the rest."""


@dataclass(frozen=True)
class PrefillTiling:
    """The knobs (``KNOBS``) at a head dimension.

    ``raw_bytes``: the size of a packed tile; ``centre_bytes``: that of a block's mean key, 0 if there is none;
    ``tables``: elements for the values of trellis states.
    """

    head_dim: int
    raw_bytes: int
    centre_bytes: int
    tables: int
    row_tiles: int
    warps: int
    tokens: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * WARP

    @property
    def rows(self) -> int:
        """Query rows of a block: tokens and the grouped heads of each."""
        return 16 * self.row_tiles * self.warps

    @property
    def pitch(self) -> int:
        """Elements from one row in shared memory to the next."""
        return row_pitch(self.head_dim)

    @property
    def role_size(self) -> int:
        """Elements that a stage's keys take in shared memory, and its values."""
        return self.tokens * self.pitch

    @property
    def stages_start(self) -> int:
        """The element of shared memory where the stages begin: after the queries."""
        return self.rows * self.pitch

    @property
    def raw_start(self) -> int:
        """The element of shared memory where packed tiles are copied to: after the first stage, in others' place."""
        return self.stages_start + 2 * self.role_size

    @property
    def centre_start(self) -> int:
        """The element of shared memory where the tiles' mean keys are copied to."""
        return self.raw_start + self.tokens // TOKENS * self.raw_bytes // 2

    @property
    def table_start(self) -> int:
        """The element of shared memory where the tables are."""
        packed = self.centre_start + self.tokens // TOKENS * self.centre_bytes // 2
        return max(packed, self.stages_start + 2 * self.stages * self.role_size)

    @property
    def size(self) -> int:
        """Elements (2 bytes) of shared memory."""
        return self.table_start + self.tables

    def fits(self, shared_bytes: int) -> bool:
        """Whether a block has the shared memory and its threads the registers."""
        registers = self.row_tiles * (self.head_dim + self.tokens) // 2
        threads = 65536 // self.threads
        return 2 * self.size <= shared_bytes and registers + 60 <= min(threads, REGISTERS)


def prefill_tiling(
    head_dim: int, sizes: tuple[int, int, int], shared_bytes: int, knobs: dict[str, int]
) -> PrefillTiling | None:
    """Return the rule's tiling with some knobs set, or None if no block of the kind fits into so much shared memory.

    ``sizes``: what ``PrefillTiling`` calls ``raw_bytes``, ``centre_bytes`` and ``tables``.
    """
    preferred = {"row_tiles": 2, "warps": 4, "tokens": 32, "stages": 2}
    if head_dim > 128:  # the outputs of 32 rows would not fit a warp's registers
        preferred |= {"row_tiles": 1, "tokens": 64, "stages": 1}
    for change in DEFAULTS:
        tiling = PrefillTiling(head_dim, *sizes, **{**preferred, **change, **knobs})
        if tiling.fits(shared_bytes):
            return tiling
    return None
