"""How the loops of one operator definition land on a target.

Every operator here is defined once, in terms of *blocks* (independent pieces of work) and *lanes* (elements worked on
side by side inside a block). On llvm, blocks are parallel loops and lanes are plain loops; on CUDA, blocks are thread
blocks and lanes are threads, and scratch is shared memory (the compiler places the barriers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.tirx.script.builder import ir as T

from ..errors import UsageError


@dataclass(frozen=True)
class Axes:
    """Loop emission for one target kind (``"llvm"`` or ``"cuda"``) with ``threads`` lanes per CUDA block."""

    kind: str
    threads: int = 128

    def __post_init__(self) -> None:
        if self.kind not in ("llvm", "cuda"):
            raise UsageError(f"unsupported target kind '{self.kind}'; use llvm or cuda")

    @staticmethod
    def of(target: tvm.target.Target | str, threads: int = 128) -> Axes:
        """Axes for a TVM target, its kind's name or a target string."""
        kind = target.kind.name if isinstance(target, tvm.target.Target) else str(target).split()[0]
        return Axes(kind, threads)

    @property
    def scratch(self) -> str:
        """Storage scope of buffers that the lanes of one block share."""
        return "shared" if self.kind == "cuda" else "local"

    @contextmanager
    def blocks(self, extent: Any) -> Iterator[Any]:
        """Independent pieces of work; yields the piece's index."""
        if self.kind == "cuda":
            with T.thread_binding(0, extent, "blockIdx.x") as index:
                yield index
        else:
            with T.parallel(0, extent) as index:
                yield index

    @contextmanager
    def lanes(self, extent: int) -> Iterator[Any]:
        """Elements ``0 … extent-1`` handled side by side; the next ``lanes`` loop sees all of their writes."""
        if self.kind == "llvm":
            with T.serial(0, extent) as index:
                yield index
            return
        rounds = -(-extent // self.threads)
        with T.serial(0, rounds) as outer:
            with T.thread_binding(0, self.threads, "threadIdx.x") as thread:
                if rounds * self.threads == extent:
                    yield outer * self.threads + thread
                else:
                    with T.If(outer * self.threads + thread < extent), T.Then():
                        yield outer * self.threads + thread

    def private(self, extent: int, count: int) -> Any:
        """Float32 state that each of ``extent`` lanes keeps for itself: ``count`` values, at ``place(lane, k, count)``.

        Only loops over the same number of lanes see the same state; it needs no barriers.
        """
        owned = -(-extent // self.threads) if self.kind == "cuda" else extent
        return T.sblock_alloc_buffer((owned * count,), "float32", scope="local")

    def place(self, lane: Any, k: int, count: int) -> Any:
        """Where value ``k`` of a lane stands in a ``private`` buffer."""
        return (lane // self.threads if self.kind == "cuda" else lane) * count + k
