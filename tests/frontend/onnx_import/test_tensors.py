"""Tensors of a file as arrays, from every field that ONNX keeps them in."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from rotquant_tvm.frontend.onnx_import.external_data import ExternalData
from rotquant_tvm.frontend.onnx_import.tensors import DTYPES, read_tensor


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
def test_every_type_is_what_onnx_reads(element, raw, tmp_path):
    dtype = helper.tensor_dtype_to_np_dtype(element)
    numbers = np.array([[0, 1, 3], [7, 100, 2]]).astype(dtype)
    if np.issubdtype(numbers.dtype, np.signedinteger) or dtype.kind in "fV":
        numbers[0, 0] = -5
    vals = numbers.tobytes() if raw else numbers.ravel()
    tensor = helper.make_tensor("w", element, numbers.shape, vals, raw=raw)
    result = read_tensor(tensor, ExternalData(tmp_path / "model.onnx"))
    assert result.dtype == numpy_helper.to_array(tensor).dtype == np.dtype(DTYPES[element])
    np.testing.assert_array_equal(result.astype(np.float64), numbers.astype(np.float64))


def test_scalars_and_empty_tensors(tmp_path):
    external = ExternalData(tmp_path / "model.onnx")
    scalar = read_tensor(numpy_helper.from_array(np.float32(2.5), "s"), external)
    assert scalar.shape == () and scalar == 2.5
    empty = TensorProto(name="e", data_type=TensorProto.FLOAT, dims=[0, 1 << 40])
    assert read_tensor(empty, external).shape == (0, 1 << 40)
