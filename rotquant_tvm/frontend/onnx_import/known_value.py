"""Tensors whose elements are known at import: numbers, and integers that are expressions in the dynamic sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np
import tvm
from tvm import relax, tirx

MAX_ELEMENTS = 1 << 16
"""Larger results are left to the compiled model; a hostile graph must not make us allocate them."""


@dataclass(frozen=True)
class KnownValue:
    """A tensor known at import.

    Attributes: ``array`` (any rank; of the tensor's own dtype, or of dtype object where an element is a TIR
    expression, in which the others are Python integers) and ``dtype``, the tensor's element type.
    """

    array: np.ndarray[Any, Any]
    dtype: str

    @classmethod
    def of(cls, array: Any, dtype: str | None = None) -> KnownValue:
        """Wrap numbers or expressions; an object array whose expressions are all numbers becomes a plain one."""
        array = np.asarray(array)
        if array.dtype != object:
            return cls(array if dtype is None else array.astype(dtype), dtype or array.dtype.name)
        assert dtype is not None
        flat = [number(element) for element in array.ravel()]
        if all(isinstance(element, int) for element in flat):
            return cls(np.array(flat, dtype).reshape(array.shape), dtype)
        return cls(object_array(flat).reshape(array.shape), dtype)

    @property
    def is_number(self) -> bool:
        """Whether every element is a number."""
        return bool(self.array.dtype != object)

    def elements(self) -> list[Any]:
        """The elements in row-major order, as Python numbers and TIR expressions."""
        return list(self.objects().ravel())

    def objects(self) -> np.ndarray[Any, Any]:
        """The elements as an array of Python objects."""
        return self.array if self.array.dtype == object else self.array.astype(object)


def object_array(elements: list[Any]) -> np.ndarray[Any, Any]:
    """A vector of objects; NumPy's own constructor would look into expressions."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def number(value: Any) -> Any:
    """Return a Python int for an integer of any kind, and an expression as it is."""
    if isinstance(value, tirx.IntImm):
        return int(value)
    return value if isinstance(value, tvm.ir.Expr) else int(value)


def shape_of(value: relax.Expr) -> list[Any] | None:
    """The dimensions of a tensor, as Python ints and TIR expressions; None if they are not known."""
    shape = getattr(value.ty, "shape", None)
    return [number(size) for size in shape.values] if isinstance(shape, relax.ShapeExpr) else None
