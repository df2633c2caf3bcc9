"""One layer of a rotation on vectors that a warp holds, on CUDA: blocks of a few elements, in registers.

A layer is written as *taps*: y[i] = Σ_m w_m[i] · x[source_m(i)], where source_m is the same shift or exchange in every
lane, so that a tap is a register of the lane itself or one shuffle. With p = i // stride % block, i's place in a block:

    block and stride powers of two    source_m(i) = i xor m·stride            w_m = c[i, p xor m]
    stride 1, any block (triples)     source_m(i) = i + m, |m| < block        w_m = c[i, p + m], 0 outside the block
    block · stride = head_dim         source_m(i) = i + m·stride mod d        w_m = c[i, (p + m) mod block]

The weights are read once, in the order of the taps, and then serve all vectors of a warp (``held_rotation_cuda``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, f32, load_words, scalar, shuffle_xor, store_words
from .vector_lanes_cuda import VectorLanes

Expr = Any
LARGEST_BLOCK = 4


def _power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


@dataclass(frozen=True)
class LayerTaps:
    """The taps of one layer in a placement."""

    lanes: VectorLanes
    block: int
    stride: int

    @property
    def kind(self) -> str | None:
        """``"xor"``, ``"band"`` or ``"cycle"``, as above; None if the layer is none of them."""
        d, block, stride = self.lanes.head_dim, self.block, self.stride
        if block > LARGEST_BLOCK:
            return None
        if _power_of_two(block) and _power_of_two(stride) and d % (block * stride) == 0:
            return "xor"
        if stride == 1 and block <= self.lanes.access:
            return "band"
        return "cycle" if block * stride == d else None

    @property
    def taps(self) -> range:
        """The numbers m."""
        return range(1 - self.block, self.block) if self.kind == "band" else range(self.block)

    @property
    def local(self) -> bool:
        """Whether all blocks lie within lanes."""
        return self.kind == "xor" and all(self._xor(0, m)[1] == 0 for m in self.taps)

    @property
    def weights(self) -> int:
        """How many weights a lane needs."""
        return self.lanes.elements * len(self.taps)

    def slot(self, register: int, tap: int) -> int:
        """Where a weight stands among the lane's."""
        return register * len(self.taps) + tap - self.taps.start

    def mirror(self, register: int, tap: int) -> int:
        """In a layer whose blocks lie within lanes: the weight with the inverse's role."""
        return self.slot(self._xor(register, tap)[0], tap)

    def _xor(self, register: int, tap: int) -> tuple[int, int]:
        """(register, lane mask) of the exchange by tap · stride."""
        chunk, element = divmod(register, self.lanes.access)
        accesses, inside = divmod(tap * self.stride, self.lanes.access)
        chunks, mask = divmod(accesses, self.lanes.lanes)
        return (chunk ^ chunks) * self.lanes.access + (element ^ inside), mask

    # Weights

    @property
    def staged_floats(self) -> int:
        """How many floats ``stage`` needs."""
        return (self.lanes.head_dim + self.lanes.head_dim // self.lanes.access) * self.block

    def stage(self, staged: Any, coefficients: Any, offset: int, thread: Expr, threads: int) -> None:
        """Copy the layer's coefficients, from ``offset`` of ``Rotation.data`` on, to shared memory, with all threads.

        Lanes read rows of their dims straight from memory too slowly: neighbouring lanes' are far apart. Here a row is
        left free after the dims of each access, so that the reads of different lanes meet in no bank.
        """
        pieces, group = self.lanes.head_dim * self.block // 4, self.lanes.access * self.block
        width = 4 if self.block == 4 else 2 if self.block == 2 else 1
        with T.serial(0, -(-pieces // threads)) as step:
            first = scalar((thread + step * threads) * 4)
            with T.If(first < 4 * pieces), T.Then():
                piece = Registers(4, "float32")
                load_words(piece, 0, coefficients, [first + offset], 4, "global.nc")
                place = scalar(first + first // group * self.block)
                for k in range(0, 4, width):
                    store_words(staged, [place + k], [piece[k + n] for n in range(width)], "shared")

    def load_weights(self, target: Registers, source: Any, offset: int | None, lane: Expr) -> None:
        """Read the lane's weights from ``offset`` of ``Rotation.data`` on; from staged coefficients if it is None."""
        arrange = {"xor": self._exchanged, "band": self._band, "cycle": self._cycle}[str(self.kind)]
        for register in range(self.lanes.elements):
            dim = self.lanes.dim(lane, register)
            if self.lanes.idle(register // self.lanes.access):
                dim = scalar(tir.min(dim, self.lanes.head_dim - 1))
            row = Registers(self.block, "float32")
            place = dim + dim // self.lanes.access if offset is None else dim
            first = scalar(place * self.block + (offset or 0))
            wide = self.block if self.block in (2, 4) else 1
            for k in range(0, self.block, wide):
                load_words(row, k, source, [first + k], wide, "shared" if offset is None else "global.nc")
            weights = [scalar(value) for value in arrange(register, dim, list(row), lane)]
            for tap, value in zip(self.taps, weights, strict=True):
                target[self.slot(register, tap)] = self.lanes.where_active(lane, register, value)

    def _exchanged(self, register: int, dim: Expr, values: list[Expr], lane: Expr) -> list[Expr]:
        for k in range(self.block.bit_length() - 1):  # bit k of the place p exchanges the neighbours at distance 2^k
            exchanged = [values[j ^ (1 << k)] for j in range(self.block)]
            step = self.stride << k
            inside, across = step < self.lanes.access, step < self.lanes.access * self.lanes.lanes
            if inside or not across:
                values = exchanged if self.lanes.dim(0, register) // step % 2 else values
            else:
                odd = lane // (step // self.lanes.access) % 2 == 1
                pairs = zip(exchanged, values, strict=True)
                values = [scalar(tir.Select(odd, other, own)) for other, own in pairs]
        return values

    def _band(self, register: int, dim: Expr, row: list[Expr], lane: Expr) -> list[Expr]:
        base = tir.min(dim // self.block * self.block, self.lanes.head_dim - self.block)
        place = scalar(dim - base)
        weights = []
        for tap in self.taps:
            value = f32(0)
            for k in range(self.block):
                value = tir.Select(place + tap == k, row[k], value)
            weights.append(value)
        return weights

    def _cycle(self, register: int, dim: Expr, row: list[Expr], lane: Expr) -> list[Expr]:
        place = scalar(dim // self.stride)
        weights = []
        for tap in self.taps:
            value = row[self.block - 1]
            for k in range(self.block - 1):
                value = tir.Select((place + tap) % self.block == k, row[k], value)
            weights.append(value)
        return weights

    # Application

    def apply(self, vectors: Sequence[Registers], row: Callable[[int], Sequence[Expr]], lane: Expr) -> list[Registers]:
        """The layer's outputs; ``row(register)`` gives a register's weights in the order of the taps."""
        results = [Registers(x.count, "float32") for x in vectors]
        sources = {"xor": self._exchange, "band": self._shift, "cycle": self._turn}[str(self.kind)]
        inputs = [sources(x, lane) for x in vectors]
        for register in range(self.lanes.elements):
            weights = row(register)
            for y, source in zip(results, inputs, strict=True):
                total = None
                for weight, tap in zip(weights, self.taps, strict=True):
                    product = weight * source(register, tap)
                    total = product if total is None else total + product
                y[register] = total
        return results

    def _exchange(self, x: Registers, lane: Expr) -> Callable[[int, int], Expr]:
        known: dict[tuple[int, int], Expr] = {}

        def source(register: int, tap: int) -> Expr:
            key = self._xor(register, tap)
            if key[1] == 0:
                return x[key[0]]
            if key not in known:
                known[key] = shuffle_xor(x[key[0]], key[1])
            return known[key]

        return source

    def _shift(self, x: Registers, lane: Expr) -> Callable[[int, int], Expr]:
        """Neighbours within a lane, or the outermost elements of the next lane (of the next chunk at the edges)."""
        lanes, access, chunks = self.lanes.lanes, self.lanes.access, self.lanes.chunks
        known: dict[tuple[int, int], Expr] = {}

        def source(register: int, tap: int) -> Expr:
            chunk, element = divmod(register, access)
            carry, inside = divmod(element + tap, access)
            if carry == 0:
                return x[register + tap]
            if (chunk, element + tap) not in known:
                value = x[chunk * access + inside]
                if 0 <= chunk + carry < chunks:  # what wraps around the lanes comes from the next chunk
                    edge = lane == (lanes - 1 if carry < 0 else 0)
                    value = scalar(tir.Select(edge, x[(chunk + carry) * access + inside], value))
                known[chunk, element + tap] = self.lanes.from_lane(value, (lane + (lanes + carry)) % lanes)
            return known[chunk, element + tap]

        return source

    def _turn(self, x: Registers, lane: Expr) -> Callable[[int, int], Expr]:
        lanes, access = self.lanes.lanes, self.lanes.access
        count = self.lanes.head_dim // access
        known: dict[tuple[int, int], Expr] = {}

        def source(register: int, tap: int) -> Expr:
            chunk, element = divmod(register, access)
            accesses, inside = divmod(element + tap * self.stride, access)
            if accesses == 0:
                return x[chunk * access + inside]
            first = (chunk * lanes + accesses) % count
            if (first, inside) not in known:
                place = scalar((lane + first) % count)
                value = None
                for part in sorted({(other + first) % count // lanes for other in range(lanes)}):
                    here = self.lanes.from_lane(x[part * access + inside], place % lanes)
                    value = here if value is None else tir.Select(place // lanes == part, here, value)
                known[first, inside] = scalar(value)
            return known[first, inside]

        return source
