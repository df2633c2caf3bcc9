"""Rotations of vectors that a warp holds, on CUDA: the layers' weights, read once for all of its vectors.

Weights stand in registers, or in shared memory where there would be too many. A layer whose blocks lie within lanes
needs no shuffle, and its inverse, whose coefficients are the same ones transposed, no weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, load_words, store_words
from .rotation_taps_cuda import LayerTaps
from .vector_lanes_cuda import VectorLanes

Expr = Any
Structure = Sequence[tuple[int, int]]
REGISTER_WEIGHTS = 96
"""How many registers a lane may keep weights in; layers beyond are kept in shared memory."""


class HeldRotation:
    """The layers of a rotation, with their weights, for the vectors that a warp holds."""

    def __init__(
        self, lanes: VectorLanes, structure: Structure, *, skip: Sequence[int] = (), budget: int = REGISTER_WEIGHTS
    ) -> None:
        """Plan it, emitting nothing.

        ``skip``: layers that need no weights of their own. ``budget``: registers for weights (the first layer's are
        kept there anyway).
        """
        self.lanes = lanes
        self.layers = [LayerTaps(lanes, block, stride) for block, stride in structure]
        self._skip = set(skip)
        self._in_registers = self._choose(budget)
        self._registers: dict[int, Registers] = {}
        self._shared: dict[int, Any] = {}
        self._lane: Expr = None

    @staticmethod
    def possible(lanes: VectorLanes, structure: Structure) -> bool:
        """Whether every layer can be written as taps."""
        return all(LayerTaps(lanes, block, stride).kind is not None for block, stride in structure)

    def _choose(self, budget: int) -> set[int]:
        """The layers whose weights are in registers: first those that serve the inverse too."""
        chosen: set[int] = set()
        for index in sorted(range(len(self.layers)), key=lambda k: not self.layers[k].local):
            fits = self.register_weights(chosen) + self.layers[index].weights <= budget
            if index not in self._skip and (not chosen or fits):
                chosen.add(index)
        return chosen

    def register_weights(self, layers: set[int] | None = None) -> int:
        """How many registers the weights of ``layers`` take, or those of all layers that are kept in registers."""
        return sum(self.layers[k].weights for k in (self._in_registers if layers is None else layers))

    @property
    def uses_shared(self) -> bool:
        """Whether ``load`` writes shared memory: the block must be waited for between it and ``apply``."""
        return len(self._in_registers | self._skip) < len(self.layers)

    def inverse(self, budget: int = REGISTER_WEIGHTS) -> HeldRotation:
        """Plan the inverse: its weights are those of this rotation where they can be."""
        count = len(self.layers)
        skip = [count - 1 - k for k in range(count) if self._mirrored(k)]
        structure = [(layer.block, layer.stride) for layer in reversed(self.layers)]
        return HeldRotation(self.lanes, structure, skip=skip, budget=max(0, budget - self.register_weights()))

    def _mirrored(self, index: int) -> bool:
        return self.layers[index].local and index in self._in_registers

    def load(self, coefficients: Any, lane: Expr, warp: Expr, thread_lane: Expr, warps: int) -> None:
        """Read the weights; ``coefficients`` is ``Rotation.data``.

        ``lane`` is counted within a vector, ``thread_lane`` within the warp, ``warp`` within the block of ``warps``.
        """
        self._lane, offset = lane, 0
        for index, layer in enumerate(self.layers):
            if index in self._in_registers:
                self._registers[index] = Registers(layer.weights, "float32")
                layer.load_weights(self._registers[index], coefficients, offset, lane)
            elif index not in self._skip:
                self._shared[index] = T.alloc_buffer((layer.weights * self.lanes.lanes,), "float32", scope="shared")
                with T.If(tir.all(warp == index % warps, thread_lane < self.lanes.lanes)), T.Then():
                    self._fill(index, coefficients, offset, lane)
            offset += layer.block * self.lanes.head_dim

    def _fill(self, index: int, coefficients: Any, offset: int, lane: Expr) -> None:
        layer = self.layers[index]
        width = len(layer.taps)
        values = Registers(layer.weights, "float32")
        layer.load_weights(values, coefficients, offset, lane)
        for register in range(self.lanes.elements):
            for first, count in _pieces(width):
                at = (lane + register * self.lanes.lanes) * width + first
                row = [values[register * width + first + k] for k in range(count)]
                store_words(self._shared[index], [at], row, "shared")

    def apply(self, vectors: Sequence[Registers]) -> list[Registers]:
        """R x of every vector."""
        for index, layer in enumerate(self.layers):
            vectors = layer.apply(vectors, lambda register, k=index: self._row(k, register), self._lane)
        return list(vectors)

    def apply_inverse(self, vectors: Sequence[Registers], inverse: HeldRotation) -> list[Registers]:
        """Rᵀ y of every vector; ``inverse`` is what ``inverse()`` planned, loaded from the inverse's coefficients."""
        for index, layer in enumerate(inverse.layers):
            own = len(self.layers) - 1 - index
            row = self._mirrored_row if self._mirrored(own) else inverse._row
            number = own if self._mirrored(own) else index
            vectors = layer.apply(vectors, lambda register, f=row, k=number: f(k, register), self._lane)
        return list(vectors)

    def _row(self, index: int, register: int) -> list[Expr]:
        layer = self.layers[index]
        if index in self._registers:
            return [self._registers[index][layer.slot(register, tap)] for tap in layer.taps]
        width = len(layer.taps)
        row = Registers(width, "float32")
        for first, count in _pieces(width):
            at = (self._lane + register * self.lanes.lanes) * width + first
            load_words(row, first, self._shared[index], [at], count, "shared")
        return list(row)

    def _mirrored_row(self, index: int, register: int) -> list[Expr]:
        layer = self.layers[index]
        return [self._registers[index][layer.mirror(register, tap)] for tap in layer.taps]


def _pieces(width: int) -> list[tuple[int, int]]:
    """A row of weights as (first, count) of accesses that its alignment allows."""
    return [(0, width)] if width in (2, 4) else [(k, 1) for k in range(width)]
