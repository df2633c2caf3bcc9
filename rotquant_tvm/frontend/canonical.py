"""From an exported torch step to the canonical Relax function, and the check that it is canonical."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tvm
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.attention_op import AttentionCall
from rotquant_tvm.frontend.quiet import first_line, quiet
from rotquant_tvm.frontend.torch_converters import CONVERTERS

INPUTS = {"ids": "ids", "positions": "positions", "last": "last"}


@dataclass(frozen=True)
class CanonicalModule:
    """``mod`` with its function "main", and the torch parameter behind each weight parameter, in order."""

    mod: tvm.IRModule
    weights: list[torch.Tensor]


def to_canonical(program: ExportedProgram, calls: list[AttentionCall], model_type: str) -> CanonicalModule:
    """Convert an exported step. Raises ModelError for an operator that cannot be converted."""
    importer = ExportedProgramImporter()
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
    function, names = _finish(mod["main"], 3 + 2 * len(calls))
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    weights = [program.state_dict[targets[name]] for name in names]
    mod.update_func(mod.get_global_var("main"), function)
    check_canonical(mod, calls)
    return CanonicalModule(mod, weights)


def _decompose(program: ExportedProgram, model_type: str) -> ExportedProgram:
    """Take operators apart and writes in place out; linear layers stay whole. Slow, so only where needed."""
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.linear.default, None)
    try:
        with quiet():
            return program.run_decompositions(table)
    except Exception as error:
        raise ModelError(f"{model_type!r} cannot be decomposed by torch: {first_line(error)}") from error


def _operators(program: ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _unusable_operators(program: ExportedProgram, known: set[str]) -> list[str]:
    """Operators without a converter, and those that write to an operand, whose other readers would be wrong."""
    targets = {node.target.__name__: node.target for node in _operators(program)}
    return sorted(
        str(target)
        for name, target in targets.items()
        if name not in known or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)
    )


def _refuse_scaled_sums(program: ExportedProgram, model_type: str) -> None:
    """TVM's converters ignore the factors of ``add(x, y, alpha=2)``."""
    for node in _operators(program):
        if any(node.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            raise ModelError(f"{model_type!r}: {node.target} has a factor alpha or beta, which is not supported")


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


def _finish(function: relax.Function, inputs: int) -> tuple[relax.Function, list[str]]:
    """Name the dynamic sizes, drop parameters that nothing reads and set our attributes.

    Returns the function and the names of its weight parameters.
    """
    used = set(relax.analysis.free_vars(function.body))
    params = [param for i, param in enumerate(function.params) if i < inputs or param in used]
    function = relax.Function(params, function.body, function.ret_ty, function.is_pure, span=function.span)
    batch, seq = params[0].ty.shape.values
    past = params[3].ty.shape.values[2]
    sizes = {var: tvm.tirx.Var(name, "int64") for var, name in ((batch, "batch"), (seq, "seq"), (past, "past"))}
    function = function.bind_symbolic_vars(sizes)
    function = function.with_attr("global_symbol", "main").with_attr("num_input", inputs).with_attr("rotquant.inputs", INPUTS)
    return function, [param.name for param in function.params[inputs:]]


def check_canonical(mod: tvm.IRModule, calls: list[AttentionCall]) -> None:
    """Check the canonical form: well formed (TVM's own error if not), one attention per layer over its own presents, presents returned.

    Raises ModelError naming the layer where the module differs.
    """
    relax.analysis.well_formed(mod)
    function = mod["main"]
    bindings = relax.analysis.get_var2val(function)
    outputs = _resolve(function.body.body, bindings)
    names = {param.name: param for param in function.params}
    attentions = [v for v in bindings.values() if isinstance(v, relax.Call) and _op(v) == "relax.nn.attention"]
    if len(attentions) != len(calls):
        raise ModelError(f"the imported module has {len(attentions)} attentions for {len(calls)} layers")
    for layer, call in enumerate(calls):
        presents = [outputs.fields[1 + 2 * layer], outputs.fields[2 + 2 * layer]]
        for present, kind in zip(presents, "kv", strict=True):
            joined = _resolve(present, bindings)
            past = names.get(f"past_{kind}_{layer}")
            if _op(joined) != "relax.concat" or not past.same_as(joined.args[0][0]):
                raise ModelError(f"layer {layer}: present_{kind} is not its past joined with new entries")
        if sum(_reads(attention, presents, bindings) for attention in attentions) != 1:
            raise ModelError(f"layer {layer}: not exactly one attention reads its keys and values")
        if call.layer != layer:
            raise ModelError(f"layer {layer}: its attention belongs to cache layer {call.layer}")


def _op(value: relax.Expr) -> str:
    return value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""


def _resolve(value: relax.Expr, bindings: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """The expression behind a variable, through plain renamings."""
    while isinstance(value, relax.Var) and value in bindings:
        value = bindings[value]
    return value


def _reads(attention: relax.Call, presents: list[relax.Expr], bindings: dict[relax.Var, relax.Expr]) -> bool:
    """Whether an attention's keys and values are these presents, with sequence and heads swapped."""
    swaps = [_resolve(operand, bindings) for operand in attention.args[1:3]]
    return all(
        _op(swap) == "relax.permute_dims"
        and [int(axis) for axis in swap.attrs.axes] == [0, 2, 1, 3]
        and _last_name(swap.args[0], bindings).same_as(_last_name(present, bindings))
        for swap, present in zip(swaps, presents, strict=True)
    )


def _last_name(value: relax.Expr, bindings: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """The variable first bound to a value, through plain renamings."""
    while isinstance(value, relax.Var) and isinstance(bindings.get(value), relax.Var):
        value = bindings[value]
    return value
