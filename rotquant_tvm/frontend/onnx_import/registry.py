"""The table of converters from ONNX operators to Relax, and what a converter is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.onnx_import.known_value import KnownValue

if TYPE_CHECKING:
    import onnx
    from tvm import relax

    from rotquant_tvm.frontend.onnx_import.graph_state import GraphState

STANDARD = ""
"""The domain of ONNX's own operators, which files also spell "ai.onnx"."""


class UnsupportedNode(ModelError):
    """A node that cannot be converted. The importer collects these and names all nodes in one ModelError."""


@dataclass
class OnnxNode:
    """One node of a graph as its converter sees it.

    Attributes: ``domain`` ("" is the standard one), ``op_type``, ``opset`` (the version of the domain that the
    file imports), ``name`` (never empty; made of the first output's name where the file has none);
    ``attributes`` as Python numbers, strings, tuples and NumPy arrays (graphs as GraphProto); ``values``, the
    inputs as the importer has them (None where an optional one is absent), and ``outputs``, the names of the
    outputs ("" where one is not asked for); ``state``, what the nodes of a graph share.
    """

    domain: str
    op_type: str
    opset: int
    name: str
    attributes: dict[str, Any]
    values: list[relax.Expr | KnownValue | None]
    outputs: list[str]
    state: GraphState
    _tensors: dict[int, relax.Expr] = field(default_factory=dict, init=False, repr=False)

    @property
    def inputs(self) -> list[relax.Expr | None]:
        """The inputs as Relax expressions: known numbers as constants, known sizes as computed tensors."""
        return [self.input(index) for index in range(len(self.values))]

    def input(self, index: int) -> relax.Expr | None:
        """One of ``inputs``, or None if it is absent, also past the end of the list."""
        value = self.value(index)
        if value is None:
            return None
        if index not in self._tensors:
            self._tensors[index] = self.state.tensor(value)
        return self._tensors[index]

    def value(self, index: int) -> relax.Expr | KnownValue | None:
        """Input ``index`` as the importer has it, or None if it is absent, also past the end of the list."""
        return self.values[index] if index < len(self.values) else None

    def known(self, index: int) -> KnownValue | None:
        """Input ``index`` if its elements are known at import, else None."""
        value = self.value(index)
        return value if isinstance(value, KnownValue) else None

    def wants(self, index: int) -> bool:
        """Whether the graph asks for output ``index``."""
        return index < len(self.outputs) and bool(self.outputs[index])

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression in the function; returns its variable. Raises UnsupportedNode if its type is wrong."""
        return self.state.emit(expr)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the node, or ``default``."""
        return self.attributes.get(name, default)

    def convert_graph(self, graph: onnx.GraphProto) -> list[relax.Expr | KnownValue]:
        """Convert a subgraph of an attribute in place, seeing this graph's values; returns its outputs."""
        return self.state.convert_graph(graph)


Converter = Callable[[OnnxNode], Any]
_CONVERTERS: dict[tuple[str, str], dict[int, Converter]] = {}


def onnx_converter(domain: str, op_type: str, since: int = 1) -> Callable[[Converter], Converter]:
    """Register a converter for an operator from version ``since`` of its domain on.

    The function takes an OnnxNode and returns a Relax expression, a KnownValue, or a tuple of these with one
    entry per output (None for one that it cannot give). It raises UnsupportedNode with the reason if it cannot
    convert the node; the node's name and operator are added by the importer.
    """

    def register(converter: Converter) -> Converter:
        versions = _CONVERTERS.setdefault((domain, op_type), {})
        if since in versions:
            raise ValueError(f"{domain}.{op_type} has two converters since version {since}")
        versions[since] = converter
        return converter

    return register


def find_converter(domain: str, op_type: str, opset: int) -> Converter | None:
    """Our converter of an operator's version, or None."""
    versions = _CONVERTERS.get((domain, op_type), {})
    usable = [since for since in versions if since <= opset]
    return versions[max(usable)] if usable else None


def oldest_version(domain: str, op_type: str) -> int | None:
    """The first version of an operator that our converters know, or None without any."""
    return min(_CONVERTERS.get((domain, op_type), {}), default=None)
