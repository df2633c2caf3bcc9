"""ONNX models made node by node, and what onnxruntime computes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from rotquant_tvm.frontend.onnx_import.importer import import_file
from rotquant_tvm.frontend.onnx_import.model_file import read_file


@dataclass
class Graph:
    """A graph under construction; ``dims`` maps a size to the name that it gets in the inputs' shapes."""

    opset: int = 21
    dims: dict[int, str] = field(default_factory=dict)
    nodes: list = field(default_factory=list)
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    feed: dict[str, np.ndarray] = field(default_factory=dict)
    initializers: list = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def input(self, name: str, array: np.ndarray, shape: list | None = None) -> str:
        """An input, its value for onnxruntime, and its declared shape (default: ``dims`` in place of sizes)."""
        shape = [self.dims.get(size, size) for size in array.shape] if shape is None else shape
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.inputs[name] = helper.make_tensor_value_info(name, element, shape)
        self.feed[name] = array
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """An initializer."""
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, op_type: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **attributes):
        """Add a node; returns its output's name, or their names."""
        name = f"{op_type}_{len(self.nodes)}"
        names = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = [each or "" for each in inputs]
        self.nodes.append(helper.make_node(op_type, given, names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def contrib(self, op_type: str, inputs: list[str | None], outputs: int | list[str] = 1, **attributes):
        """Add a node of com.microsoft."""
        return self.node(op_type, inputs, outputs, "com.microsoft", **attributes)

    def output(self, name: str, dtype=np.float32, shape: list | None = None) -> None:
        """Return a value."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.outputs.append(helper.make_tensor_value_info(name, element, shape))

    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        graph = helper.make_graph(
            self.nodes, "graph", list(self.inputs.values()), self.outputs, initializer=self.initializers
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Onnxruntime on one thread of the CPU, without its own rewriting."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def reference(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs that onnxruntime computes, by name."""
    runtime = session(model)
    wanted = {value.name for value in runtime.get_inputs()}
    outputs = runtime.run(None, {name: array for name, array in feed.items() if name in wanted})
    return {value.name: out for value, out in zip(runtime.get_outputs(), outputs, strict=True)}


def imported(model: onnx.ModelProto, folder, name: str = "model.onnx"):
    """The StepGraph of a model, through a file."""
    path = folder / name
    onnx.save(model, path)
    return import_file(read_file(path))


def normal(rng: np.random.Generator, *shape: int, dtype=np.float32) -> np.ndarray:
    """Standard normal numbers."""
    return rng.standard_normal(shape).astype(dtype)
