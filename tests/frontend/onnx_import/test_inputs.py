"""The sizes of inputs, however a file names them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import tirx

from rotquant_tvm.frontend.onnx_import.size_names import parse_size

from .onnx_cases import Graph, imported


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("past + seq", lambda past, seq: past + seq),
        ("past_seq", None),
        ("2*past - seq // 3", lambda past, seq: 2 * past - tirx.floordiv(seq, 3)),
        ("Max(past, seq)", lambda past, seq: tirx.max(past, seq)),
        ("7", lambda past, seq: 7),
        ("past.0 size?", None),
        ("__import__('os')", None),
        ("(" * 300 + "past" + ")" * 300, None),
        ("1" * 100, None),
        ("past + 9**9", None),
    ],
)
def test_names_are_expressions_or_one_variable(text, meaning):
    past, seq = tirx.Var("past", "int64"), tirx.Var("seq", "int64")
    variables = {"past": past, "seq": seq}
    size = parse_size(text, variables)
    if meaning is None:
        assert isinstance(size, tirx.Var) and size is parse_size(text, variables)
        assert not any(size.same_as(known) for known in (past, seq))
    else:
        expected = meaning(past, seq)
        assert size == expected if isinstance(expected, int) else tvm.sym.Analyzer().can_prove_equal(size, expected)


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"attention_mask": ["batch", "total"]},
        {"attention_mask": ["batch", "past + seq"], "past.1": ["b1", 2, "past_1", 4]},
        {"attention_mask": ["", ""], "position_ids": ["b2", "s2"], "past.0": ["", 2, "p", 4], "past.1": ["", 2, "", 4]},
        {"attention_mask": ["m", 1, "ms", "mt"]},
    ],
)
def test_sizes_that_mean_the_same_become_one(names, tmp_path):
    """Batch, new tokens and past are the same in every input, and the mask has both."""
    shapes = {
        "input_ids": ["batch", "seq"],
        "attention_mask": ["batch", "past + seq"],
        "position_ids": ["batch", "seq"],
        "past.0": ["batch", 2, "past", 4],
        "past.1": ["batch", 2, "past", 4],
    } | names
    graph = Graph()
    for name, shape in shapes.items():
        dtype = np.float32 if name.startswith("past") or len(shape) == 4 else np.int64
        graph.input(name, np.zeros([1] * len(shape), dtype), [size or None for size in shape])
    graph.output(graph.node("Identity", ["input_ids"]), np.int64)
    params = dict(zip(shapes, imported(graph.model(), tmp_path).mod["main"].params, strict=True))
    sizes = {name: list(param.ty.shape.values) for name, param in params.items()}
    batch, seq = sizes["input_ids"]
    past, equal = sizes["past.0"][2], tvm.sym.Analyzer().can_prove_equal
    assert all(equal(each[0], batch) for each in sizes.values())
    assert equal(sizes["past.1"][2], past) and equal(sizes["position_ids"][1], seq)
    assert equal(sizes["attention_mask"][-1], past + seq) and not equal(past, seq)
