"""The canonical form of an imported model, and the check of it; every importer ends here."""

from __future__ import annotations

import tvm
from tvm import relax

from rotquant_tvm.errors import ModelError

INPUTS = {"ids": "ids", "positions": "positions", "last": "last"}
"""Value of the function attribute ``rotquant.inputs``: the parameter behind each role."""




def check_canonical(mod: tvm.IRModule, layers: int) -> None:
    """Check the canonical form: one causal attention per layer, over its own presents, which are returned.

    Raises ModelError naming the layer where the module differs, and TVM's own error if it is not well formed.
    """
    relax.analysis.well_formed(mod)
    function = mod["main"]
    bindings = relax.analysis.get_var2val(function)
    outputs = _resolve(function.body.body, bindings)
    names = {param.name: param for param in function.params}
    attentions = [
        v for v in bindings.values() if isinstance(v, relax.Call) and _op(v) == "relax.nn.attention"
    ]
    if len(attentions) != layers:
        raise ModelError(f"the imported module has {len(attentions)} attentions for {layers} layers")
    if any(attention.attrs.causal_mask != "BottomRight" for attention in attentions):
        raise ModelError("the imported module has an attention whose mask is not causal from the end")
    for layer in range(layers):
        presents = [outputs.fields[1 + 2 * layer], outputs.fields[2 + 2 * layer]]
        for present, kind in zip(presents, "kv", strict=True):
            joined = _resolve(present, bindings)
            past = names.get(f"past_{kind}_{layer}")
            if past is None or _op(joined) != "relax.concat" or not past.same_as(joined.args[0][0]):
                raise ModelError(f"layer {layer}: present_{kind} is not its past joined with new entries")
        if sum(_reads(attention, presents, bindings) for attention in attentions) != 1:
            raise ModelError(f"layer {layer}: not exactly one attention reads its keys and values")


def _op(value: relax.Expr) -> str:
    return value.op.name if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) else ""


def _resolve(value: relax.Expr, bindings: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """Return the expression behind a variable, through plain renamings."""
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
    """Return the variable first bound to a value, through plain renamings."""
    while isinstance(value, relax.Var) and isinstance(bindings.get(value), relax.Var):
        value = bindings[value]
    return value
