"""From an exported torch step to the canonical Relax function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch.export import ExportedProgram
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.attention_interface import AttentionCall
from rotquant_tvm.frontend.canonical_form import INPUTS, check_canonical
from rotquant_tvm.frontend.quiet import first_line, quiet
from rotquant_tvm.frontend.torch_converters import CONVERTERS


@dataclass(frozen=True)
class CanonicalModule:
    """``mod`` with its function "main", and the torch parameter behind each weight parameter, in order."""

    mod: tvm.IRModule
    weights: list[torch.Tensor]


class _Importer(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer, but for the parameters' values: it would attach a copy of each, which nobody reads."""

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor: torch.Tensor) -> tvm.runtime.Tensor:
        if isinstance(tensor, torch.nn.Parameter):
            return tvm.runtime.empty((0,))
        return ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor)


def to_canonical(program: ExportedProgram, calls: list[AttentionCall], model_type: str) -> CanonicalModule:
    """Convert an exported step. Raises ModelError for an operator that cannot be converted."""
    importer = _Importer()
    known = {*importer.convert_map, *CONVERTERS}
    if _unusable_operators(program, known):
        program = _decompose(program, model_type)
        if unusable := _unusable_operators(program, known):
            raise ModelError(f"{model_type!r} uses operators that cannot be imported: {', '.join(unusable)}")
    _refuse_scaled_sums(program, model_type)
    try:
        mod = importer.from_exported_program(program, True, False, False, dict(CONVERTERS))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{model_type!r} cannot be converted to Relax: {first_line(error)}") from error
    _check_types(program, importer.env, model_type)
    mod = relax.transform.DeadCodeElimination(["main"])(mod)
    function, names = _finish(mod["main"], 3 + 2 * len(calls), model_type)
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    weights = [program.state_dict[targets[name]] for name in names]
    mod.update_func(mod.get_global_var("main"), function)
    check_canonical(mod, len(calls))
    return CanonicalModule(mod, weights)


def _decompose(program: ExportedProgram, model_type: str) -> ExportedProgram:
    """Take operators apart and writes in place out; linear layers stay whole. Slow, so only where needed."""
    table: Any = torch.export.default_decompositions()
    table.pop(torch.ops.aten.linear.default, None)
    try:
        with quiet():
            decomposed: ExportedProgram = program.run_decompositions(table)
    except Exception as error:
        raise ModelError(f"{model_type!r} cannot be decomposed by torch: {first_line(error)}") from error
    return decomposed


def _operators(program: ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _unusable_operators(program: ExportedProgram, known: set[str]) -> list[str]:
    """List operators without a converter, and those that write to an operand, which converters ignore."""
    targets = {node.target.__name__: node.target for node in _operators(program) if callable(node.target)}
    return sorted(
        str(target)
        for name, target in targets.items()
        if name not in known or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)
    )


def _refuse_scaled_sums(program: ExportedProgram, model_type: str) -> None:
    """TVM's converters ignore the factors of ``add(x, y, alpha=2)``."""
    for node in _operators(program):
        if any(node.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            raise ModelError(
                f"{model_type!r}: {node.target} has a factor alpha or beta, which is not supported"
            )


def _check_types(program: ExportedProgram, env: dict[torch.fx.Node, object], model_type: str) -> None:
    """Compare rank, static dimensions and dtype of every converted value with torch's own."""
    for node in _operators(program):
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
                f"{model_type!r}: {node.target} was converted to {value.ty} where torch has "
                f"{tuple(meta.shape)} {meta.dtype}"
            )


def _finish(function: relax.Function, inputs: int, model_type: str) -> tuple[relax.Function, list[str]]:
    """Name the dynamic sizes, drop weights that nothing reads and set our attributes.

    Returns the function and the names of its weight parameters. A model that numbers its tokens by itself
    would be wrong for sequences of different lengths in a batch, so positions that nothing reads are refused.
    """
    used = set(relax.analysis.free_vars(function.body))
    params = [param for i, param in enumerate(function.params) if i < inputs or param in used]
    if params[1] not in used:
        raise ModelError(f"{model_type!r} does not take the positions of its tokens from position_ids")
    function = relax.Function(params, function.body, function.ret_ty, function.is_pure, span=function.span)
    batch, seq = params[0].ty.shape.values
    past = params[3].ty.shape.values[2]
    sizes = {
        var: tvm.tirx.Var(name, "int64") for var, name in ((batch, "batch"), (seq, "seq"), (past, "past"))
    }
    function = function.bind_symbolic_vars(sizes)
    function = (
        function.with_attr("global_symbol", "main")
        .with_attr("num_input", inputs)
        .with_attr("rotquant.inputs", INPUTS)
    )
    return function, [param.name for param in function.params[inputs:]]
