"""Rotations of a thread block's few query rows in shared memory, on CUDA: the ends of decode attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, bits_of, block_sync, f32, float_of, load_words, scalar

Expr = Any
Structure = Sequence[tuple[int, int]]
MOST_TAPS = 16
"""Products per element of all layers; a rotation of more costs a block longer than a launch of its own."""
MOST_HELD = 4
"""Elements that a thread keeps in registers."""


def few_taps(structure: Structure) -> bool:
    """Whether a rotation is cheap enough to be done in every block that needs its result."""
    return sum(block for block, _ in structure) <= MOST_TAPS


class SharedRows:
    """float32 [rows, head_dim] in words ``first`` … of ``shared``, twice: layers read one copy and write the other."""

    def __init__(self, shared: Any, first: int, rows: int, head_dim: int, thread: Expr, threads: int) -> None:
        self.shared, self.first, self.rows, self.head_dim = shared, first, rows, head_dim
        self.thread, self.threads = thread, threads
        self.now = 0

    @staticmethod
    def words(rows: int, head_dim: int) -> int:
        """Words of shared memory for both copies."""
        return 2 * rows * head_dim

    def at(self, row: Expr, dim: Expr, copy: int | None = None) -> Expr:
        """The word where an element stands."""
        copy = self.now if copy is None else copy
        return self.first + copy * self.rows * self.head_dim + row * self.head_dim + dim

    def each(self, body: Callable[[Expr, Expr], None]) -> None:
        """Run ``body(row, dim)`` for every element, spread over the block's threads."""
        items = self.rows * self.head_dim
        with T.serial(0, -(-items // self.threads)) as turn:
            item = scalar(turn * self.threads + self.thread)
            with T.If(item < items), T.Then():
                body(scalar(item // self.head_dim), scalar(item % self.head_dim))

    def put(self, row: Expr, dim: Expr, value: Expr) -> None:
        """Set an element."""
        T.buffer_store(self.shared, bits_of(value), [self.at(row, dim)])

    def hold(self, body: Callable[[Expr, Expr], Expr]) -> Callable[[Callable[[Expr, Expr, Expr], None]], None]:
        """Work out ``body(row, dim)`` for every element; what is returned hands them to a ``store(row, dim, value)``.

        If they are few, all of the loads in ``body`` come before the first store.
        """
        items = self.rows * self.head_dim
        turns = -(-items // self.threads)
        if turns > MOST_HELD:
            return lambda store: self.each(lambda row, dim: store(row, dim, body(row, dim)))
        held = []
        for turn in range(turns):
            item = scalar(turn * self.threads + self.thread)
            row, dim = scalar(item // self.head_dim), scalar(item % self.head_dim)
            value = scalar(body(tir.min(row, self.rows - 1) if items % self.threads else row, dim))
            held.append((row, dim, value, item < items))

        def put(store: Callable[[Expr, Expr, Expr], None]) -> None:
            for row, dim, value, inside in held:
                if items % self.threads == 0:
                    store(row, dim, value)
                else:
                    with T.If(inside), T.Then():
                        store(row, dim, value)

        return put

    def get(self, row: Expr, dim: Expr) -> Expr:
        """An element."""
        return float_of(self.shared[self.at(row, dim)])

    def ask(self, structure: Structure, coefficients: Any) -> list[Registers] | None:
        """Begin to load the coefficients that the thread needs; None if they are not the same for all its elements."""
        return self._coefficients(structure, coefficients) if self.threads % self.head_dim == 0 else None

    def rotate(self, structure: Structure, coefficients: Any, ahead: list[Registers] | None) -> None:
        """Apply the layers of a rotation (``Rotation.structure`` and ``.data``) to every row; ends with a barrier.

        ``ahead``: what ``ask`` returned for them.
        """
        block_sync()
        offset = 0
        for number, (block, stride) in enumerate(structure):
            self._layer(block, stride, coefficients, offset, ahead[number] if ahead else None)
            self.now = 1 - self.now
            block_sync()
            offset += block * self.head_dim

    def _coefficients(self, structure: Structure, coefficients: Any) -> list[Registers]:
        """All layers' coefficients of the thread's dim, the same in every row: one wait for memory, not many."""
        layers, offset = [], 0
        dim = scalar(self.thread % self.head_dim)
        for block, _ in structure:
            held = Registers(block, "float32")
            if block in (2, 4):
                load_words(held, 0, coefficients, [offset + dim * block], block, "global.nc")
            else:
                for k in range(block):
                    held[k] = coefficients[offset + dim * block + k]
            layers.append(held)
            offset += block * self.head_dim
        return layers

    def _layer(self, block: int, stride: int, coefficients: Any, offset: int, ahead: Registers | None) -> None:
        def element(row: Expr, dim: Expr) -> Expr:
            if stride == 1:
                base = tir.min(dim // block * block, self.head_dim - block)
            else:
                base = dim - dim // stride % block * stride
            total = Registers(1, "float32")
            total[0] = f32(0)
            for k in range(block):
                factor = coefficients[offset + dim * block + k] if ahead is None else ahead[k]
                total[0] = total[0] + factor * self.get(row, base + k * stride)
            return total[0]

        def store(row: Expr, dim: Expr, value: Expr) -> None:
            T.buffer_store(self.shared, bits_of(value), [self.at(row, dim, 1 - self.now)])

        self.hold(element)(store)
