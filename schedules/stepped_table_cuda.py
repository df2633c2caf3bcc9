"""Tables as polynomials, on CUDA: what others do by selections is done by multiply-adds, of which a GPU has more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cuda_ops import Registers, f32, ptx

Expr = Any


def fma(a: Expr, b: Expr, c: Expr, saturate: bool = False) -> Expr:
    """a·b + c, clipped to 0 … 1 if it saturates."""
    cell = Registers(1, "float32")
    ptx(f"fma.rn.ftz{'.sat' if saturate else ''}.f32", cell[0], f32(a), f32(b), f32(c))
    return cell[0]


class SteppedTable:
    """A table whose index is spelled by steps, the top one first, as a polynomial of them."""

    def __init__(self, values: Sequence[float]) -> None:
        terms = np.array(values, np.float64)
        width = 1
        while width < len(terms):  # each term less those with one step less
            pairs = terms.reshape(-1, 2, width)
            pairs[:, 1] -= pairs[:, 0]
            width *= 2
        self.terms = [float(np.float32(term)) for term in terms]

    def value(self, steps: Sequence[Expr]) -> Expr:
        """The entry, a Python number if the table has only one."""
        terms: list[Any] = list(self.terms)
        for step in steps:
            half = len(terms) // 2
            terms = [fma(step, terms[half + n], terms[n]) for n in range(half)]
        return terms[0]
