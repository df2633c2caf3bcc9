"""TVM's importer of torch programs with our converters, and the checks around it."""

from __future__ import annotations

from typing import Any

import torch
import tvm
from torch.export import ExportedProgram
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.quiet import first_line, quiet
from rotquant_tvm.frontend.torch_converters import Converter

_HINTS = {
    "grouped_mm": "; call model.set_experts_implementation('batched_mm') before the export",
    "quantize": "; export the model before it is quantized",
    "torchao": "; export the model before it is quantized",
    "histc": "; let experts be chosen by gathering their weights",
}
"""What to do about operators with these in their names."""


class TorchImporter(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer, but for the parameters' values: it would attach a copy of each, which nobody reads."""

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor: torch.Tensor) -> tvm.runtime.Tensor:
        if isinstance(tensor, torch.nn.Parameter):
            return tvm.runtime.empty((0,))
        return ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor)


def decomposed_if_needed(
    program: ExportedProgram, converters: dict[str, Converter], whole: tuple[Any, ...], name: str
) -> ExportedProgram:
    """Take a program's operators apart, only if some have no converter or write to their operands.

    ``whole``: torch operators that stay whole, beside linear layers; ``name``: the model's, for messages. Raises
    ModelError that lists what cannot be imported even then.
    """
    known = {*TorchImporter().convert_map, *converters}
    if _unusable_operators(program, known):
        program = _decompose(program, whole, name)
        if unusable := _unusable_operators(program, known):
            hints = [hint for sign, hint in _HINTS.items() if any(sign in operator for operator in unusable)]
            raise ModelError(
                f"{name!r} uses operators that cannot be imported: {', '.join(unusable)}{''.join(hints[:1])}"
            )
    _refuse_scaled_sums(program, name)
    return program


def to_relax(program: ExportedProgram, converters: dict[str, Converter], name: str) -> tvm.IRModule:
    """Convert a program whose operators have converters; parameters stay parameters, buffers become constants.

    Raises ModelError where TVM's importer fails or a value has not torch's rank, static sizes and dtype.
    """
    importer = TorchImporter()
    try:
        mod = importer.from_exported_program(program, True, False, False, dict(converters))
    except ModelError as error:
        raise ModelError(f"{name!r}: {error}") from error
    except Exception as error:
        raise ModelError(f"{name!r} cannot be converted to Relax: {first_line(error)}") from error
    _check_types(program, importer.env, name)
    return relax.transform.DeadCodeElimination(["main"])(mod)


def call_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    """Return the calls of operators in a program's graph, in order."""
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _decompose(program: ExportedProgram, whole: tuple[Any, ...], name: str) -> ExportedProgram:
    """Take operators apart and writes in place out; linear layers stay whole. Slow, so only where needed."""
    table: Any = torch.export.default_decompositions()
    for operator in (torch.ops.aten.linear.default, *whole):
        table.pop(operator, None)
    try:
        with quiet():
            decomposed: ExportedProgram = program.run_decompositions(table)
    except Exception as error:
        raise ModelError(f"{name!r} cannot be decomposed by torch: {first_line(error)}") from error
    return decomposed


def _unusable_operators(program: ExportedProgram, known: set[str]) -> list[str]:
    """List operators without a converter, and those that write to an operand, which converters ignore."""
    targets = {node.target.__name__: node.target for node in call_nodes(program) if callable(node.target)}
    return sorted(
        str(target)
        for name, target in targets.items()
        if name not in known or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)
    )


def _refuse_scaled_sums(program: ExportedProgram, name: str) -> None:
    """TVM's converters ignore the factors of ``add(x, y, alpha=2)``."""
    for node in call_nodes(program):
        if any(node.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            raise ModelError(f"{name!r}: {node.target} has a factor alpha or beta, which is not supported")


def _check_types(program: ExportedProgram, env: dict[torch.fx.Node, object], name: str) -> None:
    """Compare rank, static dimensions and dtype of every converted value with torch's own."""
    for node in call_nodes(program):
        value, meta = env.get(node), node.meta.get("val")
        if not isinstance(value, relax.Expr) or not isinstance(meta, torch.Tensor):
            continue
        if not isinstance(value.ty, relax.TensorType) or value.ty.shape is None:
            continue
        same = value.ty.dtype.dtype == str(meta.dtype).removeprefix("torch.") and value.ty.ndim == meta.ndim
        for ours, theirs in zip(value.ty.shape.values, meta.shape, strict=False):
            if isinstance(ours, tvm.tirx.IntImm) and isinstance(theirs, int):
                same &= int(ours) == theirs
        if not same:
            raise ModelError(
                f"{name!r}: {node.target} was converted to {value.ty} where torch has {tuple(meta.shape)} {meta.dtype}"
            )
