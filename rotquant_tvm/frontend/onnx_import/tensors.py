"""ONNX tensors as NumPy arrays, checked against their declared shape before anything is allocated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np
import onnx
from onnx import TensorProto

from rotquant_tvm.errors import ModelError

if TYPE_CHECKING:
    from rotquant_tvm.frontend.onnx_import.external_data import ExternalData

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT8: "int8",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64",
    TensorProto.BOOL: "bool",
}
"""Element types that can be imported; strings, complex numbers and types of less than a byte cannot."""

MAX_RANK = 16

_FIELDS = {"float32": "float_data", "float64": "double_data", "int64": "int64_data"}
_FIELDS |= dict.fromkeys(("uint32", "uint64"), "uint64_data")
_AS_BITS = ("float16", "bfloat16")
"""Types whose elements are in ``int32_data`` as bits; all others in it are numbers."""


def dtype_name(element: int) -> str:
    """NumPy's name of an ONNX element type. Raises ModelError for one that cannot be imported."""
    if element in DTYPES:
        return DTYPES[element]
    names: dict[int, str] = {number: name for name, number in TensorProto.DataType.items()}
    raise ModelError(f"elements of type {names.get(element, element)} cannot be imported")


def tensor_shape(tensor: onnx.TensorProto) -> tuple[int, ...]:
    """The declared shape. Raises ModelError if it has negative sizes or too many axes."""
    shape = tuple(tensor.dims)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise ModelError(f"the tensor {tensor.name!r} has the impossible shape {list(shape)[: MAX_RANK + 1]}")
    return shape


def read_tensor(tensor: onnx.TensorProto, external: ExternalData) -> np.ndarray[Any, Any]:
    """The values of a tensor; a view of the mapped file where its data are external.

    Raises ModelError if the data's size is not that of the shape, or the element type cannot be imported.
    """
    shape, dtype = tensor_shape(tensor), np.dtype(_named(tensor))
    elements = math.prod(shape)
    if tensor.data_location == TensorProto.EXTERNAL:
        return external.array(tensor, shape, dtype)
    field = "raw_data" if tensor.HasField("raw_data") else _FIELDS.get(dtype.name, "int32_data")
    data = getattr(tensor, field)
    wanted, unit = (elements * dtype.itemsize, "bytes") if field == "raw_data" else (elements, "elements")
    if len(data) != wanted:
        raise ModelError(
            f"the tensor {tensor.name!r} of shape {list(shape)} needs {wanted} {unit} and has {len(data)}; "
            "the file is damaged"
        )
    if field == "raw_data":
        return np.frombuffer(data, dtype).reshape(shape)
    if dtype.name in _AS_BITS:
        return np.array(data, np.int32).astype(np.uint16).view(dtype).reshape(shape)
    return np.array(data).astype(dtype).reshape(shape)


def _named(tensor: onnx.TensorProto) -> str:
    try:
        return dtype_name(tensor.data_type)
    except ModelError as error:
        raise ModelError(f"the tensor {tensor.name!r}: {error}") from error
