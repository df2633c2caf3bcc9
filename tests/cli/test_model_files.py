"""The quick checks of a model's files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rotquant_tvm.cli.model_files import check_model
from rotquant_tvm.errors import ModelError


@pytest.fixture
def model(tmp_path):
    """An ONNX file that is sound but no decoder."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "graph",
        values[:1],
        values[1:],
        [numpy_helper.from_array(np.ones(1, np.float32), "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_an_onnx_file_is_one_whatever_its_name(model):
    assert check_model(str(model), None) == check_model(str(model), "onnx") == model
    other = model.rename(model.with_name("weights"))
    assert check_model(str(other), "onnx") == other


def test_another_format_than_asked_for_is_refused(model):
    with pytest.raises(ModelError, match="is not of the format 'gguf' but 'onnx'; drop --model-format"):
        check_model(str(model), "gguf")


def test_a_damaged_onnx_file_is_refused_before_anything_is_loaded(model):
    model.write_bytes(model.read_bytes()[:-20])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        check_model(str(model), None)
