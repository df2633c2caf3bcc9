"""The arithmetic of trellis codes, emitted into a TensorIR definition: Viterbi's algorithm, and states' values.

Mathematics as in ``rotquant_tvm.formats.trellis``. On CUDA, lanes are states; on llvm, a step is laid out in vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..formats.trellis import CLOSING, FORBIDDEN, STATE_BITS, STATES, Trellis
from .axes import Axes
from .tile_access import u32

Expr = Any
Element = Callable[[Expr], Expr]
VECTOR = 16
"""Lanes of the llvm form; LLVM splits them to what the CPU has."""


def window(bits: int, head_dim: int, code: Element, dim: Expr) -> Expr:
    """The state (uint32) at ``dim``, from ``code(dim)`` and the codes before it on the ring."""
    state = code(dim)
    for back in range(1, -(-STATE_BITS // bits)):
        before = tir.Select(dim >= back, dim - back, dim + (head_dim - back))
        state = state | code(before) << u32(back * bits)
    return state & u32(STATES - 1)


def state_value(trellis: Trellis, state: Expr) -> Expr:
    """The float32 value of a state (uint32), before the gain.

    Selects between immediates: the table is antisymmetric, so 32 words of four grid values hold it. TensorIR has no
    constant arrays that both targets compile, and a table in shared memory would have to be filled by every operator.
    """
    number = T.alloc_buffer((1,), "uint32", scope="local")
    T.buffer_store(number, state, [0])
    mirrored = number[0] >= u32(STATES // 2)
    half = tir.Select(mirrored, u32(STATES - 1) - number[0], number[0])
    words = [int(word) for word in trellis.grid[: STATES // 2].view("<u4")]
    grid = (_select(half, words, STATE_BITS - 2) >> (half & u32(3)) * u32(8)).astype("uint8").astype("int8")
    value = grid.astype("float32")
    return tir.Select(mirrored, -value, value) * tir.const(float(trellis.scale), "float32")


def _select(index: Expr, words: list[int], bit: int) -> Expr:
    if len(words) == 1:
        return u32(words[0])
    half = len(words) // 2
    low = (index >> u32(bit) & u32(1)) == u32(0)
    return tir.Select(low, _select(index, words[:half], bit - 1), _select(index, words[half:], bit - 1))


class TrellisSearch:
    """Scratch and loops of the encoder; create it where its buffers should be allocated."""

    def __init__(self, axes: Axes, trellis: Trellis) -> None:
        self.axes, self.trellis = axes, trellis
        self.groups = STATES >> trellis.bits
        self.steps = max(trellis.head_dim, 2 * CLOSING)

        def alloc(size: int, dtype: str) -> Any:
            return T.sblock_alloc_buffer((size,), dtype, scope=axes.scratch)

        self.table, self.cost = alloc(STATES, "float32"), alloc(STATES, "float32")
        self.least = alloc(self.groups + (VECTOR if axes.kind == "llvm" else 0), "float32")
        self.pointers = alloc((self.steps + 1) * self.groups, "uint8")
        self.states = alloc(trellis.head_dim, "uint8")
        self.boundary = alloc(1, "int32")

    def run(self, y: Any, norm: Any, slope: Any) -> tuple[Element, Element]:
        """Encode the rotated vector ``y`` [head_dim] of norm ``norm[0]``; ``slope`` [head_dim] is scratch.

        Returns a dimension's code (uint32) and that code's value, as expressions.
        """
        head_dim = self.trellis.head_dim
        zero = tir.const(0, "float32")
        with self.axes.lanes(head_dim) as dim:
            radius = tir.Select(norm[0] > zero, norm[0], tir.const(1, "float32"))
            T.buffer_store(slope, tir.const(-2, "float32") * y[dim] / radius, [dim])
        with self.axes.lanes(STATES) as state:
            T.buffer_store(self.table, state_value(self.trellis, state.astype("uint32")), [state])
        with self.axes.lanes(1) as _:
            T.buffer_store(self.boundary, tir.const(0, "int32"), [0])
        with T.serial(0, 2) as number:
            around = number == 0
            steps = tir.Select(around, tir.const(2 * CLOSING, "int32"), tir.const(head_dim, "int32"))
            first = tir.Select(around, tir.const(-CLOSING % head_dim, "int32"), tir.const(0, "int32"))
            last = tir.Select(around, tir.const(CLOSING, "int32"), tir.const(0, "int32"))
            self._pass(slope, *(_register(value) for value in (steps, first, last)))

        def code(dim: Expr) -> Expr:
            found = self.states[dim].astype("uint32") & u32(2**self.trellis.bits - 1)
            return tir.Select(norm[0] > zero, found, u32(self.trellis.middle()))

        return code, lambda dim: self.table[self.states[dim].astype("int32")]

    def _pass(self, slope: Any, steps: Expr, first: Expr, last: Expr) -> None:
        """Viterbi's algorithm for ``steps`` elements from dimension ``first`` on, traced back to step ``last``.

        ``slope`` is −2u for the unit vector u. The path begins and ends in states that leave ``boundary`` behind, which
        becomes that of the state before ``last``.
        """
        head_dim, groups = self.trellis.head_dim, self.groups
        boundary = _register(self.boundary[0])
        with self.axes.lanes(STATES) as state:
            closed = state.astype("int32") % groups == boundary
            start = tir.Select(closed, tir.const(0, "float32"), tir.const(FORBIDDEN, "float32"))
            T.buffer_store(self.cost, start, [state])
        with T.serial(0, steps) as step:
            self._least(step)
            self._extend(slope[(first + step) % head_dim])
        self._least(steps)
        with self.axes.lanes(1) as _:
            group = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(group, boundary, [0])
            with T.serial(0, steps - last) as back:
                step = steps - 1 - back
                pointer = self.pointers[(step + 1) * groups + group[0]]
                state = _register(pointer.astype("int32") * groups + group[0])
                T.buffer_store(self.states, state.astype("uint8"), [(first + step) % head_dim])
                T.buffer_store(group, state >> self.trellis.bits, [0])
            T.buffer_store(self.boundary, group[0], [0])

    def _least(self, step: Expr) -> None:
        """The least cost of the states that share their low bits, and which of them has it."""
        branches, groups = STATES // self.groups, self.groups
        with self.axes.lanes(groups) as group:
            costs = [self.cost[branch * groups + group] for branch in range(branches)]
            least = costs[0]
            for cost in costs[1:]:
                least = tir.min(least, cost)
            least = _register(least)
            pointer = tir.const(branches - 1, "uint8")
            for branch in reversed(range(branches - 1)):
                pointer = tir.Select(costs[branch] == least, tir.const(branch, "uint8"), pointer)
            T.buffer_store(self.least, least, [group])
            T.buffer_store(self.pointers, pointer, [step * groups + group])

    def _extend(self, slope: Expr) -> None:
        """The cost of ending in each state: t² − 2ut more than before, for its value t."""
        slope = _register(slope)
        if self.axes.kind == "llvm":
            self._extend_vectors(slope)
            return
        with self.axes.lanes(STATES) as state:
            value = self.table[state]
            T.buffer_store(self.cost, self.least[state // (STATES // self.groups)] + value * (value + slope), [state])

    def _extend_vectors(self, slope: Expr) -> None:
        shared = VECTOR >> self.trellis.bits  # groups that a vector of states covers; what it reads of others is unused
        lanes = [tir.const(lane >> self.trellis.bits, "int32") for lane in range(VECTOR)]
        with T.serial(0, STATES // VECTOR) as part:
            states = tir.Ramp(part * VECTOR, 1, VECTOR)
            least = tir.Shuffle([self.least[tir.Ramp(part * shared, 1, VECTOR)]], lanes)
            value = self.table[states]
            T.buffer_store(self.cost, least + value * (value + tir.Broadcast(slope, VECTOR)), [states])


def _register(value: Expr) -> Expr:
    buffer = T.alloc_buffer((1,), str(value.ty.dtype), scope="local")
    T.buffer_store(buffer, value, [0])
    return buffer[0]
