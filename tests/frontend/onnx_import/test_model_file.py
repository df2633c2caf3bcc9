"""Damaged and hostile files: one clear error each, at once and without large allocations."""

from __future__ import annotations

import resource
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.onnx_import import read_onnx
from rotquant_tvm.frontend.onnx_import.model_file import read_file


def tiny(*nodes, initializers=(), inputs=("x",), outputs=("y",), functions=(), shape=("batch", 4)) -> onnx.ModelProto:
    """A model of given nodes; by default y = x + w."""
    if not nodes and not functions:
        nodes = (helper.make_node("Add", ["x", "w"], ["y"], name="sum"),)
        initializers = initializers or (numpy_helper.from_array(np.ones(4, np.float32), "w"),)
    values = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in names] for names in (inputs, outputs)
    ]
    graph = helper.make_graph(list(nodes), "tiny", *values, initializer=list(initializers))
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


@pytest.fixture
def refused(tmp_path):
    """Write a model or bytes, and return the message with which reading it fails within two seconds."""

    def read(model) -> str:
        path = tmp_path / "model.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(ModelError) as error:
            read_onnx(path)
        assert time.process_time() - start < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
        assert "\n" not in str(error.value) and "model.onnx" in str(error.value)
        return str(error.value)

    return read


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs, outputs, name=f"node_{outputs[0]}", **attributes)


def test_files_that_are_no_models(refused):
    assert "is empty" in refused(b"")
    assert "is not an ONNX model" in refused(b"\x08\x07 this is text, not a protobuf")
    assert "is not an ONNX model" in refused(np.random.default_rng(0).bytes(4096))
    assert "has no graph with outputs" in refused(onnx.ModelProto(ir_version=8))


def test_a_version_of_operators_that_does_not_exist(refused):
    for version in (0, -3, 9999):
        model = tiny()
        model.opset_import[0].version = version
        assert f"imports version {version} of ONNX's operators" in refused(model)


def test_every_truncation_of_a_file_is_refused(tmp_path):
    data = tiny().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            read_onnx(path)


def test_names_are_given_once_and_before_they_are_read(refused):
    assert "reads 'nothing', which nothing gives" in refused(tiny(node("Relu", ["nothing"], ["y"])))
    twice = tiny(node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"]))
    assert "the name 'y' is given twice" in refused(twice)
    weight = numpy_helper.from_array(np.ones(4, np.float32), "y")
    assert "the name 'y' is given twice" in refused(tiny(node("Relu", ["x"], ["y"]), initializers=[weight]))
    assert "output 'z' is given by no node" in refused(tiny(node("Relu", ["x"], ["y"]), outputs=("z",)))
    circle = tiny(node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["a"], ["y"]))
    assert "form a cycle" in refused(circle) and "node_a" in refused(circle)


def test_nodes_out_of_order_are_put_in_order(tmp_path):
    model = tiny(node("Neg", ["b"], ["y"]), node("Relu", ["a"], ["b"]), node("Abs", ["x"], ["a"]))
    onnx.save(model, tmp_path / "model.onnx")
    assert [each.op_type for each in read_file(tmp_path / "model.onnx").graph.node] == ["Abs", "Relu", "Neg"]
    assert read_onnx(tmp_path / "model.onnx").outputs == ["y"]


def test_functions_of_the_model_are_unfolded_but_not_without_end(refused, tmp_path):
    def function(name, *nodes):
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
        return helper.make_function("own", name, ["a"], ["b"], list(nodes), imports)

    def call(name, inputs, outputs):
        return helper.make_node(name, inputs, outputs, domain="own", name=f"call_{outputs[0]}")

    good = tiny(call("Twice", ["x"], ["y"]), functions=[function("Twice", helper.make_node("Add", ["a", "a"], ["b"]))])
    onnx.save(good, tmp_path / "good.onnx")
    assert read_onnx(tmp_path / "good.onnx").outputs == ["y"]
    circle = [function("A", call("B", ["a"], ["b"])), function("B", call("A", ["a"], ["b"]))]
    assert "call each other in a circle" in refused(tiny(call("A", ["x"], ["y"]), functions=circle))
    levels = [function("F0", helper.make_node("Relu", ["a"], ["b"]))]
    for level in range(1, 40):
        levels.append(function(f"F{level}", call(f"F{level - 1}", ["a"], ["c"]), call(f"F{level - 1}", ["c"], ["b"])))
    assert "unfold to" in refused(tiny(call("F39", ["x"], ["y"]), functions=levels))


def tensor(dims, data_type=TensorProto.FLOAT, raw=None, **fields):
    result = TensorProto(name="w", data_type=data_type, dims=dims, **fields)
    if raw is not None:
        result.raw_data = raw
    return result


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (tensor([4], raw=b"\0" * 15), "needs 16 bytes and has 15"),
        (tensor([4], float_data=[1, 2, 3]), "needs 4 elements and has 3"),
        (tensor([1 << 40, 1 << 40], raw=b"\0" * 16), "needs 4835703278458516698824704 bytes and has 16"),
        (tensor([-4], raw=b""), "impossible shape"),
        (tensor([1] * 40, raw=b"\0" * 4), "impossible shape"),
        (tensor([4], TensorProto.STRING, string_data=[b"a"] * 4), "elements of type STRING cannot be imported"),
        (tensor([4], 99, raw=b"\0" * 16), "elements of type 99 cannot be imported"),
    ],
)
def test_initializers_that_do_not_fit_their_shape(refused, weight, reason):
    message = refused(tiny(initializers=[weight]))
    assert reason in message and "'w'" in message


def test_absurd_sizes_of_inputs_and_shapes(refused):
    assert "impossible size" in refused(tiny(shape=(1 << 60, 4)))
    assert "has 20 axes" in refused(tiny(shape=(1,) * 20))
    huge = numpy_helper.from_array(np.array([1 << 40, 1 << 20], np.int64), "shape")
    made = tiny(node("ConstantOfShape", ["shape"], ["z"]), node("Relu", ["z"], ["y"]), initializers=[huge])
    assert "absurd shape" in refused(made)
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    grown = tiny(node("Expand", ["one", "shape"], ["y"]), initializers=[huge, one])
    assert "absurd shape" in refused(grown)
    counts = [numpy_helper.from_array(np.array(n, np.int64), name) for name, n in (("a", 0), ("b", 1 << 45), ("c", 1))]
    assert "absurd shape" in refused(tiny(node("Range", ["a", "b", "c"], ["y"]), initializers=counts))


def test_inputs_without_a_shape_or_of_another_kind(refused):
    model = tiny()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert "'x' is no tensor of a known number of axes" in refused(model)
    model.graph.input[0].type.CopyFrom(onnx.TypeProto(sequence_type=onnx.TypeProto.Sequence()))
    assert "'x' is no tensor of a known number of axes" in refused(model)


def test_all_missing_operators_are_named_at_once(refused):
    """Missing domains, versions and attributes, those behind other failures too."""
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="first", domain="own"),
        helper.make_node("Mystery", ["a"], ["b"], name="second", domain="own"),
        helper.make_node("Unheard", ["b"], ["c"], name="third"),
        helper.make_node("RMSNormalization", ["c", "c"], ["d"], name="too_old"),
        helper.make_node("Gelu", ["x"], ["e"], name="odd", approximate="cubic"),
        helper.make_node("Add", ["d", "e"], ["y"], name="fine"),
    ]
    message = refused(tiny(*nodes))
    assert "5 operators" not in message and "4 operators" in message
    for part in (
        "own.Mystery (opset 1): there is no converter for it (nodes 'first', 'second')",
        "Unheard (opset 21): it is not an operator of ONNX (node 'third')",
        "RMSNormalization (opset 21): versions before 23 are not supported; export with a newer opset (node 'too_old')",
        "Gelu (opset 21): approximate='cubic' is not known (node 'odd')",
    ):
        assert part in message
    assert "fine" not in message


def test_a_name_of_another_domain_is_no_standard_operator(refused):
    own = tiny(helper.make_node("Relu", ["x"], ["y"], name="n", domain="own"))
    assert "own.Relu (opset 1): there is no converter" in refused(own)
    assert "FastGelu (opset 21): it is not an operator of ONNX" in refused(tiny(node("FastGelu", ["x"], ["y"])))


@pytest.mark.parametrize("operator", ["ConcatFromSequence", "SequenceAt", "SequenceLength", "SplitToSequence"])
def test_operators_on_lists_of_tensors_are_refused(operator, refused):
    inputs = ["x", "one"] if operator == "SequenceAt" else ["x"]
    one = numpy_helper.from_array(np.array(1, np.int64), "one")
    attributes = {"axis": 0} if operator == "ConcatFromSequence" else {}
    message = refused(tiny(node(operator, inputs, ["y"], **attributes), initializers=[one]))
    assert f"{operator} (opset 21): there is no converter for it" in message


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match=r"needs the package onnx: pip install 'rotquant-tvm\[onnx\]'"):
        read_onnx(tmp_path / "model.onnx")
