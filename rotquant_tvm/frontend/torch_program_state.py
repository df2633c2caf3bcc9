"""What an exported program keeps between its calls, as inputs and outputs like any other.

TVM's importer drops writes to buffers and inputs without a word; here they become outputs, and the buffers inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, OutputSpec, TensorArgument

from rotquant_tvm.errors import ModelError

_MUTATIONS = {OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION}


@dataclass(frozen=True)
class OpenProgram:
    """A program all of whose state is in its inputs and outputs, and their names in the source.

    ``inputs``: of the program's user inputs in order, what the caller gives before what is kept; ``outputs`` likewise.
    """

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]


def opened(program: ExportedProgram, names: list[str], name: str) -> OpenProgram:
    """Make state explicit in ``program``, in place; state that a call overwrites unread is dropped.

    ``names``: the source's names of the user inputs in order, which torch forgets when it takes a program apart.
    Raises ModelError, naming ``name``, for what is no tensor and still decides something, and for written weights.
    """
    graph, signature = program.graph, program.graph_signature
    _skip_copies(graph)
    nodes = {node.name: node for node in graph.nodes}
    returned = next(iter(reversed(graph.nodes)))
    given, kept = _outputs(signature, returned)
    users = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    called = dict(zip(users, names, strict=True))
    _set_output(returned, given + kept)
    graph.eliminate_dead_code()
    read = {spec.target or spec.arg.name for spec in signature.input_specs if nodes[spec.arg.name].users}
    for _, node in kept:  # a state that is returned as it came is read by nobody
        if node.op == "placeholder" and set(node.users) == {returned}:
            raise ModelError(f"{name!r} writes nothing to a state that it returns")
    kept = [(target, node) for target, node in kept if target in read]
    _set_output(returned, given + kept)
    graph.eliminate_dead_code()
    state = {target for target, _ in kept}
    inputs = _open_inputs(signature, program.constants, nodes, state, name)
    signature.output_specs[:] = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for _, node in given + kept
    ]
    program.graph_module.recompile()
    outputs = [target for target, _ in given] + [called.get(target, target) for target, _ in kept]
    return OpenProgram(program, [called.get(source, source) for source in inputs], outputs)


Returned = list[tuple[str, fx.Node]]


def _outputs(signature: Any, returned: fx.Node) -> tuple[Returned, Returned]:
    """Split what a graph returns into the caller's tensors and what was written, with names."""
    given: Returned = []
    kept: Returned = []
    results: Any = returned.args[0]
    for spec, node in zip(signature.output_specs, results, strict=True):
        if spec.kind in _MUTATIONS:
            kept.append((spec.target, node))
        elif isinstance(spec.arg, TensorArgument):
            given.append((spec.arg.name, node))
    return given, kept


def _set_output(returned: fx.Node, values: Returned) -> None:
    returned.args = (tuple(node for _, node in values),)


def _open_inputs(
    signature: Any, constants: dict[str, Any], nodes: dict[str, fx.Node], state: set[str], name: str
) -> list[str]:
    """Turn written buffers into user inputs, put those behind the caller's and return all their names."""
    users: list[tuple[str, Any]] = []
    kept: list[tuple[str, Any]] = []
    rest: list[Any] = []
    for spec in signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            (kept if spec.arg.name in state else users).append((spec.arg.name, spec))
        elif spec.kind is InputKind.USER_INPUT:
            _fix_argument(spec.arg, nodes[spec.arg.name], name)
        elif spec.target in state and spec.kind is InputKind.BUFFER:
            kept.append((spec.target, spec))
            spec.kind, spec.target, spec.persistent = InputKind.USER_INPUT, None, None
        elif spec.target in state:
            raise ModelError(f"{name!r} writes to its weight {spec.target!r}; register what changes as a buffer")
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            rest.append(spec)
        else:
            raise ModelError(f"{name!r} takes {spec.arg.name!r}, which is no tensor; it is not supported")
    signature.input_specs[:] = [spec for _, spec in users + kept] + rest
    for unbound in constants.keys() - {spec.target for spec in rest}:  # TVM would bind them to another's parameter
        del constants[unbound]
    return [source for source, _ in users + kept]


def _fix_argument(argument: Any, node: fx.Node, name: str) -> None:
    """Put the value of an argument that is fixed in its place; refuse a number that may vary."""
    if not isinstance(argument, ConstantArgument):
        raise ModelError(
            f"{name!r} takes the number {argument.name!r}; give positions and lengths as int64 tensors instead"
        )
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda operand: argument.value if operand is node else operand
        )


def _skip_copies(graph: fx.Graph) -> None:
    """Replace ``copy(target, source)`` by its source: of the target it takes no more than shape and dtype."""
    for node in [node for node in graph.nodes if node.target is torch.ops.aten.copy.default]:
        target, source = node.args[0].meta["val"], node.args[1].meta["val"]
        if target.shape == source.shape and target.dtype == source.dtype:
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
