"""Indices that a model computes from nothing become constants: ``x[:, arange(heads).repeat_interleave(4)]``."""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax

from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.operator_table import Unevaluable
from rotquant_tvm.frontend.normalize.step_view import StepView, dims, dtype_of

MAX_ELEMENTS = 1 << 16
"""Larger tensors are left to the compiled model."""


def with_folded_numbers(mod: tvm.IRModule) -> tvm.IRModule:
    """Return the module with the indices of "main" that follow from constants alone as constants.

    These are whole numbers of a known shape by which parts of a float tensor of three axes or more are taken, as heads
    are. An index that depends on a parameter or on a symbolic size stays as it is, and so does one by an operator that
    cannot be evaluated here. What else is computed from numbers stays too: it may hold lengths, which are looked for
    in masks (``normalize.lengths``).
    """
    function = mod["main"]
    view = StepView(function)
    evaluation = Evaluation(view, {}, {})
    folded: dict[relax.Var, relax.Binding] = {}
    for var in view.values:
        index = _index_of(view, var)
        if index is None or not _is_small(index) or any(x not in view.values for x in view.slice([index])):
            continue
        try:
            array = np.asarray(evaluation.value(index))
        except Unevaluable:
            continue
        folded[index] = relax.VarBinding(index, relax.const(array, dtype_of(index)))
    if not folded:
        return mod
    blocks = [
        type(block)([folded.get(binding.var, binding) for binding in block.bindings]) for block in function.body.blocks
    ]
    body = relax.SeqExpr(blocks, function.body.body)
    result = tvm.IRModule(mod.functions, attrs=mod.attrs)
    result["main"] = relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
    return relax.transform.DeadCodeElimination(["main"])(result)


def _index_of(view: StepView, var: relax.Var) -> relax.Var | None:
    """The index by which a variable's parts were taken from a float tensor of three axes or more."""
    call = view.value(var)
    if view.op(var) != "take" or not isinstance(call.args[1], relax.Var) or len(dims(call) or []) < 3:
        return None
    return call.args[1] if "float" in dtype_of(call) and len(dims(call.args[0]) or []) > 2 else None


def _is_small(var: relax.Var) -> bool:
    """Whether a variable is a tensor of few whole numbers, of a known shape."""
    shape = dims(var)
    if shape is None or dtype_of(var) not in ("int32", "int64"):
        return False
    return all(isinstance(size, int) for size in shape) and math.prod(shape) <= MAX_ELEMENTS
