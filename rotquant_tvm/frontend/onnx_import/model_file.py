"""Reading an ONNX file: the protobuf without its external data, checked before anything is converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.error_text import first_line
from rotquant_tvm.frontend.onnx_import.external_data import ExternalData
from rotquant_tvm.frontend.onnx_import.graph_order import check_names, in_order, inner_graphs
from rotquant_tvm.frontend.onnx_import.local_functions import inline_functions
from rotquant_tvm.frontend.onnx_import.tensors import read_tensor
from rotquant_tvm.frontend.onnx_import.texts import check_texts

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 2**31 - 1
"""What a protobuf may have; larger models keep their weights in a file beside it."""


@dataclass(frozen=True)
class OnnxFile:
    """A read ONNX file.

    Attributes: ``source`` (its name, for messages), ``path``, ``model`` (the protobuf, its nodes in order),
    ``opsets`` (the version imported of each domain) and ``external``, the data files beside it.
    """

    source: str
    path: Path
    model: onnx.ModelProto
    opsets: dict[str, int]
    external: ExternalData

    @property
    def graph(self) -> onnx.GraphProto:
        """The main graph."""
        return self.model.graph

    @property
    def graph_inputs(self) -> list[onnx.ValueInfoProto]:
        """The graph's inputs without those that initializers give a value."""
        given = {tensor.name for tensor in self.graph.initializer}
        return [value for value in self.graph.input if value.name not in given]

    def domain(self, name: str) -> str:
        """A domain's name in the registry: ONNX's own has two spellings."""
        return "" if name == "ai.onnx" else name

    def opset(self, name: str) -> int:
        """The version of a domain that the file imports; 1 for one that it uses without importing it."""
        return self.opsets.get(self.domain(name), 1)

    def array(self, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
        """The values of a tensor of the file, as ``read_tensor``."""
        try:
            return read_tensor(tensor, self.external)
        except ModelError as error:
            raise ModelError(f"{self.source}: {error}") from error


def read_file(path: Path) -> OnnxFile:
    """Read and check a file; weights are read when they are asked for.

    Raises ModelError if the file is no ONNX model, damaged, without outputs, or has a cycle, names that are not UTF-8,
    names given twice or names that nothing gives.
    """
    model = _parse(path)
    source = path.name
    if not model.HasField("graph") or not model.graph.output or not model.ir_version:
        raise ModelError(f"{path} is not an ONNX model, or is cut short: it has no graph with outputs")
    try:
        check_texts(model)
        model = inline_functions(model)
        opsets: dict[str, int] = {}
        for entry in model.opset_import:
            opsets["" if entry.domain == "ai.onnx" else entry.domain] = entry.version
        check_names(model.graph)
        in_order(model.graph)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    version, newest = opsets.get("", 1), onnx.defs.onnx_opset_version()
    if not 0 < version <= newest:
        raise ModelError(
            f"{source} imports version {version} of ONNX's operators; the installed package onnx knows 1 to {newest}"
        )
    return OnnxFile(source, path, model, opsets, ExternalData(path))


def data_files(path: Path) -> list[Path]:
    """The data files that an ONNX file's tensors name, there or not. Raises ModelError for one outside its folder."""
    model, external = _parse(path), ExternalData(path)
    nodes = [node for function in model.functions for node in function.node]
    stored = [tensor for tensor in [*_tensors(model.graph), *_constants(nodes)] if tensor.external_data]
    locations = {
        (tensor.name, entry.value) for tensor in stored for entry in tensor.external_data if entry.key == "location"
    }
    return sorted({external.path(name, location) for name, location in locations})


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph and of the graphs in its nodes' attributes."""
    yield from graph.initializer
    yield from _constants(graph.node)


def _constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in inner_graphs(node):
            yield from _tensors(inner)


def _parse(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if not size:
            raise ModelError(f"{path} is empty")
        if size > MAX_BYTES:
            raise ModelError(
                f"{path} has {size} bytes, more than a protobuf may have; save the model with external data"
            )
        model = onnx.ModelProto()
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model, or is damaged: {first_line(error)}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    return model


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs in its nodes' attributes."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from all_nodes(inner)
