"""Soft-capping of attention scores: s becomes cap · tanh(s / cap), which stays within ± cap.

Gemma 2 (Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024, section 2). The softmax here
is in base 2, so scores come and go times log2(e).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir

Expr = Any
LOG2E = 1.4426950408889634


def soft_cap(score: Expr, cap: float, exp2: Callable[[Expr], Expr], constant: Callable[[float], Expr]) -> Expr:
    """Cap a score (or vector of scores) given times log2(e); the result is times log2(e), too.

    ``exp2`` is only given what is at most 0; ``constant`` makes a number that goes with ``score``. From the exponential
    alone, since a GPU's fast tanh is good to three digits; the absolute error is some 1e-7 times ``cap``.
    """
    small = exp2(tir.abs(score) * constant(-2 / cap))
    size = constant(cap * LOG2E) * (constant(1.0) - small) / (constant(1.0) + small)
    return tir.Select(score < constant(0.0), constant(0.0) - size, size)
