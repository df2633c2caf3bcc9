"""Rotations of several layers on CUDA whose vectors move between layers, so that every block lies within a lane.

The vector stays as the last layer leaves it (``local_layers_cuda`` says where everything is). Since all layers are
local, the inverse has the same weights, and it undoes the exchanges, so that it ends where the rotation began. Codes, a
byte each, go there or back too (``code_exchange_cuda``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, block_sync, load_words, scalar, shuffle_xor, store_words
from .local_layers_cuda import LocalLayer, Structure, plan
from .vector_lanes_cuda import VectorLanes

Expr = Any
BUDGET, LARGE_BUDGET, LARGE_HEAD_DIM = 96, 64, 128
"""Registers for weights, and those above a head dimension, with which a kernel needs 128 registers."""


class ExchangedRotation:
    """A rotation's layers with their weights, for the vectors that a warp holds; for which there is one: ``plan``."""

    def __init__(self, lanes: VectorLanes, structure: Structure, *, budget: int | None, inverse: bool = False) -> None:
        """Plan it.

        ``budget``: registers for weights, those of other layers are read from shared memory for each use; None leaves
        room for 16 warps on a multiprocessor. ``inverse``: the coefficients will be those of the inverse rotation, and
        ``apply_inverse`` alone will be used.
        """
        self.lanes, self._inverse = lanes, inverse
        self.layers: list[LocalLayer] = plan(lanes, structure) or []
        if budget is None:
            budget = BUDGET if lanes.head_dim <= LARGE_HEAD_DIM else LARGE_BUDGET
        self._held: list[bool] = []
        for layer in self.layers:
            weights = lanes.elements * layer.block
            budget -= weights
            self._held.append(budget >= 0)
        self._registers: dict[int, Registers] = {}
        self._shared: Any = None
        self._lane: Expr = None

    @staticmethod
    def possible(lanes: VectorLanes, structure: Structure) -> bool:
        """Whether there is a plan, and codes fill two words."""
        return lanes.elements >= 8 and plan(lanes, structure) is not None

    @property
    def register_weights(self) -> int:
        """How many registers weights take."""
        layers = zip(self.layers, self._held, strict=True)
        return sum(self.lanes.elements * layer.block for layer, held in layers if held)

    @property
    def resident(self) -> int:
        """How many blocks of four warps the compiler is to fit into a multiprocessor; 0 where they come to as many."""
        return 4 if self.register_weights > LARGE_BUDGET else 0

    def load(self, coefficients: Any, lane: Expr, thread: Expr, warps: int) -> None:
        """Read the weights from ``Rotation.data``, with all threads of the block, which it waits for."""
        self._lane = lane
        floats = sum(self.lanes.head_dim * layer.block for layer in self.layers)
        self._shared = T.alloc_buffer((floats,), "float32", scope="shared")
        rows = [self._fetch(k, coefficients, thread, warps * WARP) for k in range(len(self.layers))]
        for index, fetched in enumerate(rows):
            for place, row in fetched:
                self._keep(index, place, row)
        block_sync()
        for index, held in enumerate(self._held):
            if held:
                self._registers[index] = Registers(self.lanes.elements * self.layers[index].block, "float32")
                for register in range(self.lanes.elements):
                    self._read(self._registers[index], register * self.layers[index].block, index, register)

    def _offset(self, index: int) -> int:
        before = self.layers[index + 1 :] if self._inverse else self.layers[:index]
        return sum(self.lanes.head_dim * layer.block for layer in before)

    def _fetch(self, index: int, coefficients: Any, thread: Expr, threads: int) -> list[tuple[Expr, Registers]]:
        """Read coefficients, a row each to the threads, in the order of places; who has no place repeats the last."""
        layer, fetched = self.layers[index], []
        for step in range(-(-self.lanes.head_dim // threads)):
            place = scalar(tir.min(thread + step * threads, self.lanes.head_dim - 1))
            row = Registers(layer.block, "float32")
            written = layer.inputs if self._inverse else layer.outputs
            first = written.emit_dim(place) * layer.block + self._offset(index)
            load_words(row, 0, coefficients, [first], layer.block, "global.nc")
            fetched.append((place, row))
        return fetched

    def _keep(self, index: int, place: Expr, row: Registers) -> None:
        """Write a row to shared memory, in the order of taps."""
        layer, values = self.layers[index], list(row)
        own = (layer.outputs if self._inverse else layer.inputs).emit_dim(place, layer.bits)
        for k in range(len(layer.bits)):
            odd = (own >> k & 1) == 1
            pairs = [(values[m ^ 1 << k], values[m]) for m in range(layer.block)]
            values = [scalar(tir.Select(odd, other, value)) for other, value in pairs]
        store_words(self._shared, [place * layer.block + self._offset(index)], values, "shared")

    def _read(self, target: Registers, at: int, index: int, register: int, how: str = "shared") -> None:
        """Read a register's weights from shared memory."""
        block = self.layers[index].block
        first = (self._lane + register * self.lanes.lanes) * block + self._offset(index)
        load_words(target, at, self._shared, [first], block, how)

    def _weights(self, index: int, registers: Sequence[int]) -> Callable[[int, int], Expr]:
        """The weights of a block's registers, by register and tap."""
        block = self.layers[index].block
        if self._held[index]:
            return lambda register, tap: self._registers[index][register * block + tap]
        rows = {register: Registers(block, "float32") for register in registers}
        for register, row in rows.items():
            # Each time: else the compiler keeps what there are no registers for from the rotation to its inverse.
            self._read(row, 0, index, register, "volatile.shared")
        return lambda register, tap: rows[register][tap]

    def apply(self, vectors: Sequence[Registers]) -> list[Registers]:
        """R x of every vector, in the layout after the last layer."""
        for index, layer in enumerate(self.layers):
            vectors = self._layer(index, vectors, lambda r, tap, layer=layer: (r, layer.neighbour(r, tap)))
            vectors = [self._exchange(layer, y) for y in vectors]
        return list(vectors)

    def apply_inverse(self, vectors: Sequence[Registers]) -> list[Registers]:
        """Rᵀ y of every vector, of what ``apply`` gives, in the layout of vectors as they are read."""
        for index, layer in reversed(list(enumerate(self.layers))):
            vectors = [self._exchange(layer, y) for y in vectors]
            vectors = self._layer(index, vectors, lambda r, tap, layer=layer: self._mirrored(layer, r, tap))
        return list(vectors)

    def _mirrored(self, layer: LocalLayer, register: int, tap: int) -> tuple[int, int]:
        source = layer.neighbour(register, tap)
        return register if self._inverse else source, source

    def _layer(
        self, index: int, vectors: Sequence[Registers], roles: Callable[[int, int], tuple[int, int]]
    ) -> list[Registers]:
        """Multiply by blocks; ``roles(register, tap)`` says whose weight of this tap takes which input there."""
        layer = self.layers[index]
        results = [Registers(x.count, "float32") for x in vectors]
        for first in range(self.lanes.elements):
            members = [layer.neighbour(first, tap) for tap in range(layer.block)]
            if first != min(members):
                continue
            weight = self._weights(index, members)
            for x, y in zip(vectors, results, strict=True):
                for register in members:
                    total = None
                    for tap in range(layer.block):
                        owner, source = roles(register, tap)
                        product = weight(owner, tap) * x[source]
                        total = product if total is None else total + product
                    y[register] = total
        return results

    def _exchange(self, layer: LocalLayer, x: Registers) -> Registers:
        if not layer.exchanges:
            return x
        moved = Registers(x.count, "float32")
        for register in range(x.count):
            mask = layer.across(register)
            moved[register] = shuffle_xor(x[register], mask) if mask else x[register]
        return moved
