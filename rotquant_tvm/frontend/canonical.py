"""From an exported torch step to the canonical Relax function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tvm
from torch.export import ExportedProgram
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.attention_interface import AttentionCall
from rotquant_tvm.frontend.canonical_form import INPUTS, check_canonical
from rotquant_tvm.frontend.step_graph import SOFTCAPS
from rotquant_tvm.frontend.torch_converters import CONVERTERS, softcaps
from rotquant_tvm.frontend.torch_importer import decomposed_if_needed, to_relax


@dataclass(frozen=True)
class CanonicalModule:
    """``mod`` with its function "main", and the torch parameter behind each weight parameter, in order."""

    mod: tvm.IRModule
    weights: list[torch.Tensor]


def to_canonical(program: ExportedProgram, calls: list[AttentionCall], model_type: str) -> CanonicalModule:
    """Convert an exported step. Raises ModelError for an operator that cannot be converted."""
    program = decomposed_if_needed(program, CONVERTERS, (), model_type)
    mod = to_relax(program, CONVERTERS, model_type)
    function, names = _finish(mod["main"], 3 + 2 * len(calls), model_type)
    if any(caps := softcaps(program.graph)):
        function = function.with_attr(SOFTCAPS, caps)
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    weights = [program.state_dict[targets[name]] for name in names]
    mod.update_func(mod.get_global_var("main"), function)
    check_canonical(mod, len(calls))
    return CanonicalModule(mod, weights)


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
