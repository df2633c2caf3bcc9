"""If: branches on constants, on the input that switches a cache on, and on anything else."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from rotquant_tvm.errors import ModelError

from .onnx_cases import Graph, imported, reference
from .step_runner import StepRunner

FLOAT = helper.make_tensor_value_info


def branch(name: str, nodes: list, output: str, weights: dict[str, float] | None = None):
    """A subgraph of one output."""
    initializers = [helper.make_tensor(key, TensorProto.FLOAT, [2], [x, 2 * x]) for key, x in (weights or {}).items()]
    return helper.make_graph(nodes, name, [], [FLOAT(output, TensorProto.FLOAT, None)], initializer=initializers)


def choice(graph: Graph, condition: str, yes, no) -> str:
    """An If with two branches."""
    return graph.node("If", [condition], then_branch=yes, else_branch=no)


def times(name: str, factor: float, x: str = "x"):
    """A branch: x times a weight of its own, which has the same name in every branch."""
    return branch(name, [helper.make_node("Mul", [x, "factor"], ["out"], name=name)], "out", {"factor": factor})


def start() -> Graph:
    """A graph with an input x [rows, 2]."""
    graph = Graph()
    graph.input("x", np.arange(6, dtype=np.float32).reshape(3, 2), ["rows", 2])
    return graph


def run(graph: Graph, folder) -> np.ndarray:
    """The one output, once it is onnxruntime's."""
    model = graph.model()
    (expected,) = reference(model, graph.feed).values()
    (result,) = StepRunner(imported(model, folder))(graph.feed).values()
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    return result


def test_constant_and_nested_conditions(tmp_path):
    graph = start()
    yes, no = (graph.weight(name, np.array([value])) for name, value in (("yes", True), ("no", False)))
    branches = {"then_branch": times("a", 3), "else_branch": times("b", 5)}
    inner = helper.make_node("If", ["turned"], ["chosen"], name="inner", **branches)
    turned = helper.make_node("Not", ["yes"], ["turned"], name="turned")
    total = helper.make_node("Add", ["chosen", "x"], ["sum"], name="sum")
    nested = choice(graph, yes, branch("nested", [turned, inner, total], "sum"), times("c", 7))
    other = choice(graph, no, times("d", 11), times("e", 13))
    graph.output(graph.node("Add", [nested, other]), np.float32, ["rows", 2])
    result = run(graph, tmp_path)
    np.testing.assert_allclose(result, graph.feed["x"] * (np.array([6, 11]) + np.array([13, 26])))


def test_a_condition_on_a_fixed_size(tmp_path):
    """As torch's exporter of traces writes ``squeeze``."""
    graph = start()
    width = graph.node("Gather", [graph.node("Shape", ["x"]), graph.weight("one", np.array(1))])
    condition = graph.node("Equal", [width, graph.weight("two", np.array(2))])
    graph.output(choice(graph, condition, times("a", 3), times("b", 5)), np.float32, ["rows", 2])
    assert run(graph, tmp_path)[1, 0] == 6


def switched(condition, yes, no) -> Graph:
    """A graph with a past, and an If on what ``condition`` makes of the switch."""
    graph = start()
    graph.input("use_cache_branch", np.array([True]), [1])
    graph.input("past", np.ones((1, 1, 1, 2), np.float32), ["batch", 1, "past", 2])
    graph.output(choice(graph, condition(graph), yes, no), np.float32, None)
    return graph


def reads_past(name: str):
    """A branch that reads the past."""
    return branch(name, [helper.make_node("Neg", ["past"], ["negated"], name=name)], "negated")


@pytest.mark.parametrize("form", ["plain", "squeezed"])
def test_the_cached_branch_is_chosen_and_told(tmp_path, form):
    def condition(graph):
        return "use_cache_branch" if form == "plain" else graph.node("Squeeze", ["use_cache_branch"])

    graph = switched(condition, reads_past("cached"), times("other", 3))
    step = imported(graph.model(), tmp_path)
    (result,) = StepRunner(step)(graph.feed).values()
    np.testing.assert_allclose(result, -np.ones((1, 1, 1, 2)))
    assert step.config["notes"] == [
        "of the two decoders in one file, the one with a cache was taken (use_cache_branch = true)"
    ]


REFUSED = {
    "reads no past": lambda: switched(lambda graph: "use_cache_branch", times("a", 2), reads_past("b")),
    "known only when the model runs": lambda: switched(
        lambda graph: graph.node("Not", ["use_cache_branch"]), times("a", 2), reads_past("b")
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_conditions_are_refused(tmp_path, reason):
    with pytest.raises(ModelError, match=f"model.onnx.*If .opset 21.*{reason}"):
        imported(REFUSED[reason]().model(), tmp_path)


def test_a_condition_on_data_is_refused(tmp_path):
    graph = start()
    largest = graph.node("ReduceMax", ["x"], keepdims=0)
    condition = graph.node("Greater", [largest, graph.weight("zero", np.array(0, np.float32))])
    graph.output(choice(graph, condition, times("a", 3), times("b", 5)), np.float32, ["rows", 2])
    with pytest.raises(ModelError, match=r"known only when the model runs.*'If_"):
        imported(graph.model(), tmp_path)


def test_what_a_chosen_branch_cannot_do_is_told_once(tmp_path):
    graph = start()
    graph.weight("yes", np.array(True))
    odd = helper.make_node("Oddity", ["x"], ["odd"], name="odd one", domain="com.microsoft")
    graph.output(choice(graph, "yes", branch("a", [odd], "odd"), times("b", 5)), np.float32, ["rows", 2])
    with pytest.raises(ModelError) as caught:
        imported(graph.model(), tmp_path)
    assert str(caught.value).count("odd one") == 1 and "If" not in str(caught.value)


@pytest.mark.parametrize("op_type", ["Loop", "Scan"])
def test_loops_are_refused_by_name(tmp_path, op_type):
    graph = start()
    attributes = {"num_scan_inputs": 1} if op_type == "Scan" else {}
    graph.output(graph.node(op_type, ["x"], body=times("body", 3), **attributes))
    with pytest.raises(ModelError, match=f"{op_type} .opset 21.*one step of the decoder without loops.*{op_type}_0"):
        imported(graph.model(), tmp_path)
