"""Attention without a softmax: through a relu or a sigmoid, or linear in products of keys and values."""

from __future__ import annotations

from tvm import relax

from .dataflow import Dataflow
from .near_miss import NearMiss
from .neighbourhood import axis_sources, is_computed

_NONLINEAR = {"nn.relu": "a relu", "sigmoid": "a sigmoid", "exp": "an exponential", "square": "a square"}


def attention_without_softmax(flow: Dataflow, var: relax.Var) -> NearMiss | None:
    """Return the near miss of a product whose operand comes from another one, both of computed batches alone.

    Linear layers and experts multiply by weights, so that two products of what the function computes, one over the
    other and with nothing but elementwise operators between, are attention of some kind.
    """
    if not _is_computed_product(flow, var):
        return None
    for operand in _operands(flow, var):
        crossed: list[relax.Var] = []
        for axis in range(operand.ty.ndim):
            for source, _ in axis_sources(flow, operand, axis):
                name = flow.operator(source).removeprefix("relax.")
                if name in _NONLINEAR and not any(source.same_as(other) for other in crossed):
                    crossed.append(source)
                if name == "nn.softmax":
                    return None
                if _is_computed_product(flow, source):
                    return _describe(flow, source, crossed)
    return None


def _describe(flow: Dataflow, product: relax.Expr, crossed: list[relax.Var]) -> NearMiss:
    if crossed:
        name = flow.operator(crossed[0])
        text = _NONLINEAR[name.removeprefix("relax.")]
        return NearMiss(crossed[0], name, f"weights come from {text}, not from a softmax")
    return NearMiss(product, flow.operator(product), "two products without a softmax between them (linear attention)")


def _operands(flow: Dataflow, expr: relax.Expr) -> list[relax.Expr]:
    call = flow.call(expr, "matmul", "einsum")
    if call is None:
        return []
    return list(call.args) if call.op.name == "relax.matmul" else flow.fields(call.args[0])


def _is_computed_product(flow: Dataflow, expr: relax.Expr) -> bool:
    operands = _operands(flow, expr)
    return len(operands) == 2 and all(
        operand.ty.ndim >= 3 and is_computed(flow, operand) for operand in operands
    )
