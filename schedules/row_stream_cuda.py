"""Rows of 16-bit keys and values on their way to the tensor cores, on CUDA: copied ahead into shared memory.

The rows of a sequence and kv head are numbered through: those that a cache policy keeps in 16 bits (sinks, then the
ring), then the chunk's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.cache_policy import CachePolicy

from .cuda_ops import block_sync, ptx, u32
from .prefill_tiling_cuda import PrefillTiling

Expr = Any


def copy_ahead(shared: Any, at: Expr, source: Any, index: Sequence[Expr], stored: Expr | None = None) -> None:
    """Start copying 16 bytes to element ``at`` of shared memory; zeros where not ``stored``."""
    size = () if stored is None else (tir.Select(stored, u32(16), u32(0)),)
    ptx("cp.async.cg.shared.global.L2::128B", shared.ptr_to([at]), source.ptr_to(list(index)), 16, *size)


def commit_copies() -> None:
    """Close a group of copies."""
    ptx("cp.async.commit_group")


def wait_for_copies(pending: int) -> None:
    """Wait for this thread's copies but those of the last ``pending`` groups, then for the block's threads."""
    ptx("cp.async.wait_group", pending)
    block_sync()


@dataclass(frozen=True)
class KeptRows:
    """The 16-bit rows of a cache: ``count`` of them, the first ``held`` being sinks; ``packed`` tokens lie between."""

    plain: Any
    policy: CachePolicy
    count: Expr
    held: Expr
    packed: Expr

    def slot(self, row: Expr) -> Expr:
        """Where a row stands in the 16-bit array."""
        sinks, ring = self.policy.sinks, self.policy.ring
        if not ring:
            return row
        behind = (row - sinks + self.packed) % ring + sinks
        return tir.Select(row < sinks, row, behind) if sinks else behind


@dataclass(frozen=True)
class RowStream:
    """Rows ``begin`` … ``stop`` - 1 of a sequence and head in stages; a stage is copied in two halves, keys first.

    Each half is asked for when the one that stood in its place has been used by all warps: ``keys_ready`` and
    ``values_ready`` wait for a half of stage ``number`` and start the copies of a later one.
    """

    tiling: PrefillTiling
    shared: Any
    thread: Expr
    chunk: tuple[Any, Any]
    where: tuple[Expr, Expr]
    kept: KeptRows | None
    begin: Expr
    stop: Expr

    @property
    def first(self) -> int:
        """The element of shared memory where the stages begin."""
        return self.tiling.rows * self.tiling.pitch

    @property
    def count(self) -> Expr:
        """How many stages there are."""
        return tir.max(self.stop - self.begin + (self.tiling.tokens - 1), 0) // self.tiling.tokens

    def offset(self, number: Expr) -> Expr:
        """From the first stage's place to that of stage ``number``."""
        stages = self.tiling.stages
        return 0 if stages == 1 else number % stages * (2 * self.tiling.role_size)

    def start(self) -> None:
        """Begin; the whole block has left what is in the stages' place."""
        for stage in range(self.tiling.stages):
            for role in range(2 if stage + 1 < self.tiling.stages else 1):
                self._copy(role, tir.const(stage, "int32"))

    def keys_ready(self, number: Expr) -> None:
        """Wait for the keys of a stage."""
        wait_for_copies(2 * self.tiling.stages - 2)
        self._copy(1, number + (self.tiling.stages - 1))

    def values_ready(self, number: Expr) -> None:
        """Wait for the values of a stage."""
        wait_for_copies(2 * self.tiling.stages - 2)
        self._copy(0, number + self.tiling.stages)

    def _copy(self, role: int, number: Expr) -> None:
        tiling = self.tiling
        units = tiling.head_dim // 8
        at = self.first + role * tiling.role_size + self.offset(number)
        first = self.begin + number * tiling.tokens
        with T.If(first < self.stop), T.Then():
            for step in range(-(-tiling.tokens * units // tiling.threads)):
                unit = self.thread + step * tiling.threads
                row, part = unit // units, unit % units
                if (step + 1) * tiling.threads <= tiling.tokens * units:
                    self._copy_unit(role, at + row * tiling.pitch + part * 8, first + row, part * 8)
                else:
                    with T.If(row < tiling.tokens), T.Then():
                        self._copy_unit(role, at + row * tiling.pitch + part * 8, first + row, part * 8)
        commit_copies()

    def _copy_unit(self, role: int, at: Expr, row: Expr, dim: Expr) -> None:
        if self.kept is None:
            copy_ahead(self.shared, at, self.chunk[role], [*self.where, row, dim], row < self.stop)
            return
        with T.If(row < self.kept.count):
            with T.Then():
                index = [*self.where, role, self.kept.slot(row), dim]
                copy_ahead(self.shared, at, self.kept.plain, index)
            with T.Else():
                index = [*self.where, row - self.kept.count, dim]
                copy_ahead(self.shared, at, self.chunk[role], index, row < self.stop)
