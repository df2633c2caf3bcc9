"""Rows of 16-bit keys and values on their way to the tensor cores, on CUDA: copied ahead into shared memory.

They are those that a cache policy keeps in 16 bits (sinks, then the ring, numbered through) or the chunk's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
class ChunkRows:
    """The chunk's own rows of a sequence and head, ``where``, up to ``stop`` - 1."""

    chunk: tuple[Any, Any]
    where: tuple[Expr, Expr]
    stop: Expr

    def copy(self, shared: Any, at: Expr, role: int, row: Expr, dim: Expr) -> None:
        """Start copying dims ``dim`` … + 7 of a row of K or V to element ``at`` of shared memory.

        Rows from ``stop`` on read as 0.
        """
        copy_ahead(shared, at, self.chunk[role], [*self.where, row, dim], row < self.stop)


@dataclass(frozen=True)
class KeptRows:
    """The rows of a sequence and head that a policy keeps in 16 bits.

    There are ``stop`` of them, the first ``held`` being sinks; ``packed`` tokens lie between these and the rest.
    """

    plain: Any
    where: tuple[Expr, Expr]
    policy: CachePolicy
    stop: Expr
    held: Expr
    packed: Expr

    def slot(self, row: Expr) -> Expr:
        """Where a row stands in the 16-bit array."""
        sinks, ring = self.policy.sinks, self.policy.ring
        if not ring:
            return row
        behind = (row - sinks + self.packed) % ring + sinks
        return tir.Select(row < sinks, row, behind) if sinks else behind

    def copy(self, shared: Any, at: Expr, role: int, row: Expr, dim: Expr) -> None:
        """See ``ChunkRows``."""
        copy_ahead(shared, at, self.plain, [*self.where, role, self.slot(row), dim], row < self.stop)


def share_out(count: int, thread: Expr, threads: int) -> Iterator[Expr]:
    """Numbers below ``count``, this thread's; what is emitted for one runs if there is one."""
    for step in range(-(-count // threads)):
        number = thread + step * threads
        if (step + 1) * threads <= count:
            yield number
        else:
            with T.If(number < count), T.Then():
                yield number


@dataclass(frozen=True)
class RowStream:
    """Rows from ``begin`` on in stages; a stage is copied in two halves, keys first.

    Each half is asked for when the one that stood in its place has been used by all warps: ``keys_ready`` and
    ``values_ready`` wait for a half of stage ``number`` and start the copies of a later one.
    """

    tiling: PrefillTiling
    shared: Any
    thread: Expr
    source: ChunkRows | KeptRows
    begin: Expr

    @property
    def count(self) -> Expr:
        """How many stages there are."""
        return tir.max(self.source.stop - self.begin + (self.tiling.tokens - 1), 0) // self.tiling.tokens

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
        at = tiling.stages_start + role * tiling.role_size + self.offset(number)
        first = self.begin + number * tiling.tokens
        with T.If(first < self.source.stop), T.Then():
            for unit in share_out(tiling.tokens * units, self.thread, tiling.threads):
                row, part = unit // units, unit % units
                self.source.copy(self.shared, at + row * tiling.pitch + part * 8, role, first + row, part * 8)
        commit_copies()
