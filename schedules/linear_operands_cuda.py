"""What a kernel of linear layers on CUDA works on, and what it does with a finished sum."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from .cuda_ops import Registers, f32, pack_half2, ptx

Expr = Any


@dataclass(frozen=True)
class CUDALinear:
    """Static facts of one launch: one or more linear layers that read the same x; x and weights are float16.

    ``out_features`` and ``bias`` have an entry per layer; ``residual`` (one layer only) adds a tensor of y's shape;
    ``gated`` (two layers of one size, no bias) gives silu(first) · second alone. x and y have ``leading`` symbolic
    dimensions before the features. Sums are float32; y, bias and residual have ``output_dtype``.
    """

    in_features: int
    out_features: tuple[int, ...]
    bias: tuple[bool, ...]
    residual: bool = False
    gated: bool = False
    leading: int = 2
    output_dtype: str = "float16"

    @property
    def outputs(self) -> tuple[int, ...]:
        """Features of each result."""
        return self.out_features[:1] if self.gated else self.out_features


class Operands:
    """The arguments of a launch; create it where a function's arguments are declared.

    ``early``: the kernels may start before their inputs are there, and wait for them.
    ``x``: [rows, in_features]; ``weight``: [sum of out_features, in_features]; results and residual [rows, features].
    """

    def __init__(self, spec: CUDALinear, early: bool = False) -> None:
        self.spec, self.early = spec, early
        leading = [tir.Var(f"d{i}", "int64") for i in range(spec.leading)]
        self.rows = functools.reduce(lambda a, b: a * b, leading, tir.const(1, "int64"))

        def activation(name: str, features: int, dtype: str = spec.output_dtype) -> Any:
            return T.arg(name, T.buffer((*leading, features), dtype)), features, dtype

        x = activation("x", spec.in_features, "float16")
        self.weight = T.arg("weight", T.buffer((sum(spec.out_features), spec.in_features), "float16"))
        self.bias = [
            T.arg(f"bias{i}", T.buffer((n,), spec.output_dtype)) if has else None
            for i, (n, has) in enumerate(zip(spec.out_features, spec.bias, strict=True))
        ]
        residual = activation("residual", spec.out_features[0]) if spec.residual else None
        results = [activation(f"y{i}", n) for i, n in enumerate(spec.outputs)]
        self.x = self._flat(*x)
        self.residual = self._flat(*residual) if residual else None
        self.results = [self._flat(*each) for each in results]

    def _flat(self, buffer: Any, features: int, dtype: str) -> Any:
        return T.decl_buffer((self.rows, features), dtype, data=buffer.data)

    def finish(self, row: Expr, feature: Expr, value: Expr) -> None:
        """Store the sum of one row and one feature, counted over all layers."""
        self._finish(row, feature, [value])

    def finish_pair(self, row: Expr, feature: Expr, values: list[Expr]) -> None:
        """Store the sums of two neighbouring features, the first of them even, where they exist."""
        whole = all(width % 2 == 0 for width in self.spec.outputs)
        if whole and self.spec.output_dtype == "float16":
            self._finish(row, feature, values)
            return
        for k, value in enumerate(values):
            self._finish(row, feature + k, [value])

    def _finish(self, row: Expr, feature: Expr, values: list[Expr]) -> None:
        first = 0
        for layer, width in enumerate(self.spec.outputs):
            last = first + width
            inside = feature < last if layer == 0 else (feature >= first) & (feature < last)
            with T.If(inside), T.Then():
                self._store(layer, row, feature - first, values)
            first = last

    def _store(self, layer: int, row: Expr, feature: Expr, values: list[Expr]) -> None:
        bias, result = self.bias[layer], self.results[layer]
        sums = []
        for k, value in enumerate(values):
            if bias is not None:
                value = value + bias[feature + k].astype("float32")
            if self.residual is not None:
                value = value + _read(self.residual, [row, feature + k])
            sums.append(value)
        if len(sums) == 2:
            ptx("st.global.b32", result.ptr_to([row, feature]), pack_half2(*sums))
        else:
            T.buffer_store(result, sums[0].astype(self.spec.output_dtype), [row, feature])


def _read(buffer: Any, index: list[Expr]) -> Expr:
    """An element as float32, read here and not before: a kernel that starts early must not move it up."""
    if str(buffer.dtype) == "float16":
        half = Registers(1, "uint16")
        ptx("ld.global.u16", half[0], buffer.ptr_to(index))
        return tir.reinterpret("float16", half[0]).astype("float32")
    single = Registers(1, "float32")
    ptx("ld.global.f32", single[0], buffer.ptr_to(index))
    return single[0]


def silu(value: Expr) -> Expr:
    """Value · sigmoid(value)."""
    return value / (f32(1) + tir.exp(f32(0) - value))
