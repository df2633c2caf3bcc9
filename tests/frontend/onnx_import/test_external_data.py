"""Weights in files beside the model: mapped, and only from the model's folder."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.onnx_import import read_onnx

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def write(folder, location="weights.bin", *, offset=None, length=None, shape=(4, 3), dtype=TensorProto.FLOAT):
    """A model y = x @ w whose w is in a data file; returns its path."""
    weight = TensorProto(name="w", data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            weight.external_data.add(key=key, value=str(value))
    element = TensorProto.FLOAT if dtype == TensorProto.FLOAT else dtype
    values = [helper.make_tensor_value_info(n, element, ["n", size]) for n, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", *[[v] for v in values], [weight])
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(onnx_model.SerializeToString())
    return path


def refused(path) -> str:
    with pytest.raises(ModelError) as error:
        read_onnx(path)
    return str(error.value)


def test_weights_are_views_of_the_mapped_file(tmp_path):
    path = write(tmp_path, "weights.bin", offset=64, length=48)
    (tmp_path / "weights.bin").write_bytes(b"\xff" * 64 + WEIGHT.tobytes())
    graph = read_onnx(path)
    (weight,) = graph.weights
    np.testing.assert_array_equal(weight, WEIGHT)
    assert graph.weight_names == ["w"] and not weight.flags.owndata and not weight.flags.writeable


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_narrow_weights_keep_their_dtype(dtype, tmp_path):
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    (tmp_path / "weights.bin").write_bytes(b"\0" + WEIGHT.astype(numpy_dtype).tobytes())
    (weight,) = read_onnx(write(tmp_path, offset=1, dtype=dtype)).weights  # at an odd byte: copied, as TVM needs it
    assert weight.dtype == numpy_dtype and (weight.astype(np.float32) == WEIGHT).all()


def test_a_model_of_more_than_two_gigabytes_is_mapped(tmp_path):
    """The data file is sparse: it has its size but takes no room, and none of it is read."""
    rows = (5 << 30) // 2 // 12 * 3
    path = write(tmp_path, shape=(4, rows))
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = rows
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(16 * rows)
    (weight,) = read_onnx(path).weights
    assert weight.nbytes > 2**31 and weight.shape == (4, rows)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "a/../../secret.bin", "/etc/hostname", "..\\secret.bin", "C:\\secret.bin", "", "a\0b"]
)
def test_data_outside_the_models_folder_are_refused(location, tmp_path):
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    assert "outside the model's folder" in refused(write(tmp_path / "model", location))


def test_links_out_of_the_folder_are_refused_and_links_of_the_model_itself_followed(tmp_path):
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    path = write(tmp_path / "model")
    os.symlink(tmp_path / "secret.bin", tmp_path / "model" / "weights.bin")
    assert "outside the model's folder" in refused(path)
    # A download cache: both files are links to one folder.
    cache, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    real = write(cache, "weights.bin")
    (cache / "data").write_bytes(WEIGHT.tobytes())
    snapshot.mkdir()
    os.symlink(real, snapshot / "model.onnx")
    os.symlink(cache / "data", snapshot / "weights.bin")
    np.testing.assert_array_equal(read_onnx(snapshot / "model.onnx").weights[0], WEIGHT)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": 4}, "is too short"),
        ({"offset": 1 << 62}, "is too short"),
        ({"length": 40}, "needs 48 bytes, and its external data has 40"),
        ({"offset": -4}, "the file is damaged"),
        ({"offset": "many"}, "is no number"),
        ({"shape": (1 << 20, 1 << 20)}, "is too short"),
        ({"location": "other.bin"}, "which does not exist"),
        ({"location": "."}, "which does not exist"),
    ],
)
def test_data_that_are_missing_or_short(entries, reason, tmp_path):
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    assert reason in refused(write(tmp_path, **entries))
