"""What one benchmark measures: the operation, the cases, and how."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rotquant_tvm.errors import UsageError

OPERATIONS = ("roundtrip", "append", "decode", "prefill", "e2e")
PAPER_VECTORS, LARGE_VECTORS = 8192, 1 << 20
"""IsoQuant's benchmark has 8,192 vectors of every kind; a million fill the memory system."""

Progress = Callable[[str], None]
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class BatchShape:
    """Sequences × tokens of each."""

    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> BatchShape:
        """Read ``8x32K``; raises ``UsageError``."""
        match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)([KM]?)", text.strip(), re.IGNORECASE)
        if match is None or not int(match[1]) or not int(match[2]):
            raise UsageError(f"cannot read the shape '{text}'; write sequences x tokens, like 8x32K")
        return cls(int(match[1]), int(match[2]) * _UNITS[match[3].upper()])

    @property
    def name(self) -> str:
        """The shortest spelling, ``8x32K``."""
        return f"{self.batch}x{count(self.tokens)}"


def count(number: int) -> str:
    """Spell a count: ``32K`` and ``1M`` for multiples of 1,024 and 1,048,576."""
    for unit in ("M", "K"):
        if number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def _shapes(*texts: str) -> tuple[BatchShape, ...]:
    return tuple(BatchShape.parse(text) for text in texts)


SHAPES: dict[tuple[str, str], tuple[BatchShape, ...]] = {
    ("append", "cuda"): _shapes("1x1", "1x4K", "1x64K"),
    ("append", "llvm"): _shapes("1x1", "1x512"),
    ("decode", "cuda"): _shapes("1x8K", "1x32K", "1x128K", "8x32K", "32x8K", "64x2K"),
    ("decode", "llvm"): _shapes("1x1K", "1x4K"),
    ("prefill", "cuda"): _shapes("1x4K", "1x32K"),
    ("prefill", "llvm"): _shapes("1x512"),
    ("e2e", "cuda"): _shapes("1x1K", "1x32K"),
    ("e2e", "llvm"): _shapes("1x512"),
}
"""By operation and target kind. Appending 4K tokens of 8 kv heads is 65,536 vectors, K and V together."""

KV_CACHES = {
    "append": ("hurwitz3",),
    "decode": ("hurwitz2", "hurwitz3", "hurwitz4", "rq3", "hurwitz3+tcq"),
    "prefill": ("hurwitz3",),
    "e2e": ("hurwitz3",),
}
"""By operation; 16-bit caches are raced where the operation has them for its baseline."""


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    target      what ``resolve_target`` reads. kv_caches  configurations as ``KVCacheConfig.parse`` reads them.
    dtype       of queries, keys, values and outputs (of vectors, in a round trip: ``dtypes``).
    vectors, head_dims, bits, rotations, dtypes  the cases of a round trip; with neither vectors nor head_dims given,
                8,192 vectors of head_dim 128, 256 and 512, and 1,048,576 of 128.
    peers       a folder with the user's own checkouts of other projects, whose kernels are built and raced.
    warm        round trips and decode attention over the same buffers again and again: the device's cache keeps them.
    samples     how many timings the medians are of. progress  is told what is being measured.

    Raises ``UsageError`` for heads that do not divide.
    """

    operation: str
    target: str = "cuda"
    kv_caches: tuple[str, ...] = ()
    shapes: tuple[BatchShape, ...] = ()
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "float16"
    vectors: tuple[int, ...] = ()
    head_dims: tuple[int, ...] = ()
    bits: tuple[int, ...] = (2, 3, 4)
    rotations: tuple[str, ...] = ("iso-full", "iso")
    dtypes: tuple[str, ...] = ("float16", "float32")
    peers: Path | None = None
    warm: bool = False
    samples: int = 20
    progress: Progress = field(default=lambda _: None, compare=False)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(f"--heads {self.heads} is no multiple of --kv-heads {self.kv_heads}; queries go in groups")

    def vector_cases(self) -> list[tuple[int, int]]:
        """The (vectors, head_dim) of a round trip."""
        if self.vectors or self.head_dims:
            return [(n, d) for n in self.vectors or (PAPER_VECTORS,) for d in self.head_dims or (128, 256, 512)]
        return [*((PAPER_VECTORS, d) for d in (128, 256, 512)), (LARGE_VECTORS, 128)]
