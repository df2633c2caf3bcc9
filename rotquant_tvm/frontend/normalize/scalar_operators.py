"""Relax's operators on single elements, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from rotquant_tvm.frontend.normalize.operator_table import Operator


def _plain(function: Any) -> Operator:
    """An operator without attributes."""
    return lambda _attrs, *args: function(*args)


def _divide(_: Any, x: Any, y: Any) -> Any:
    """Integers are divided towards zero, as in C."""
    if np.issubdtype(np.asarray(x).dtype, np.integer):
        return np.trunc(np.true_divide(x, y))
    return np.divide(x, y)


UNARY: dict[str, Operator] = {
    "abs": _plain(np.abs),
    "bitwise_not": _plain(np.invert),
    "ceil": _plain(np.ceil),
    "cos": _plain(np.cos),
    "exp": _plain(np.exp),
    "floor": _plain(np.floor),
    "isfinite": _plain(np.isfinite),
    "isinf": _plain(np.isinf),
    "isnan": _plain(np.isnan),
    "log": _plain(np.log),
    "logical_not": _plain(np.logical_not),
    "negative": _plain(np.negative),
    "round": _plain(np.round),
    "rsqrt": _plain(lambda x: 1 / np.sqrt(x)),
    "sigmoid": _plain(lambda x: 1 / (1 + np.exp(-x))),
    "sign": _plain(np.sign),
    "sin": _plain(np.sin),
    "sqrt": _plain(np.sqrt),
    "square": _plain(np.square),
    "tanh": _plain(np.tanh),
    "trunc": _plain(np.trunc),
    "nn.relu": _plain(lambda x: np.maximum(x, 0)),
}

BINARY: dict[str, Operator] = {
    "add": _plain(np.add),
    "bitwise_and": _plain(np.bitwise_and),
    "bitwise_or": _plain(np.bitwise_or),
    "bitwise_xor": _plain(np.bitwise_xor),
    "divide": _divide,
    "equal": _plain(np.equal),
    "floor_divide": _plain(np.floor_divide),
    "floor_mod": _plain(np.mod),
    "greater": _plain(np.greater),
    "greater_equal": _plain(np.greater_equal),
    "left_shift": _plain(np.left_shift),
    "less": _plain(np.less),
    "less_equal": _plain(np.less_equal),
    "logical_and": _plain(np.logical_and),
    "logical_or": _plain(np.logical_or),
    "logical_xor": _plain(np.logical_xor),
    "maximum": _plain(np.maximum),
    "minimum": _plain(np.minimum),
    "mod": _plain(np.fmod),
    "multiply": _plain(np.multiply),
    "not_equal": _plain(np.not_equal),
    "power": _plain(np.power),
    "right_shift": _plain(np.right_shift),
    "subtract": _plain(np.subtract),
}

OTHERS: dict[str, Operator] = {
    "astype": lambda _, x: x,  # the result is cast to the type of the call
    "clip": _plain(np.clip),
    "where": _plain(np.where),
    "ewise_fma": _plain(lambda x, y, z: x * y + z),
    "wrap_param": _plain(lambda x: x),
}

SCALAR_OPERATORS = UNARY | BINARY | OTHERS

# Of one element each, and never evaluated: what they compute is not asked, only which token they compute it for.
UNEVALUATED = {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cosh", "erf", "nn.gelu", "nn.gelu_tanh",
    "nn.leakyrelu", "nn.prelu", "nn.silu", "nn.softplus", "nn.dropout", "nn.selu", "log_add_exp", "sinh", "tan",
    "nn.relu6", "quantize", "dequantize",
}  # fmt: skip

ELEMENTWISE = set(SCALAR_OPERATORS) | UNEVALUATED
"""Operators each of whose elements is computed from the elements at its place, after broadcasting."""
