"""From a read ONNX file to a StepGraph: parameters, weights, and the nodes one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.error_text import first_line
from rotquant_tvm.frontend.onnx_import import known_layout  # noqa: F401  (registers its operators)
from rotquant_tvm.frontend.onnx_import.attributes import read_attributes
from rotquant_tvm.frontend.onnx_import.converters import converter_of
from rotquant_tvm.frontend.onnx_import.graph_order import inner_graphs
from rotquant_tvm.frontend.onnx_import.graph_state import GraphState
from rotquant_tvm.frontend.onnx_import.inputs import declare_inputs
from rotquant_tvm.frontend.onnx_import.known_operators import fold
from rotquant_tvm.frontend.onnx_import.known_value import KnownValue
from rotquant_tvm.frontend.onnx_import.missing import Failure, describe_failures
from rotquant_tvm.frontend.onnx_import.position_limits import max_position
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode
from rotquant_tvm.frontend.onnx_import.schema_check import check_results
from rotquant_tvm.frontend.onnx_import.shared_buffers import open_shared_buffers
from rotquant_tvm.frontend.repeated_heads import without_repeated_heads
from rotquant_tvm.frontend.step_graph import SOFTCAPS, StepGraph

if TYPE_CHECKING:
    import onnx

    from rotquant_tvm.frontend.onnx_import.model_file import OnnxFile

_FAILED = object()
"""The value of an output whose node could not be converted."""


def import_file(file: OnnxFile) -> StepGraph:
    """Convert a file's graph.

    Raises ModelError naming every node whose operator, version or attributes cannot be converted.
    """
    open_shared_buffers(file.graph)
    return _Importer(file).run()


class _Importer:
    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        self.failures: list[Failure] = []
        self.inputs = declare_inputs(file)
        self.state = GraphState(relax.BlockBuilder(), Analyzer())
        self.state.convert_graph = self.convert_graph
        self.state.graph_inputs = self.inputs.params
        self.state.size_vars = self.inputs.size_vars
        self.state.token_inputs = [var for var in (self.inputs.ids, self.inputs.positions) if var is not None]
        self.state.total = self.inputs.total
        self.state.set_positions(self.inputs.positions, self.inputs.spare_positions)
        tokens = [] if self.inputs.ids is None else list(self.inputs.ids.ty.shape)
        for var in self.inputs.size_vars:  # a past may be empty, a call's tokens are not
            least = tirx.const(int(any(var.same_as(size) for size in tokens)), "int64")
            self.state.analyzer.bind(var, tvm.ir.Range(least, tirx.const(1 << 31, "int64")))

    def run(self) -> StepGraph:
        graph = self.file.graph
        builder = self.state.builder
        params = list(self.inputs.params.values())
        self.values.update(self.inputs.params)
        problem = None
        with builder.function("main", params=params):
            with builder.dataflow():
                try:
                    outputs = self._outputs(graph)
                except ModelError as error:  # TVM warns of a builder left inside a block
                    problem, outputs = error, []
                body = builder.emit_output(relax.Tuple(outputs))
            builder.emit_func_output(body)
        if problem is not None:
            raise problem
        return self._finish(builder.get(), params)

    def _outputs(self, graph: onnx.GraphProto) -> list[relax.Expr]:
        """Convert the graph; returns its outputs."""
        self._initializers(graph)
        self._nodes(graph.node)
        if self.failures:
            raise ModelError(describe_failures(self.file.source, self.failures))
        return [self.state.tensor(self._get(output.name, "the graph")) for output in graph.output]

    def convert_graph(self, graph: onnx.GraphProto) -> list[Any]:
        """Convert a subgraph in place, its names in a scope of their own; returns its outputs' values."""
        outer = dict(self.values)
        known_failures = len(self.failures)
        self._initializers(graph)
        self._nodes(graph.node)
        results = [self.values.get(output.name, _FAILED) for output in graph.output]
        self.values = outer
        if len(self.failures) > known_failures or any(result is _FAILED for result in results):
            raise _InnerFailure
        return results

    def _initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self.values[tensor.name] = tensor  # read when a node asks for it

    def _nodes(self, nodes: Sequence[onnx.NodeProto]) -> None:
        for proto in nodes:
            results = None
            try:
                node = self._read(proto)
                if node is None:
                    self._check_known(proto)
                else:
                    results = self._convert(node, proto)
            except _InnerFailure:
                pass
            except UnsupportedNode as error:
                self.failures.append(Failure.of(proto, self.file.opset(proto.domain), str(error)))
            for index, name in enumerate(proto.output):
                if name:
                    self.values[name] = _FAILED if results is None else results[index]

    def _check_known(self, proto: onnx.NodeProto) -> None:
        """Check that a node which cannot be converted yet has a converter, and those inside it."""
        for inner in inner_graphs(proto):
            self._nodes_known(inner.node)
        converter_of(self.file.domain(proto.domain), proto.op_type, self.file.opset(proto.domain))

    def _nodes_known(self, nodes: Sequence[onnx.NodeProto]) -> None:
        for proto in nodes:
            try:
                self._check_known(proto)
            except UnsupportedNode as error:
                self.failures.append(Failure.of(proto, self.file.opset(proto.domain), str(error)))

    def _read(self, proto: onnx.NodeProto) -> OnnxNode | None:
        """The node with its inputs' values, or None if one of these comes from a node that failed."""
        values = [self._get(name, _name(proto)) if name else None for name in proto.input]
        if any(value is _FAILED for value in values):
            return None
        return OnnxNode(
            domain=self.file.domain(proto.domain),
            op_type=proto.op_type,
            opset=self.file.opset(proto.domain),
            name=_name(proto),
            attributes=read_attributes(proto, self.file),
            values=values,
            outputs=list(proto.output),
            state=self.state,
        )

    def _get(self, name: str, reader: str) -> Any:
        """The value of a name; an initializer is read now, and becomes a parameter unless it is small."""
        value = self.values.get(name)
        if value is None:
            raise ModelError(f"{self.file.source}: {reader!r} reads {name!r}, which nothing gives")
        if value is _FAILED or isinstance(value, (relax.Expr, KnownValue)):
            return value
        value = self.values[name] = self.state.constant(name, self.file.array(value))
        return value

    def _convert(self, node: OnnxNode, proto: onnx.NodeProto) -> list[Any]:
        """The values of a node's outputs."""
        results = self._results(node)
        results = list(results) if isinstance(results, (tuple, list, relax.Tuple)) else [results]
        results = [self._bound(node, result) for result in results]
        for index, name in enumerate(node.outputs):
            if name and (index >= len(results) or results[index] is None):
                raise UnsupportedNode(f"its output {index} ({name!r}) is not supported")
        check_results(node, proto, results)
        return results

    def _results(self, node: OnnxNode) -> Any:
        """What a node's converter gives. A node that is not as its operator demands may fail anywhere in it."""
        try:
            results = fold(node)
            return converter_of(node.domain, node.op_type, node.opset)(node) if results is None else results
        except (ModelError, _InnerFailure):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UnsupportedNode(f"its inputs or attributes are not those of its operator ({reason})") from error

    def _bound(self, node: OnnxNode, result: Any) -> Any:
        """A result as a variable or a known value."""
        if result is None or isinstance(result, (relax.Var, KnownValue)):
            if isinstance(result, KnownValue) and not node.state.is_constant(result) and result.dtype == "bool":
                raise UnsupportedNode("it is a condition on sizes that is not known at import")
            return result
        if isinstance(result, tvm.ir.GenericConst) and result.value.numpy().size <= 1 << 12:
            return KnownValue.of(result.value.numpy())
        return self.state.emit(result)

    def _finish(self, mod: tvm.IRModule, params: list[relax.Var]) -> StepGraph:
        """The function with its weights as parameters."""
        names = [value.name for value in self.file.graph_inputs]
        if (spare := self.state.added_positions) is not None:
            params, names = [*params, spare], [*names, spare.name]
        function = self._with_weights(mod["main"], params)
        attentions = _attentions(function)
        mod = relax.transform.DeadCodeElimination()(tvm.IRModule({"main": function}))
        function = self._with_weights(without_repeated_heads(mod)["main"], params)
        kept = set(_attentions(function))
        caps = [float(cap) for var, cap in zip(attentions, self.state.softcaps, strict=True) if var in kept]
        if any(caps):
            function = function.with_attr(SOFTCAPS, caps)
        mod = tvm.IRModule({"main": function})
        relax.analysis.well_formed(mod)
        config = dict(self.state.config)
        if (limit := max_position(function, self.state, self.inputs)) is not None:
            config["max_position"] = limit
        return StepGraph(
            mod=mod,
            inputs=names,
            outputs=[output.name for output in self.file.graph.output],
            weights=[array for _, array in self._used(function).values()],
            weight_names=list(self._used(function)),
            source=self.file.source,
            config=config,
        )

    def _used(self, function: relax.Function) -> dict[str, Any]:
        """The weights that a function reads."""
        used = set(relax.analysis.all_vars(function.body))
        return {name: pair for name, pair in self.state.weights.items() if pair[0] in used}

    def _with_weights(self, function: relax.Function, params: list[relax.Var]) -> relax.Function:
        """The function with inputs and those weights that it reads as its parameters."""
        weights = [var for var, _ in self._used(function).values()]
        result = relax.Function([*params, *weights], function.body, function.ret_ty, function.is_pure)
        return result.with_attr({"global_symbol": "main", "num_input": len(params)})


class _InnerFailure(Exception):
    """A subgraph whose failures are already in the list."""


def _attentions(function: relax.Function) -> list[relax.Var]:
    """The variables bound to attentions, in order."""
    return [
        binding.var
        for block in function.body.blocks
        for binding in block.bindings
        if getattr(getattr(binding.value, "op", None), "name", "").startswith("relax.nn.attention")
    ]


def _name(proto: onnx.NodeProto) -> str:
    return proto.name or next((name for name in proto.output if name), proto.op_type)
