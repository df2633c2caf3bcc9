"""Copying bindings into a new function, with variables and symbolic sizes replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.size_arithmetic import Size, substitute
from rotquant_tvm.frontend.normalize.step_view import is_size


def emit_copy(
    builder: relax.BlockBuilder,
    binding: relax.Binding,
    new: Callable[[relax.Var], relax.Expr],
    sizes: Mapping[tirx.Var, Size] | None = None,
) -> relax.Var:
    """Emit a binding with its variables replaced by ``new`` and its sizes by ``sizes``; the types are inferred anew.

    Raises ModelError if the operator does not take what it is given now.
    """
    value = _copied(binding.value, new, sizes or {})
    try:
        if isinstance(binding, relax.MatchCast) and not sizes:
            return builder.match_cast(value, binding.ty)
        return builder.emit(value, binding.var.name)
    except Exception as error:  # TVM raises many types
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"{binding.var.name} cannot be computed in the canonical form: {reason}") from error


def _copied(
    value: relax.Expr, new: Callable[[relax.Var], relax.Expr], sizes: Mapping[tirx.Var, Size]
) -> relax.Expr:
    if is_size(value):
        return substitute(value, sizes) if sizes else value
    if isinstance(value, relax.Var):
        return new(value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_copied(field, new, sizes) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(_copied(value.tuple_value, new, sizes), value.index)
    if isinstance(value, relax.ShapeExpr):
        return relax.ShapeExpr([_copied(size, new, sizes) for size in value.values])
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [_copied(arg, new, sizes) for arg in value.args], value.attrs, value.ty_args)
    if isinstance(value, (relax.If, relax.Function)):
        raise ModelError(f"a step holds {type(value).__name__}, which cannot be copied")
    return value  # constants and names
