"""The frame of kernels that map vectors to something, on CUDA: a warp goes over the rows in steps of the whole grid.

While a step is computed, the rows of the next one are being read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, scalar

Expr = Any

class RowLoop:
    """The rows of one warp: in a step, each lane works on ``rows`` vectors and the warp on ``groups`` times as many."""

    def __init__(self, total: Expr, *, groups: int, rows: int, warps: int, blocks: int) -> None:
        """``total``: how many rows there are (int64); ``blocks``: how many thread blocks of ``warps`` at most."""
        self.total, self.groups, self.rows, self.warps = total, groups, rows, warps
        per_block = groups * rows * warps
        self.grid = tir.min((total + (per_block - 1)) // per_block, tir.const(blocks, "int64"))

    def start(self, block: Expr, thread: Expr, group: Expr, load: Callable[[int, Expr], None]) -> None:
        """Emit the reads of the first step; ``load(k, row)`` emits that of the lane's k-th row, an int64 number.

        The lane's vector is the ``group``-th of those side by side in the warp. A row that does not exist is replaced
        by the last.
        """
        per_warp = self.groups * self.rows
        self._load, self._group = load, group
        self._count = scalar(self.total.astype("int32"))
        self._step = scalar((self.grid * (self.warps * per_warp)).astype("int32"))
        self._row = Registers(1, "int32")
        """The lane's first row in this step."""
        self._row[0] = (block * self.warps + thread // WARP).astype("int32") * per_warp + group
        self._read(self._row[0])

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

    def each_row(self, emit: Callable[[int, Expr], None]) -> None:
        """Have ``emit(k, row)`` emit something for each of the lane's rows, under the condition that it exists."""
        for k in range(self.rows):
            row = self._row[0] + k * self.groups
            with T.If(row < self._count), T.Then():
                emit(k, row.astype("int64"))
