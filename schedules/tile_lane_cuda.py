"""Which elements of a tile a lane of a warp holds, on CUDA, and sums over the lanes that hold the same tokens'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir

from .cuda_ops import scalar, shuffle_xor

Expr = Any


@dataclass(frozen=True)
class Lane:
    """The order of a role's codes and gains in a tile, for a lane (g, t) = (lane / 4, lane % 4) of a warp.

    A tile has two halves of 16 tokens. Of half number s and 16 dims a lane holds eight elements, named as those of two
    accumulators of the tensor cores: ``block`` a, ``row`` r (g or g + 8 there) and ``column`` u (2t or 2t + 1 there):

        K: token 16s + 8r + g           dim 4t + 2a + u
        V: token 16s + 8a + 2t + u      dim 8r + g

    The two ``a`` and ``u`` are a group's four elements, ``r`` is its half. A *slot* is one of the lane's tokens of a
    half: r, or 2a + u.
    """

    role: str
    head_dim: int
    lane: Expr

    @property
    def blocks(self) -> int:
        """Blocks of 16 dims, and groups of eight codes to a half tile."""
        return self.head_dim // 16

    @property
    def slots(self) -> int:
        """How many of a half tile's tokens the lane shares."""
        return 2 if self.role == "k" else 4

    @property
    def sharers(self) -> tuple[int, ...]:
        """The lane masks between lanes that share tokens."""
        return (1, 2) if self.role == "k" else (4, 8, 16)

    def slot(self, a: int, r: int, u: int) -> int:
        """The slot of an element."""
        return r if self.role == "k" else 2 * a + u

    def own(self, values: Sequence[Expr]) -> Expr:
        """Of a value for each slot, that of the slot that is the lane's own: the sharers have one each (or two one)."""
        values = list(values)
        for mask in self.splits:
            odd, half = self.lane // mask % 2 == 1, len(values) // 2
            values = [tir.Select(odd, *pair) for pair in zip(values[half:], values[:half], strict=True)]
        return scalar(values[0])

    def own_sums(self, sums: Sequence[Sequence[Expr]]) -> list[Expr]:
        """The sums over the sharers for the lane's own slot; ``sums`` have a value for each slot."""
        kept = [list(values) for values in sums]
        for mask in self.sharers[::-1]:
            odd = self.lane // mask % 2 == 1
            if mask not in self.splits:
                kept = [[scalar(value + shuffle_xor(value, mask)) for value in values] for values in kept]
                continue
            for index, values in enumerate(kept):
                low, high = values[: len(values) // 2], values[len(values) // 2 :]
                sent = [shuffle_xor(scalar(tir.Select(odd, *pair)), mask) for pair in zip(low, high, strict=True)]
                mine = [tir.Select(odd, *pair) for pair in zip(high, low, strict=True)]
                kept[index] = [scalar(a + b) for a, b in zip(mine, sent, strict=True)]
        return [values[0] for values in kept]

    @property
    def splits(self) -> tuple[int, ...]:
        """The lane masks whose bits spell a lane's own slot, the top one first."""
        return (2,) if self.role == "k" else (16, 8)

    def token(self, slot: int) -> Expr:
        """A slot's token in its half tile."""
        g, t = self.lane // 4, self.lane % 4
        return g + 8 * slot if self.role == "k" else t * 2 + (slot // 2 * 8 + slot % 2)

    def dim(self, a: int, r: int, u: int) -> Expr:
        """An element's dim among its 16."""
        g, t = self.lane // 4, self.lane % 4
        return t * 4 + (2 * a + u) if self.role == "k" else g + 8 * r

    def place(self, number: int) -> tuple[int, int]:
        """(block of 16 dims, r) of half-group number 2·group + half of a half tile."""
        return (number % self.blocks, number // self.blocks) if self.role == "k" else divmod(number, 2)

    def in_order(self, first: Sequence[Expr], second: Sequence[Expr], each: int) -> list[Expr]:
        """All groups of a tile from those of its two halves, ``each`` words to a group."""
        if self.role == "k":
            return [*first, *second]
        starts = range(0, len(first), each)
        return [word for at in starts for half in (first, second) for word in half[at : at + each]]
