"""How a tensor of new tokens lies in memory: which of its axes are batch, sequence, heads and head dimension."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.normalize.size_arithmetic import Size
from rotquant_tvm.frontend.normalize.step_view import dims

CANONICAL = (0, 2, 1, 3)
"""Batch, heads, sequence, head dimension, as places in [batch, seq, heads, head_dim]."""


@dataclass(frozen=True)
class TokenLayout:
    """A tensor's elements, in row-major order, are those of [batch, seq, heads, head_dim] with axes in ``order``.

    ``part``: first take the index ``part[1]`` of the axis ``part[0]`` (keys and values packed in one tensor).
    """

    order: tuple[int, ...]
    part: tuple[int, int] | None = None

    def canonical(
        self, builder: relax.BlockBuilder, tokens: relax.Expr, sizes: tuple[Size, Size, Size, Size]
    ) -> relax.Expr:
        """Emit the tokens as [batch, heads, seq, head_dim]; ``sizes`` are batch, seq, heads, head_dim."""
        if self.part is not None:
            axis, index = self.part
            tokens = builder.emit(R.take(tokens, relax.const(index, "int64"), axis=axis, mode="clip"))
        shape = [sizes[axis] for axis in self.order]
        if [str(size) for size in dims(tokens) or []] != [str(size) for size in shape]:
            tokens = builder.emit(R.reshape(tokens, shape))
        axes = [self.order.index(axis) for axis in CANONICAL]
        return tokens if axes == [0, 1, 2, 3] else builder.emit(R.permute_dims(tokens, axes))


def possible_layouts(tokens: np.ndarray, wanted: np.ndarray) -> list[TokenLayout]:
    """The layouts in which ``tokens`` holds ``wanted`` [batch, seq, heads, head_dim]; none if it holds something else.

    Both are arrays of tags, each of which occurs once; more than one layout fits where sizes are 1.
    """
    found = []
    parts: list[tuple[int, int] | None] = [None]
    parts += [(axis, index) for axis in range(tokens.ndim) for index in range(tokens.shape[axis])]
    for part in parts:
        held = tokens if part is None else np.take(tokens, part[1], part[0])
        if held.size != wanted.size:
            continue
        for order in permutations(range(4)):
            if np.array_equal(held.reshape(-1), np.transpose(wanted, order).reshape(-1)):
                found.append(TokenLayout(order, part))
    return found
