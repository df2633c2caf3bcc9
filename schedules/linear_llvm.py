"""Linear layers on CPUs: y = x Wᵀ (+ bias) (+ residual) with W packed in tiles of output features.

The packed weight is ``[tiles, in_features, tile]``: for one input feature the weights of ``tile``
neighbouring outputs lie side by side. A micro kernel holds ``rows × tile`` sums in vector registers and adds
one outer product per input feature, broadcast x times a contiguous vector of W, so nothing is ever summed
across lanes, and one row (decode) and many rows (prefill) read the same bytes in the same order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .vector_target import VectorTarget

ROWS_PER_TASK = 96
"""Rows that one task multiplies with one tile: few enough for x to stay in the L2 cache."""


def pack_weight(weight: np.ndarray, tile: int) -> np.ndarray:
    """Pack ``[out_features, in_features]`` as ``[ceil(out_features / tile), in_features, tile]``, padded."""
    out_features, in_features = weight.shape
    tiles = -(-out_features // tile)
    padded = np.zeros((tiles * tile, in_features), weight.dtype)
    padded[:out_features] = weight
    return np.ascontiguousarray(padded.reshape(tiles, tile, in_features).transpose(0, 2, 1))


@dataclass(frozen=True)
class PackedLinear:
    """Static facts of one launch: one or more linear layers that read the same x.

    ``out_features`` and ``bias`` have an entry per layer; ``residual`` (one layer only) adds a tensor of
    y's shape; x and y have ``leading`` dimensions, all symbolic, before the features. Bias and residual
    have y's dtype; sums are float32.
    """

    in_features: int
    out_features: tuple[int, ...]
    bias: tuple[bool, ...]
    residual: bool = False
    leading: int = 2
    input_dtype: str = "float32"
    output_dtype: str = "float32"
    weight_dtype: str = "float32"
    tile: int = 32

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of each layer; the packed weight holds them one layer after the other."""
        return tuple(-(-n // self.tile) for n in self.out_features)


@functools.cache
def packed_linear(spec: PackedLinear, registers: VectorTarget, rows: int | None = None) -> tirx.PrimFunc:
    """PrimFunc (x, weight, bias of each layer that has one, residual if any, y of each layer).

    ``rows`` of a micro kernel; None for as many as three quarters of the registers hold.
    """
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            _LinearKernel(spec, registers, rows).emit()
    return builder.get()


class _LinearKernel:
    """Emits the body of :func:`packed_linear` into the current builder."""

    def __init__(self, spec: PackedLinear, registers: VectorTarget, rows: int | None) -> None:
        self.spec = spec
        self.lanes = min(registers.lanes, spec.tile)
        # A quarter of the registers is for weights and x, the others hold sums.
        self.rows = rows or max(1, registers.registers * 3 // 4 * self.lanes // spec.tile)

    def emit(self) -> None:
        spec = self.spec
        leading = [tirx.Var(f"d{i}", "int64") for i in range(spec.leading)]
        rows = functools.reduce(lambda a, b: a * b, leading, tirx.const(1, "int64"))

        def argument(name: str, *shape: int, dtype: str) -> tirx.Buffer:
            return T.arg(name, T.Buffer(shape, dtype))

        def activation(name: str, features: int, dtype: str = spec.output_dtype) -> Callable[[], tirx.Buffer]:
            buffer = argument(name, *leading, features, dtype=dtype)
            return lambda: T.decl_buffer((rows, features), dtype, data=buffer.data)

        x = activation("x", spec.in_features, spec.input_dtype)
        shape = (sum(spec.tiles), spec.in_features, spec.tile)
        self.weight = argument("weight", *shape, dtype=spec.weight_dtype)
        self.bias = [
            argument(f"bias{i}", n, dtype=spec.output_dtype) if has else None
            for i, (n, has) in enumerate(zip(spec.out_features, spec.bias, strict=True))
        ]
        residual = activation("residual", spec.out_features[0]) if spec.residual else None
        y = [activation(f"y{i}", n) for i, n in enumerate(spec.out_features)]
        self.x, self.y = x(), [each() for each in y]
        self.residual = residual() if residual else None
        self._tasks(rows)

    def _tasks(self, rows: tirx.Expr) -> None:
        """Share out (block of rows × tile): the rows evenly among the blocks, whole micro kernels each."""
        tiles, micro = sum(self.spec.tiles), self.rows
        per_task = -(-ROWS_PER_TASK // micro) * micro
        blocks = T.max((rows + per_task - 1) // per_task, 1)
        block_rows = ((rows + blocks - 1) // blocks + micro - 1) // micro * micro
        with T.parallel(blocks * tiles) as task:
            tile, first = task % tiles, task // tiles * block_rows
            count = T.max(T.min(rows - first, block_rows), 0)
            with T.serial(count // micro) as step:
                self._micro_kernel(first + step * micro, tile, micro)
            left = count % micro
            for size in (size for size in (8, 4, 2, 1) if size < micro):
                with T.If(left >= size):
                    with T.Then():
                        self._micro_kernel(first + count - left, tile, size)
                left = left % size

    def _micro_kernel(self, row: tirx.Expr, tile: tirx.Expr, rows: int) -> None:
        """Multiply ``rows`` rows from ``row`` on with one tile."""
        x, base = self._float32_rows(row, rows)
        width = self.spec.tile
        sums = T.alloc_buffer((rows, width), "float32", scope="local")
        for r, column in self._vectors(rows):
            T.buffer_store(sums, T.Broadcast(T.float32(0), self.lanes), [r, column])
        with T.serial(self.spec.in_features) as k:
            for r, column in self._vectors(rows):
                weight = _widen(self.weight[tile, k, column], self.spec.weight_dtype, self.lanes)
                product = T.Broadcast(x[base + r, k], self.lanes) * weight
                T.buffer_store(sums, sums[r, column] + product, [r, column])
        self._store(sums, row, tile, 0)

    def _vectors(self, rows: int, first: tirx.Expr | int = 0) -> Iterator[tuple[int, tirx.Expr]]:
        """(row, columns) of each vector of sums, the columns counted from ``first``."""
        for row, column in itertools.product(range(rows), range(0, self.spec.tile, self.lanes)):
            yield row, T.ramp(first + column, 1, self.lanes)

    def _float32_rows(self, row: tirx.Expr, rows: int) -> tuple[tirx.Buffer, tirx.Expr]:
        """Return x itself, or its rows widened once into a scratch buffer: scalar conversions are slow."""
        if self.spec.input_dtype == "float32":
            return self.x, row
        features = self.spec.in_features
        wide = T.alloc_buffer((rows, features), "float32")
        for r in range(rows):
            lanes = math.gcd(features, self.lanes)
            with T.serial(features // lanes) as step:
                columns = T.ramp(step * lanes, 1, lanes) if lanes > 1 else step
                value = _widen(self.x[row + r, columns], self.spec.input_dtype, lanes)
                T.buffer_store(wide, value, [r, columns])
        return wide, tirx.const(0, "int64")

    def _store(self, sums: tirx.Buffer, row: tirx.Expr, tile: tirx.Expr, layer: int) -> None:
        """Write to the layer that the tile belongs to."""
        first, tiles = sum(self.spec.tiles[:layer]), self.spec.tiles[layer]
        column = (tile - first) * self.spec.tile
        if layer + 1 == len(self.spec.tiles):
            self._store_layer(sums, row, column, layer)
            return
        with T.If(tile < first + tiles):
            with T.Then():
                self._store_layer(sums, row, column, layer)
            with T.Else():
                self._store(sums, row, tile, layer + 1)

    def _store_layer(self, sums: tirx.Buffer, row: tirx.Expr, column: tirx.Expr, layer: int) -> None:
        out_features = self.spec.out_features[layer]
        if out_features % self.spec.tile == 0:
            self._store_whole(sums, row, column, layer)
            return
        with T.If(column + self.spec.tile <= out_features):
            with T.Then():
                self._store_whole(sums, row, column, layer)
            with T.Else():
                self._store_partial(sums, row, column, layer)

    def _store_whole(self, sums: tirx.Buffer, row: tirx.Expr, column: tirx.Expr, layer: int) -> None:
        rows = int(sums.shape[0])
        for (r, source), (_, target) in zip(self._vectors(rows), self._vectors(rows, column), strict=True):
            self._store_vector(sums[r, source], row + r, target, layer, self.lanes)

    def _store_partial(self, sums: tirx.Buffer, row: tirx.Expr, column: tirx.Expr, layer: int) -> None:
        # Indexing the sums by a variable would push them out of their registers, hence the copy.
        copy = T.alloc_buffer(sums.shape, "float32")
        rows = int(sums.shape[0])
        for r, source in self._vectors(rows):
            T.buffer_store(copy, sums[r, source], [r, source])
        with T.serial(T.max(self.spec.out_features[layer] - column, 0)) as c:
            for r in range(rows):
                self._store_vector(copy[r, c], row + r, column + c, layer, 1)

    def _store_vector(self, value, row, columns, layer: int, lanes: int) -> None:
        if self.bias[layer] is not None:
            value = value + _widen(self.bias[layer][columns], self.spec.output_dtype, lanes)
        if self.residual is not None:
            value = value + _widen(self.residual[row, columns], self.spec.output_dtype, lanes)
        if self.spec.output_dtype != "float32":
            value = T.Cast(_vector(self.spec.output_dtype, lanes), value)
        T.buffer_store(self.y[layer], value, [row, columns])


def _widen(value: tirx.Expr, dtype: str, lanes: int) -> tirx.Expr:
    return value if dtype == "float32" else T.Cast(_vector("float32", lanes), value)


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype
