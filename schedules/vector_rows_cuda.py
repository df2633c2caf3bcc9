"""The frame of kernels that map vectors to something, on CUDA: a warp goes over the rows in steps of the whole grid.

While a step is computed, the rows of the next one are being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm.tirx as tir
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, scalar
from .dependent_launch_cuda import let_next_start, starts_early, wait_for_inputs

Expr = Any

ROW_KNOBS: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4),
    "warps": (2, 4, 8),
    "blocks": (264, 528, 1056, 2112, 4224),
    "resident": (0, 3, 4, 8),
    "early": (0, 1),
    "stream": (0, 1),
}
"""Vectors per lane and step; warps per block; blocks at most; how many are to fit into a multiprocessor (0: as come);
whether to start early (``dependent_launch_cuda``); whether vectors are read and written as what is not needed again."""

ENCODE_KNOBS = {**ROW_KNOBS, "late": (0, 1)}
"""Besides, whether the next step is read only when this one's vectors need their registers no more."""


FEW_BLOCKS = 264
"""Up to so many, a block takes one step."""

MULTIPROCESSORS = 132
"""Of an H100; others have fewer or a few more, and blocks that wait for a place cost little."""

MANY_STEPS, MORE_BLOCKS = 64, 4
"""From so many steps to a block on, there are this many times as many blocks: late ones fill in for those that end. Of
kernels without weights there are as many as rows want then, since blocks go over memory in order, as steps do not."""


def fitting_blocks(registers: int) -> int:
    """About how many blocks of four warps have a place at a time, if each thread keeps so many registers throughout."""
    return MULTIPROCESSORS * (8 if registers < 48 else 4)


class RowLoop:
    """The rows of one warp: in a step, each lane works on ``rows`` vectors and the warp on ``groups`` times as many."""

    def __init__(
        self,
        total: Expr,
        groups: int,
        target: Target,
        *,
        rows: int = 1,
        warps: int = 4,
        blocks: int | None = None,
        resident: int = 0,
        early: int | None = None,
        stream: int = 0,
        late: int = 0,
        registers: int = 0,
    ) -> None:
        """Plan it for ``total`` rows (int64), ``groups`` side by side in a warp; for the rest see ``ROW_KNOBS``.

        ``registers``: how many each thread keeps throughout, by which blocks are chosen where none are asked for.
        """
        self.total, self.groups, self.rows, self.warps, self._resident = total, groups, rows, warps, resident
        self.early = starts_early(target) if early is None else bool(early)
        # Not as constants, which the compiler reads as late as it can: behind the barrier that follows the weights.
        self.read = "global" + (".L1::no_allocate" if stream else "")
        self.write = "global.cs" if stream else "global"
        """How rows are accessed (``cuda_ops.load_words``, ``store_words``)."""
        self.late = bool(late)
        per_block = groups * rows * warps
        needed = (total + (per_block - 1)) // per_block
        # Two steps to a block are faster than one to each of twice as many: every block reads the weights first.
        enough = tir.max((needed + 1) // 2, tir.const(FEW_BLOCKS, "int64"))
        limit = tir.const(blocks or fitting_blocks(registers), "int64")
        if blocks is None:
            limit = tir.Select(needed >= limit * MANY_STEPS, limit * MORE_BLOCKS if registers else enough, limit)
        self.grid = tir.min(tir.min(needed, enough), limit)

    @contextmanager
    def launch(self) -> Iterator[tuple[Any, Any]]:
        """The launch; yields the numbers of the block and of the thread in it."""
        with T.launch_thread("blockIdx.x", self.grid) as block:
            with T.launch_thread("threadIdx.x", self.warps * WARP) as thread:
                if self._resident:
                    with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", self._resident):
                        yield block, thread
                else:
                    yield block, thread

    def start(
        self,
        block: Expr,
        thread: Expr,
        group: Expr,
        load: Callable[[int, Expr], None],
        prepare: Callable[[], None],
    ) -> None:
        """Emit the reads of the first step, and ``prepare``, which reads what does not change from launch to launch.

        ``load(k, row)`` emits the read of the lane's k-th row, an int64 number; a row that does not exist is replaced
        by the last. The lane's vector is the ``group``-th of those side by side in the warp.
        """
        let_next_start(self.early)
        per_warp = self.groups * self.rows
        self._load, self._group = load, group
        self._count = scalar(self.total.astype("int32"))
        self._step = scalar((self.grid * (self.warps * per_warp)).astype("int32"))
        self._row = Registers(1, "int32")
        """The lane's first row in this step."""
        self._row[0] = (block * self.warps + thread // WARP).astype("int32") * per_warp + group
        if self.early:
            prepare()
            wait_for_inputs()
        self._read(self._row[0])
        if not self.early:
            prepare()

    def _read(self, row: Expr) -> None:
        for k in range(self.rows):
            self._load(k, tir.min(row + k * self.groups, self._count - 1).astype("int64"))

    def run(self, work: Callable[[], None]) -> None:
        """Emit the loop; ``work`` uses what was read, and calls ``read_next`` and ``each_row`` in that order."""
        with T.While(self._row[0] - self._group < self._count):
            work()
            self._row[0] = self._row[0] + self._step

    def read_next(self) -> None:
        """Emit the reads of the next step; called when this one's are in other registers."""
        row = scalar(self._row[0] + self._step)
        with T.If(row - self._group < self._count), T.Then():
            self._read(row)

    def encode(self, core: Any, vectors: Sequence[Any]) -> list[Any]:
        """Emit ``core.encode(vectors)`` and the reads of the next step, in the order that was chosen."""
        if self.late:
            return core.encode(vectors, self.read_next)
        self.read_next()
        return core.encode(vectors)

    def each_row(self, emit: Callable[[int, Expr], None]) -> None:
        """Have ``emit(k, row)`` emit something for each of the lane's rows, under the condition that it exists."""
        for k in range(self.rows):
            row = self._row[0] + k * self.groups
            with T.If(row < self._count), T.Then():
                emit(k, row.astype("int64"))
