"""Rotations of vectors that a warp holds, on CUDA: the layers' weights, read once for all of its vectors.

Weights stand in registers, or in shared memory where there would be too many. A layer whose blocks lie within lanes
needs no shuffle, and its inverse, whose coefficients are the same ones transposed, no weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import WARP, Registers, block_sync, load_words, store_words
from .rotation_taps_cuda import LayerTaps
from .vector_lanes_cuda import VectorLanes

Expr = Any
Structure = Sequence[tuple[int, int]]
REGISTER_WEIGHTS, SEVERAL_LAYERS = 96, 32
"""How many registers a lane may keep weights in, and of rotations with several layers: layers beyond the first are kept
in shared memory if they are more. Weights in registers cost warps, which do more for layers that wait for shuffles."""
STAGED_KNOBS: dict[str, tuple[int, ...]] = {"weights": (32, 64, 96, 128), "staged": (0, 1)}
"""Registers for a rotation's weights, and whether its coefficients come by way of shared memory."""
WEIGHT_KNOBS = {**STAGED_KNOBS, "exchange": (0, 1)}
"""Besides, whether elements move between layers (``exchanged_rotation_cuda``)."""
STATIC_FLOATS = 8 * 1024
"""Up to how many floats of shared memory are declared; a launch has to ask for more."""


def default_budget(structure: Structure) -> int:
    """The budget of a rotation where none is asked for."""
    return REGISTER_WEIGHTS if len(structure) <= 1 else SEVERAL_LAYERS


class HeldRotation:
    """The layers of a rotation, with their weights, for the vectors that a warp holds."""

    def __init__(
        self,
        lanes: VectorLanes,
        structure: Structure,
        *,
        skip: Sequence[int] = (),
        budget: int = REGISTER_WEIGHTS,
        staged: bool = False,
    ) -> None:
        """Plan it, emitting nothing.

        ``skip``: layers that need no weights of their own. ``budget``: registers for weights (the first layer's are
        kept there anyway). ``staged``: whether coefficients come by way of shared memory, which a block reads faster.
        """
        self.lanes = lanes
        self.layers = [LayerTaps(lanes, block, stride) for block, stride in structure]
        self._skip, self._staged = set(skip), staged
        self._in_registers = self._choose(budget)
        self._registers: dict[int, Registers] = {}
        self._shared: dict[int, tuple[Any, int]] = {}
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
    def needs_weights(self) -> bool:
        """Whether there is anything to load."""
        return len(self._skip) < len(self.layers)

    @property
    def uses_shared(self) -> bool:
        """Whether weights are in shared memory: the block must be waited for between ``load`` and ``apply``."""
        return len(self._in_registers | self._skip) < len(self.layers)

    def inverse(self, budget: int = REGISTER_WEIGHTS) -> HeldRotation:
        """Plan the inverse: its weights are those of this rotation where they can be."""
        count = len(self.layers)
        skip = [count - 1 - k for k in range(count) if self._mirrored(k)]
        structure = [(layer.block, layer.stride) for layer in reversed(self.layers)]
        rest = max(0, budget - self.register_weights())
        return HeldRotation(self.lanes, structure, skip=skip, budget=rest, staged=self._staged)

    def _mirrored(self, index: int) -> bool:
        return self.layers[index].local and index in self._in_registers

    @property
    def _staged_floats(self) -> int:
        needed = [layer.staged_floats for k, layer in enumerate(self.layers) if k not in self._skip]
        return max(needed, default=0) if self._staged else 0

    @property
    def shared_floats(self) -> tuple[int, int]:
        """Floats of shared memory: those that ``load`` needs for itself, and those that weights stay in."""
        kept = set(range(len(self.layers))) - self._in_registers - self._skip
        return self._staged_floats, self.register_weights(kept) * self.lanes.lanes

    def place(self, lane: Expr) -> None:
        """Say which of its vector's lanes a thread is."""
        self._lane = lane

    def load(self, coefficients: Any, thread: Expr, warps: int, shared: Any, kept: int) -> None:
        """Read the weights, after ``place``; ``coefficients`` is ``Rotation.data``.

        ``thread``: the thread's number in the block of ``warps``. ``shared``: float32 shared memory, of which the first
        floats are for ``load`` itself and those from ``kept`` on for weights (``shared_floats``).
        """
        offset, first = 0, True
        for index, layer in enumerate(self.layers):
            if index not in self._skip:
                source = (coefficients, offset)
                if self._staged:
                    if not first:
                        block_sync()
                    layer.stage(shared, coefficients, offset, thread, warps * WARP)
                    block_sync()
                    source = (shared, None)
                if index in self._in_registers:
                    self._registers[index] = Registers(layer.weights, "float32")
                    layer.load_weights(self._registers[index], *source, self._lane)
                else:
                    self._shared[index] = shared, kept
                    kept += layer.weights * self.lanes.lanes
                    with T.If(tir.all(thread // WARP == index % warps, thread % WARP < self.lanes.lanes)), T.Then():
                        self._keep(index, *source)
                first = False
            offset += layer.block * self.lanes.head_dim

    def _keep(self, index: int, source: Any, offset: int | None) -> None:
        """Take a layer's coefficients to where its weights stay."""
        layer, lane = self.layers[index], self._lane
        shared, first = self._shared[index]
        width = len(layer.taps)
        values = Registers(layer.weights, "float32")
        layer.load_weights(values, source, offset, lane)
        for register in range(self.lanes.elements):
            for k, count in _pieces(width):
                row = [values[register * width + k + n] for n in range(count)]
                store_words(shared, [self._weight(first, register, width) + k], row, "shared")

    def _weight(self, first: int, register: int, width: int) -> Expr:
        return (self._lane + register * self.lanes.lanes) * width + first

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
        shared, first = self._shared[index]
        for k, count in _pieces(width):
            load_words(row, k, shared, [self._weight(first, register, width) + k], count, "shared")
        return list(row)

    def _mirrored_row(self, index: int, register: int) -> list[Expr]:
        layer = self.layers[index]
        return [self._registers[index][layer.mirror(register, tap)] for tap in layer.taps]


def load_rotations(parts: Sequence[tuple[HeldRotation, Any]], thread: Expr, warps: int) -> bool:
    """Load rotations from their coefficients, after ``place``; allocates shared memory for them.

    Returns whether the block must be waited for before they are applied, also for what was written before.
    """
    parts = [(rotation, coefficients) for rotation, coefficients in parts if rotation.needs_weights]
    sizes = [rotation.shared_floats for rotation, _ in parts]
    kept = -(-max((staged for staged, _ in sizes), default=0) // 4) * 4
    staging = kept > 0
    total = kept + sum(weights for _, weights in sizes)
    scope = "shared" if total <= STATIC_FLOATS else "shared.dyn"
    shared = T.alloc_buffer((total,), "float32", scope=scope) if total else None
    for number, ((rotation, coefficients), (_, weights)) in enumerate(zip(parts, sizes, strict=True)):
        if number and staging:
            block_sync()  # of the one before, everything has been read
        rotation.load(coefficients, thread, warps, shared, kept)
        kept += weights
    return not staging or any(rotation.uses_shared for rotation, _ in parts)


def _pieces(width: int) -> list[tuple[int, int]]:
    """A row of weights as (first, count) of accesses that its alignment allows."""
    return [(0, width)] if width in (2, 4) else [(k, 1) for k in range(width)]
