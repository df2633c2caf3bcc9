"""Standard operators against onnxruntime, many in one graph: compiling is what takes time."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from rotquant_tvm.errors import ModelError

from .onnx_cases import Graph, imported, normal
from .step_runner import check

DIMS = {2: "batch", 5: "seq"}


def floats(graph: Graph, name: str = "x", shape=(2, 5, 4)) -> str:
    return graph.input(name, normal(np.random.default_rng(len(name)), *shape))


def returned(graph: Graph, *names: str, dtype=np.float32) -> None:
    """Return values; an Identity gives each a node's own name."""
    for name in names:
        graph.output(graph.node("Identity", [name]), dtype)


def test_arithmetic(tmp_path):
    graph = Graph(21, dims=DIMS)
    x, y = floats(graph), floats(graph, "yy", (5, 4))
    one, two = graph.weight("low", np.float32(-0.5)), graph.weight("high", np.float32(0.75))
    positive = graph.node("Add", [graph.node("Mul", [x, x]), two])
    for name in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum"):
        returned(graph, graph.node(name, [x, y]))
    for name in (
        "Neg",
        "Abs",
        "Exp",
        "Sin",
        "Cos",
        "Tanh",
        "Sigmoid",
        "Erf",
        "Floor",
        "Ceil",
        "Sign",
        "Relu",
        "Softplus",
    ):
        returned(graph, graph.node(name, [x]))
    for name in ("Sqrt", "Log", "Reciprocal"):
        returned(graph, graph.node(name, [positive]))
    returned(graph, graph.node("Pow", [positive, one]), graph.node("Mod", [x, two], fmod=1))
    returned(graph, graph.node("Pow", [x, graph.weight("three", np.array(3, np.int64))]))
    returned(graph, graph.node("Clip", [x, one, two]), graph.node("Clip", [x, None, two]))
    returned(graph, graph.node("Gelu", [x]), graph.node("Gelu", [x], approximate="tanh"))
    returned(graph, graph.node("Softmax", [x], axis=1), graph.node("LogSoftmax", [x]))
    check(graph, tmp_path)


def test_integers_and_booleans(tmp_path):
    """Division is towards zero, remainders have the divisor's sign, casts of floats cut off."""
    graph = Graph(21, dims=DIMS)
    x = floats(graph)
    tens = graph.node("Mul", [x, graph.weight("ten", np.float32(10))])
    whole = graph.node("Cast", [tens], to=TensorProto.INT64)
    other = graph.input("other", np.array([3, -4, 7, -1], np.int64))
    for name in ("Div", "Mod", "Add", "Sub", "Mul", "Max"):
        returned(graph, graph.node(name, [whole, other]), dtype=np.int64)
    returned(graph, graph.node("Mod", [whole, other], fmod=1), graph.node("CastLike", [tens, other]), dtype=np.int64)
    truth = graph.node("Cast", [whole], to=TensorProto.BOOL)
    less, equal = graph.node("Less", [whole, other]), graph.node("Equal", [whole, other])
    for name in ("And", "Or", "Xor"):
        returned(graph, graph.node(name, [less, truth]), dtype=bool)
    returned(graph, graph.node("Not", [less]), equal, graph.node("GreaterOrEqual", [whole, other]), dtype=bool)
    returned(graph, graph.node("Where", [less, x, tens]), graph.node("Cast", [truth], to=TensorProto.FLOAT))
    axis = graph.weight("axis", np.array(1, np.int64))
    returned(
        graph,
        graph.node("CumSum", [whole, axis]),
        graph.node("CumSum", [whole, axis], reverse=1, exclusive=1),
        dtype=np.int64,
    )
    check(graph, tmp_path)


def test_products_and_reductions(tmp_path):
    graph = Graph(21, dims=DIMS)
    x, wide = floats(graph), floats(graph, "wide", (2, 3, 5, 4))
    rng = np.random.default_rng(1)
    weight, bias = graph.weight("weight", normal(rng, 4, 6)), graph.weight("bias", normal(rng, 6))
    turned = graph.weight("turned", normal(rng, 6, 4))
    returned(graph, graph.node("MatMul", [x, weight]), graph.node("MatMul", [wide, weight]))
    flat = graph.node("Flatten", [x], axis=2)
    returned(graph, flat, graph.node("Gemm", [flat, turned, bias], transB=1, alpha=0.5, beta=2.0))
    returned(graph, graph.node("Gemm", [flat, weight]))
    axes = graph.weight("axes", np.array([1, -1], np.int64))
    for name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare"):
        returned(graph, graph.node(name, [wide, axes], keepdims=0))
    returned(graph, graph.node("ReduceMean", [x]), graph.node("ReduceSum", [x], noop_with_empty_axes=1))
    values, indices = graph.node("TopK", [x, graph.weight("count", np.array([3], np.int64))], 2)
    returned(graph, values)
    returned(graph, indices, dtype=np.int64)
    returned(graph, graph.node("Einsum", [x, x], equation="bsd,btd->bst"))
    check(graph, tmp_path)


def test_parts_of_tensors(tmp_path):
    """Negative indices and bounds count from the end; bounds behind the end are the end."""
    graph = Graph(21, dims=DIMS)
    x, narrow = floats(graph), floats(graph, "narrow", (2, 5))

    def integers(*values):
        return graph.weight(f"i{len(graph.initializers)}", np.array(values, np.int64))

    for start, end, axis, step in (
        (1, 3, 1, 1),
        (-3, 9**15, 1, 1),
        (0, -1, 2, 2),
        (1, 100, 2, 1),
        (-1, -(9**15), 1, -1),
    ):
        returned(graph, graph.node("Slice", [x, *map(integers, (start, end, axis, step))]))
    returned(graph, graph.node("Gather", [x, integers(-1, 0)], axis=1), graph.node("Gather", [x, integers(2)], axis=2))
    returned(graph, graph.node("Gather", [x, graph.weight("last", np.array(-1, np.int64))], axis=1))
    graph.input("input_ids", np.zeros((2, 5), np.int64))  # else rows would be taken for them, which are not negative
    rows = graph.input("rows", np.array([[1, -2, 0], [4, 4, -5]], np.int64))
    returned(graph, graph.node("Gather", [graph.weight("table", normal(np.random.default_rng(2), 5, 3)), rows]))
    returned(
        graph,
        graph.node("GatherElements", [narrow, rows], axis=1),
        graph.node("GatherND", [x, graph.weight("nd", np.array([[0, 1], [1, 2]], np.int64))]),
    )
    # One column: rows, as torch's exporter writes table[rows].
    columns = graph.node("Unsqueeze", [rows, integers(-1)])
    returned(
        graph,
        graph.node("GatherND", ["table", columns]),
        graph.node("GatherND", ["table", graph.weight("one", np.array([[1], [-1]], np.int64))]),
    )
    returned(
        graph, graph.node("ScatterElements", [narrow, rows, floats(graph, "new", (2, 3))], axis=1, reduction="add")
    )
    returned(
        graph,
        graph.node("ScatterND", [x, graph.weight("at", np.array([[1, 2]], np.int64)), floats(graph, "r", (1, 4))]),
    )
    returned(
        graph, *graph.node("Split", [x, integers(1, 3)], 2, axis=2), *graph.node("Split", [x], 2, axis=2, num_outputs=2)
    )
    returned(graph, graph.node("Concat", [x, x], axis=-2), graph.node("Transpose", [x], perm=[1, 2, 0]))
    returned(
        graph, graph.node("Trilu", [x, graph.weight("k", np.array(1, np.int64))]), graph.node("Trilu", [x], upper=0)
    )
    returned(graph, graph.node("Tile", [x, integers(1, 1, 3)]))
    check(graph, tmp_path)


def test_reshapes_by_shapes_that_the_graph_computes(tmp_path):
    """Two inputs sizes; every shape below is arithmetic on ``Shape`` of an input."""
    graph = Graph(21, dims=DIMS)
    x = floats(graph, "x", (2, 5, 12))

    def integers(*values):
        return graph.weight(f"i{len(graph.initializers)}", np.array(values, np.int64))

    shape = graph.node("Shape", [x])
    batch, seq = graph.node("Shape", [x], start=0, end=1), graph.node("Shape", [x], start=-2, end=-1)
    width = graph.node("Gather", [shape, graph.weight("two", np.array(2, np.int64))])
    heads = graph.node(
        "Unsqueeze", [graph.node("Div", [width, graph.weight("four", np.array(4, np.int64))]), integers(0)]
    )
    returned(graph, graph.node("Reshape", [x, graph.node("Concat", [batch, seq, heads, integers(-1)], axis=0)]))
    both = graph.node("Mul", [batch, seq])
    returned(graph, graph.node("Reshape", [x, graph.node("Concat", [both, integers(12)], axis=0)]))
    returned(graph, graph.node("Reshape", [x, integers(0, 0, 3, -1)]), graph.node("Reshape", [x, integers(-1, 6)]))
    wide = graph.node("Unsqueeze", [x, integers(1, -1)])
    returned(graph, wide, graph.node("Squeeze", [wide, integers(1, 4)]))
    target = graph.node("Concat", [batch, integers(3), seq, integers(1, 1)], axis=0)
    returned(graph, graph.node("Expand", [wide, target]))
    ones = graph.node("ConstantOfShape", [graph.node("Shape", [target])], value=_one())
    minus = graph.node("Equal", [target, graph.node("Mul", [ones, integers(-1)])])
    returned(graph, graph.node("Expand", [wide, graph.node("Where", [minus, ones, target])]))
    zero, step = graph.weight("zero", np.array(0, np.int64)), graph.weight("step", np.array(1, np.int64))
    total = graph.node("Add", [graph.node("Squeeze", [seq, integers(0)]), graph.node("Squeeze", [batch, integers(0)])])
    returned(graph, graph.node("Range", [zero, total, step]), graph.node("Size", [x]), shape, dtype=np.int64)
    returned(
        graph,
        graph.node("ConstantOfShape", [graph.node("Concat", [both, batch], axis=0)], value=_one()),
        dtype=np.int64,
    )
    start = graph.node("Sub", [seq, integers(2)])
    returned(graph, graph.node("Slice", [x, graph.node("Max", [start, integers(0)]), seq, integers(1)]))
    squared = graph.node("Cast", [graph.node("Mul", [total, total])], to=TensorProto.FLOAT)
    returned(graph, graph.node("Mul", [x, squared]))
    replaced = graph.node("ScatterND", [shape, graph.weight("at", np.array([[2]], np.int64)), integers(6)])
    half = graph.node("Slice", [x, integers(0), integers(6), integers(2)])
    returned(graph, graph.node("Reshape", [half, replaced]))
    returned(graph, graph.node("ReduceProd", [shape], keepdims=0), dtype=np.int64)
    feeds = [{"x": normal(np.random.default_rng(3), batch, seq, 12)} for batch, seq in ((2, 5), (1, 1), (3, 7))]
    step_graph = check(graph, tmp_path, feeds=feeds)
    assert not step_graph.weights  # shapes are known, not computed by the model


def _one():
    from onnx import helper

    return helper.make_tensor("value", TensorProto.INT64, [1], [1])


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "reason"),
    [
        ("Reshape", ["x", "runtime"], {}, "shape depends on the model's data"),
        ("Expand", ["x", "runtime"], {}, "shape depends on the model's data"),
        ("Slice", ["x", "runtime", "runtime"], {}, "start depends on the model's data"),
        ("NonZero", ["x"], {}, "shape of its result depends"),
        ("Softmax", ["x"], {"axis": 1, "opset": 11}, "axis 1 is not the last"),
        ("TensorScatter", ["x", "x"], {"mode": "circular", "opset": 24}, "mode='circular'"),
        ("NoSuchOperator", ["x"], {}, "it is not an operator of ONNX"),
        ("Dropout", ["x", None, "truth"], {"opset": 13}, "training_mode"),
    ],
)
def test_what_cannot_be_converted_says_why(op_type, inputs, attributes, reason, tmp_path):
    graph = Graph(attributes.pop("opset", 21), dims=DIMS)
    floats(graph)
    graph.input("runtime", np.array([2, 5, 4], np.int64))
    graph.weight("truth", np.array(True))
    graph.output(graph.node(op_type, inputs, **attributes))
    with pytest.raises(ModelError, match=reason):
        imported(graph.model(), tmp_path)
