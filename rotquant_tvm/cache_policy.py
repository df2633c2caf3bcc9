"""The cache policy: which tokens stay in 16 bits, and whether keys are centred before they are quantized.

A sequence's tokens lie in three segments. The first ``sinks`` stay in 16 bits for good. Newer ones enter a 16-bit ring;
when it is full the oldest ``block`` of them are *flushed*: quantized into packed tiles. Attention merges the segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .near_words import did_you_mean, near_words

TILE_TOKENS = 32
"""Tokens of a packed tile."""

IntArray = NDArray[np.int32]
OPTIONS = ("sinks", "recent", "center", "defer")
MOST_TOKENS = 2**31 - 1
"""What a capacity or an option may be at most: lengths are int32."""
_DIGITS = len(str(MOST_TOKENS))


@dataclass(frozen=True)
class CachePolicy:
    """Numbers of tokens, all 0 by default: then every token is quantized as it comes.

    sinks   first tokens of a sequence that stay in 16 bits (attention sinks). recent  at least so many of the newest
    tokens are in 16 bits (after a crop into tiles, those that come from then on). center  K is centred: blocks of so
    many tokens (a multiple of 32) are flushed together, less their mean key, which
            is stored beside them. Attention adds ⟨q, mean⟩ to the block's scores: exact and causal.
    defer   further 16-bit slots, which prefill fills before it quantizes anything; the first decode step drains them.

    Raises ``UsageError`` for numbers that make no sense.
    """

    sinks: int = 0
    recent: int = 0
    center: int = 0
    defer: int = 0

    def __post_init__(self) -> None:
        for name in OPTIONS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(f"{name} is {value!r}; it must be a number of tokens, 0 or more")
            if value > MOST_TOKENS:
                raise UsageError(f"{name} is beyond {MOST_TOKENS}, the longest sequence that there can be; give less")
        if self.center % TILE_TOKENS:
            raise UsageError(f"center is {self.center}; K is centred by blocks of a multiple of {TILE_TOKENS} tokens")
        if self.slots > MOST_TOKENS:
            raise UsageError(
                f"the cache options '{self.name}' keep {self.slots} tokens of a sequence in 16 bits, beyond "
                f"{MOST_TOKENS}, the longest sequence that there can be; give less"
            )

    @classmethod
    def parse(cls, text: str) -> CachePolicy:
        """Read ``"sinks=4,center=64"``; raises ``UsageError``."""
        return cls().changed(read_options(text))

    @property
    def segmented(self) -> bool:
        """Whether any token stays in 16 bits for a while."""
        return self != CachePolicy()

    @property
    def block(self) -> int:
        """Tokens that are flushed together: 1 where there is no ring."""
        return self.center or (TILE_TOKENS if self.recent or self.defer else 1)

    @property
    def ring(self) -> int:
        """Slots of the 16-bit ring."""
        return self.recent + self.block + self.defer if self.block > 1 else 0

    @property
    def slots(self) -> int:
        """Rows of the 16-bit array: the sinks, then the ring."""
        return max(1, self.sinks + self.ring)

    def packed_tiles(self, capacity: int) -> int:
        """Return how many tiles a sequence of ``capacity`` tokens needs, at least one block."""
        longest = capacity - self.sinks - self.recent
        if self.block == 1:
            return max(1, -(-longest // TILE_TOKENS))
        return max(1, longest // self.block) * self.block // TILE_TOKENS

    def packed_after(self, packed: IntArray, lengths: IntArray, chunk: bool) -> IntArray:
        """Return how many tokens behind the sinks are in tiles after a call, int32 [batch].

        ``packed``: how many were; ``lengths``: with the call's tokens; ``chunk``: it was a prefill. Whole blocks leave
        the ring, as many as keep ``recent`` tokens there; with ``defer`` a prefill only moves out what has no slot.
        """
        if not self.segmented:
            return lengths
        if chunk and self.defer:
            surplus = np.maximum(lengths - self.sinks - self.ring, 0)
            wanted = (surplus + self.block - 1) // self.block * self.block
        else:
            wanted = np.maximum(lengths - self.sinks - self.recent, 0) // self.block * self.block
        after: IntArray = np.maximum(packed, wanted).astype(np.int32)
        return after

    def changed(self, options: Mapping[str, int]) -> CachePolicy:
        """Return the policy with some options replaced; raises ``UsageError`` for an unknown one."""
        for name in options:
            if name not in OPTIONS:
                near = did_you_mean(near_words(name, OPTIONS))
                raise UsageError(f"unknown cache option '{name}'{near}; known: {', '.join(OPTIONS)}")
        return replace(self, **options)

    @property
    def name(self) -> str:
        """The options that are not 0, as ``parse`` reads them."""
        return ",".join(f"{name}={value}" for name, value in asdict(self).items() if value)


NO_POLICY = CachePolicy()
"""Every token is quantized as it comes."""


def read_options(text: str) -> dict[str, int]:
    """Read ``"name=number,name=number"``; raises ``UsageError``."""
    options = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        name, sign, value = part.partition("=")
        if not sign or not (value.strip().isascii() and value.strip().isdecimal()):
            raise UsageError(f"cannot read the cache option '{part}'; write it like sinks=4")
        if name.strip() in options:
            raise UsageError(f"the cache option '{name.strip()}' is given twice")
        digits = value.strip().lstrip("0") or "0"
        options[name.strip()] = int(digits) if len(digits) <= _DIGITS else MOST_TOKENS + 1
    return options
