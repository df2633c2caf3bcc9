"""Rotary embedding on CUDA: x · cos + (−x₂, x₁) · sin for the two halves (x₁, x₂) of every head, of several tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, half2, i32, load_words, pack_half2, scalar, store_words
from .dependent_launch_cuda import let_next_start, starts_early, wait_for_inputs

Expr = Any
VALUES = 8
"""Values of one access of 16 bytes."""
THREADS = 128


@dataclass(frozen=True)
class RotaryShape:
    """Tensors of one launch, all float16: heads of each, and whether its result has the heads before the tokens."""

    heads: tuple[int, ...]
    heads_first: tuple[bool, ...]
    head_dim: int

    @property
    def fits(self) -> bool:
        """Whether there is a kernel: a half of a head must be whole accesses."""
        return self.head_dim % (2 * VALUES) == 0


@functools.cache
def rotary(shape: RotaryShape, target: Target) -> tir.PrimFunc:
    """Build ``rotary(*xs, cos, sin, *results)``: x [batch, seq, heads, d], cos and sin [batch, 1, seq, d], float16.

    A result is [batch, seq, heads, d] or, with the heads first, [batch, heads, seq, d].
    """
    d = shape.head_dim
    with IRBuilder() as builder, T.prim_func(s_tir=False, is_private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch, seq = tir.Var("batch", "int64"), tir.Var("seq", "int64")
        xs = [T.arg(f"x{i}", T.buffer((batch, seq, heads, d), "float16")) for i, heads in enumerate(shape.heads)]
        angles = [T.arg(name, T.buffer((batch, 1, seq, d), "float16")) for name in ("cos", "sin")]
        results = []
        for i, (heads, first) in enumerate(zip(shape.heads, shape.heads_first, strict=True)):
            size = (batch, heads, seq, d) if first else (batch, seq, heads, d)
            results.append(T.arg(f"y{i}", T.buffer(size, "float16")))
        items = sum(shape.heads) * d // (2 * VALUES)
        blocks = -(-items // THREADS)
        with T.launch_thread("blockIdx.x", batch * seq * blocks) as block:
            with T.launch_thread("threadIdx.x", THREADS) as thread:
                let_next_start(starts_early(target))
                wait_for_inputs(starts_early(target))
                row = scalar(block // blocks)
                place = (scalar(row // seq), scalar(row % seq))
                item = scalar(i32(block % blocks) * THREADS + i32(thread))
                with T.If(item < items), T.Then():
                    _item(shape, (xs, angles, results), place, item)
    return builder.get()


def _item(shape: RotaryShape, buffers: tuple[list, list, list], place: tuple[Expr, Expr], item: Expr) -> None:
    """Eight values of the lower half of a head and the eight that stand beside them in the upper half."""
    xs, angles, results = buffers
    parts = shape.head_dim // (2 * VALUES)
    head, at = scalar(item // parts), scalar(item % parts * VALUES)
    batch, token = place
    factors = []
    for angle in angles:
        words = Registers(8)
        for half in range(2):
            start = at + half * (shape.head_dim // 2)
            load_words(words, 4 * half, angle, (batch, 0, token, start), 4, "global")
        factors.append(words)
    first = 0
    for x, y, heads, heads_first in zip(xs, results, shape.heads, shape.heads_first, strict=True):
        with T.If((head >= first) & (head < first + heads)), T.Then():
            own = scalar(head - first)
            target = (batch, own, token) if heads_first else (batch, token, own)
            _rotate(x, (batch, token, own), (y, target), (at, shape.head_dim // 2), factors)
        first += heads


def _rotate(x: Any, source: tuple, result: tuple, columns: tuple[Expr, int], factors: list[Registers]) -> None:
    (y, target), (at, half), (cos, sin) = result, columns, factors
    words = Registers(8)
    for part in range(2):
        load_words(words, 4 * part, x, (*source, at + part * half), 4, "global")
    low, high = [], []
    for k in range(4):
        x1, x2, c1, c2, s1, s2 = (half2(each[k + place]) for each in (words, cos, sin) for place in (0, 4))
        low.append(pack_half2(*(x1[n] * c1[n] - x2[n] * s1[n] for n in range(2))))
        high.append(pack_half2(*(x2[n] * c2[n] + x1[n] * s2[n] for n in range(2))))
    store_words(y, (*target, at), low)
    store_words(y, (*target, at + half), high)
