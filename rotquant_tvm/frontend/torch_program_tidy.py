"""An exported torch program without what its export left behind: nested graphs, assertions, writes in place.

torch can do most of this (``run_decompositions``), but fails on programs whose cache was lifted as a constant, as
exports that are not strict do, and takes apart more than we want.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from rotquant_tvm.errors import ModelError

_aten = torch.ops.aten
_SAME_TENSOR = {_aten.alias.default, _aten.detach.default, _aten.detach_.default, _aten.lift_fresh.default}
_SAME_IF_EQUAL = {
    _aten.to.dtype,
    _aten.to.device,
    _aten.to.dtype_layout,
    _aten.to.other,
    _aten.contiguous.default,
    _aten.type_as.default,
}
_CHECKS = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten._assert_async.msg,
    _aten.sym_constrain_range.default,
    _aten.sym_constrain_range_for_size.default,
}
_STATE = {
    InputKind.BUFFER: OutputKind.BUFFER_MUTATION,
    InputKind.CONSTANT_TENSOR: OutputKind.BUFFER_MUTATION,
    InputKind.USER_INPUT: OutputKind.USER_INPUT_MUTATION,
}


def tidied(program: ExportedProgram, name: str) -> ExportedProgram:
    """Return a copy of ``program`` with nested graphs inlined and, where they are plain, writes in place made outputs.

    Constants that are written to become buffers. Writes through views are left for torch to take out. Raises
    ModelError, naming ``name``, for control flow that depends on data and for autocast.
    """
    module = copy.deepcopy(program.graph_module)
    _keep_names(program.graph, module.graph)
    signature = copy.deepcopy(program.graph_signature)
    _inline(module, name)
    graph = module.graph
    for node in [node for node in graph.nodes if node.target in _CHECKS]:
        graph.erase_node(node)
    _skip_empty_parts(graph)
    trial = copy.deepcopy(graph)  # the writes are taken out of all places or of none
    _keep_names(graph, trial)
    written = _WithoutWrites(trial).run()
    if written is not None:
        graph = trial
        _return_written(graph, signature, written, name)
    _skip_other_names(graph)
    _merge_tied(graph, signature, program.state_dict)
    graph.eliminate_dead_code()
    graph.lint()
    return ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[_flat_call(signature)],
        example_inputs=None,
        constants={key: _detached(value) for key, value in program.constants.items()},
        verifiers=program.verifiers,
    )


def _flat_call(signature: Any) -> ModuleCallEntry:
    """Describe a program that takes and returns bare tensors: torch would make transformers' caches anew, and fail."""
    inputs = tuple([0] * sum(spec.kind is InputKind.USER_INPUT for spec in signature.input_specs))
    outputs = tuple([0] * sum(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs))
    in_spec, out_spec = pytree.tree_structure((inputs, {})), pytree.tree_structure(outputs)
    return ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))


def _keep_names(graph: fx.Graph, copied: fx.Graph) -> None:
    """Undo that a copy gives new names to what is called like something of Python's, as ``input`` is."""
    for node, twin in zip(graph.nodes, copied.nodes, strict=True):
        twin.name = node.name


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _inline(module: fx.GraphModule, name: str) -> None:
    """Put the graphs that switch gradients or autocast off in the place of their calls."""
    higher = torch.ops.higher_order
    graph = module.graph
    while calls := [node for node in graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]:
        for node in calls:
            if node.target is higher.wrap_with_set_grad_enabled:
                body, operands = node.args[1], node.args[2:]
            elif node.target is higher.wrap_with_autocast and not node.args[2]:
                body, operands = node.args[4], node.args[5:]
            elif node.target is higher.wrap_with_autocast:
                raise ModelError(f"{name!r} computes under autocast; export it in the dtype that it is to run in")
            else:
                raise ModelError(
                    f"{name!r} branches or loops on its data ({node.target}), which is not supported; export the one "
                    "branch that a decoding step takes"
                )
            nested = getattr(module, body.target)
            inner = {p: o for p, o in zip(_placeholders(nested.graph), operands, strict=True)}
            with graph.inserting_before(node):
                results: Any = graph.graph_copy(nested.graph, inner)
            for user in list(node.users):
                if user.target is operator.getitem:
                    user.replace_all_uses_with(results[user.args[1]])
                    graph.erase_node(user)
            if node.users:  # a nested graph with one result that is not a tuple
                node.replace_all_uses_with(results)
            graph.erase_node(node)
            if not body.users:
                graph.erase_node(body)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _skip_empty_parts(graph: fx.Graph) -> None:
    """Drop the empty tensors of rank 1 that torch.cat ignores: what a new cache is joined with."""
    for node in [node for node in graph.nodes if node.target in (_aten.cat.default, _aten.concat.default)]:
        parts = [part for part in node.args[0] if tuple(part.meta["val"].shape) != (0,)]
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
            graph.erase_node(node)
        elif parts:
            node.args = (parts, *node.args[1:])


def _skip_other_names(graph: fx.Graph) -> None:
    for node in [node for node in graph.nodes if node.target in _SAME_TENSOR]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


class _WithoutWrites:
    """Replace writes to whole tensors by their results; later readers of the tensor read the result."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.whole: dict[fx.Node, fx.Node] = {}  # a tensor under another name → the node that made it
        self.views: dict[fx.Node, fx.Node] = {}  # a part or another shape of a tensor → the node that made it
        self.value: dict[fx.Node, fx.Node] = {}  # a tensor that was written to → what it holds now
        self.stale: set[fx.Node] = set()

    def run(self) -> dict[fx.Node, fx.Node] | None:
        """Return what every placeholder that is written to holds at the end; None if a view is written to or read."""
        for node in list(self.graph.nodes):
            if any(operand in self.stale for operand in node.all_input_nodes):
                return None
            if node.op != "call_function":
                node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._current)
                continue
            if not self._visit(node):
                return None
        return {node: value for node, value in self.value.items() if node.op == "placeholder"}

    def _visit(self, node: fx.Node) -> bool:
        schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
        target = _written_argument(node) if schema is not None else None
        if schema is not None and schema.is_mutable and node.target not in _SAME_TENSOR:
            if target is None or target in self.views or (functional := _functional(node.target)) is None:
                return False
            made = self.whole.get(target, target)
            self.stale |= {view for view, source in self.views.items() if source is made}
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._current)
            node.target = functional
            self.whole[node] = made
            self.value[made] = node
            return True
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is not None and _is_same(node, source):
            self.whole[node] = self.whole.get(source, source)
            if source in self.views:
                self.views[node] = self.views[source]
        elif source is not None and schema is not None and _returns_view(schema):
            self.views[node] = self.views.get(source, self.whole.get(source, source))
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._current)
        return True

    def _current(self, node: fx.Node) -> fx.Node:
        made = self.whole.get(node, node)
        return self.value.get(made, node)


def _written_argument(node: fx.Node) -> fx.Node | None:
    """Return the operand that an operator writes to, if it is exactly its first."""
    target: Any = node.target
    written = [i for i, a in enumerate(target._schema.arguments) if a.alias_info and a.alias_info.is_write]
    first = node.args[0] if written == [0] and node.args else None
    return first if isinstance(first, fx.Node) else None


def _functional(target: Any) -> Callable[..., Any] | None:
    """Return ``aten.op.overload`` of ``aten.op_.overload``, if there is one."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if name.endswith("_") else None


def _is_same(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator returns its operand itself."""
    if node.target in _SAME_TENSOR:
        return True
    value, other = node.meta.get("val"), source.meta.get("val")
    if node.target not in _SAME_IF_EQUAL or not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return value.dtype == other.dtype and value.device == other.device and value.stride() == other.stride()


def _returns_view(schema: Any) -> bool:
    return any(result.alias_info is not None for result in schema.returns)


def _return_written(graph: fx.Graph, signature: Any, written: dict[fx.Node, fx.Node], name: str) -> None:
    """Make the last values of tensors that are written to outputs, before the others."""
    output = next(iter(reversed(graph.nodes)))
    specs, values = [], []
    for index, spec in enumerate(signature.input_specs):
        node = next((node for node in written if node.name == spec.arg.name), None)
        if node is None:
            continue
        if spec.kind not in _STATE:
            raise ModelError(f"{name!r} writes to its weight {spec.target!r}; register what changes as a buffer")
        if spec.kind is InputKind.CONSTANT_TENSOR:
            signature.input_specs[index] = InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=False)
        target = spec.arg.name if spec.kind is InputKind.USER_INPUT else spec.target
        specs.append(OutputSpec(_STATE[spec.kind], TensorArgument(written[node].name), target))
        values.append(written[node])
    signature.output_specs[:0] = specs
    output.args = ((*values, *output.args[0]),)


def _merge_tied(graph: fx.Graph, signature: Any, state: dict[str, Any]) -> None:
    """Let all readers of a tensor that has several names read it under the first."""
    nodes = {node.name: node for node in _placeholders(graph)}
    first: dict[tuple[Any, ...], fx.Node] = {}
    for spec, tensor in _weights(signature, state):
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        node = nodes[spec.arg.name]
        if tensor.numel():
            node.replace_all_uses_with(first.setdefault(key, node))


def _weights(signature: Any, state: dict[str, Any]) -> Iterator[tuple[InputSpec, torch.Tensor]]:
    for spec in signature.input_specs:
        if spec.kind is InputKind.PARAMETER:
            yield spec, state[spec.target]
