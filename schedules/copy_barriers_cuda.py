"""Barriers in shared memory between the threads that fill buffers and those that empty them, on CUDA (sm_90)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.backend.cuda import op as cuda
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, block_sync, i32, ptx, u32, warp_sync

Expr = Any


def wait_at(barriers: Any, index: Expr, phase: Expr) -> None:
    """Wait until the phase of a number (its lowest bit) is over."""
    T.evaluate(cuda.cuda_mbarrier_wait(barriers.ptr_to([index]), phase % 2))


def arrive_at(barriers: Any, index: Expr) -> None:
    """Count one arrival."""
    ptx("mbarrier.arrive.shared::cta.b64", barriers.ptr_to([index]))


def sync_threads(name: int, threads: int) -> None:
    """Wait for so many threads, whole warps; ``name``: 1 … 15."""
    ptx("bar.sync", u32(name), u32(threads))


@dataclass(frozen=True)
class BufferRing:
    """``stages`` pairs of buffers, keys and values, that fillers and readers pass to and fro.

    Barriers from ``first`` on: a buffer's "full", then its "empty", for each of 2·``stages`` buffers.
    """

    barriers: Any
    stages: int
    fillers: int
    readers: int

    def start(self, thread: Expr, extra: int = 0) -> None:
        """Set up, by the whole block; ``extra`` barriers behind the ring's are for the fillers to arrive at once."""
        with T.If(thread == 0), T.Then():
            for buffer in range(2 * self.stages):
                ptx("mbarrier.init.shared.b64", self.barriers.ptr_to([2 * buffer]), u32(self.fillers))
                ptx("mbarrier.init.shared.b64", self.barriers.ptr_to([2 * buffer + 1]), u32(self.readers))
            for number in range(extra):
                ptx("mbarrier.init.shared.b64", self.barriers.ptr_to([4 * self.stages + number]), u32(self.fillers))
            ptx("fence.mbarrier_init.release.cluster")
        block_sync()

    def buffer(self, number: Expr, role: int) -> Expr:
        """Which buffer stage ``number`` has its keys (0) or values (1) in."""
        return number % self.stages * 2 + role

    def wait_full(self, number: Expr, role: int) -> None:
        """Wait for a stage's keys or values."""
        wait_at(self.barriers, self.buffer(number, role) * 2, number // self.stages)

    def wait_empty(self, number: Expr, role: int) -> None:
        """Wait until the readers have left the buffer to this stage."""
        wait_at(self.barriers, self.buffer(number, role) * 2 + 1, number // self.stages + 1)

    def filled(self, number: Expr, role: int) -> None:
        """This thread has filled its part; products read past the caches' usual order, hence the fence."""
        ptx("fence.proxy.async.shared::cta")
        arrive_at(self.barriers, self.buffer(number, role) * 2)

    def emptied(self, number: Expr, role: int, lane: Expr) -> None:
        """This warp has read it."""
        warp_sync()
        with T.If(lane == 0), T.Then():
            arrive_at(self.barriers, self.buffer(number, role) * 2 + 1)


assert WARP and i32 and tir  # (placeholders while the module is being written)
