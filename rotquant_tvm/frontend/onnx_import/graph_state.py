"""What the nodes of one imported graph share: the function being built, constants, positions, soft-capping."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.sym import Analyzer

from rotquant_tvm.frontend.error_text import first_line
from rotquant_tvm.frontend.onnx_import.known_value import KnownValue, number, shape_of
from rotquant_tvm.frontend.onnx_import.registry import UnsupportedNode

if TYPE_CHECKING:
    import onnx

_MAX_KNOWN, _MAX_ELEMENTS = 1 << 12, 1 << 40


class GraphState:
    """The state of an import.

    Attributes: ``builder`` (Relax's BlockBuilder); ``analyzer`` (knows that sizes are not negative); ``weights``
    (name → parameter and value, in the order of their first use); ``softcaps`` (one float per attention emitted, in
    order, 0 for none); ``total`` (the length of past and new tokens together, or None); ``limits`` (of tables that
    were cut to the total length: the length and the size that it must not exceed); ``graph_inputs`` (name →
    parameter), of these ``token_inputs`` (ids and positions) and the ``size_vars`` in their shapes; ``config`` (facts
    for the StepGraph) and ``shared`` (what converters make once for several nodes, under keys of their own).
    """

    def __init__(self, builder: relax.BlockBuilder, analyzer: Analyzer) -> None:
        self.builder = builder
        self.analyzer = analyzer
        self.softcaps: list[float] = []
        self.limits: list[tuple[Any, int]] = []
        self.total: Any = None
        self.graph_inputs: dict[str, relax.Var] = {}
        self.token_inputs: list[relax.Var] = []
        self.size_vars: list[tirx.Var] = []
        self.config: dict[str, Any] = {}
        self.shared: dict[Any, Any] = {}
        self.weights: dict[str, tuple[relax.Var, np.ndarray[Any, Any]]] = {}
        self.convert_graph: Callable[[onnx.GraphProto], list[Any]]
        self._positions: relax.Var | None = None
        self._spare_positions: relax.Var | None = None
        self._known_scalars: dict[Any, relax.Var] = {}

    # -- building -------------------------------------------------------------------------------------------------

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression. Raises UnsupportedNode if Relax finds its operands wrong or cannot tell its shape."""
        try:
            var = self.builder.emit(expr)
        except Exception as error:  # TVM raises many types
            raise UnsupportedNode(first_line(error)) from error
        if isinstance(var.ty, relax.TensorType):
            shape = shape_of(var)
            if shape is None:
                raise UnsupportedNode(
                    "the shape of its result is not known at import, or its operands' sizes may differ"
                )
            self._check_sizes(shape)
        return var

    def _check_sizes(self, shape: list[Any]) -> None:
        """Refuse sizes that only the data tell (TVM makes a variable of each), and those that no memory has."""
        if math.prod(size for size in shape if isinstance(size, int)) > _MAX_ELEMENTS:
            raise UnsupportedNode(f"its result has the absurd shape {shape}")
        for size in shape:
            if isinstance(size, tvm.ir.Expr):
                for var in tirx.analysis.undefined_vars(size):
                    if not any(var.same_as(known) for known in self.size_vars):
                        raise UnsupportedNode("the shape of its result depends on the model's data")

    def tensor(self, value: relax.Expr | KnownValue) -> relax.Expr:
        """A value as a Relax expression: numbers as a constant, sizes as a tensor computed at run time."""
        if not isinstance(value, KnownValue):
            return value
        if value.is_number:
            return relax.const(value.array, value.dtype)
        if not value.array.ndim:
            return self._scalar(value.array.item(), value.dtype)
        parts = [
            self.emit(R.reshape(self._scalar(element, value.dtype), [1]))
            if isinstance(element, tvm.ir.Expr)
            else relax.const(np.array([element], value.dtype), value.dtype)
            for element in value.elements()
        ]
        flat = self.emit(R.concat(parts, 0)) if len(parts) > 1 else parts[0]
        return flat if value.array.ndim == 1 else self.emit(R.reshape(flat, list(value.array.shape)))

    def _scalar(self, size: Any, dtype: str) -> relax.Expr:
        """A size as a tensor without axes; the range of one number is an operator that every target has."""
        key = (str(size), dtype)
        if key not in self._known_scalars:
            row = self.emit(R.arange(size, size + 1, 1, dtype))
            self._known_scalars[key] = self.emit(R.reshape(row, []))
        return self._known_scalars[key]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> relax.Var | KnownValue:
        """A constant of the model: known if it is a number or small and of integers, else a weight.

        Weights are parameters of the function, given when it is called: they may be of any size.
        """
        kind = array.dtype.name
        if array.size <= 1 or (kind in ("int32", "int64", "bool") and array.size <= _MAX_KNOWN):
            return KnownValue.of(array)
        return self.add_weight(name, array)

    def add_weight(self, name: str, array: np.ndarray[Any, Any]) -> relax.Var:
        """A new parameter of the function, with its value; ``name`` is that of a tensor in the file."""
        unique = name
        while unique in self.weights:
            unique += "_"
        var = relax.Var(_identifier(unique), relax.TensorType(array.shape, array.dtype.name))
        self.weights[unique] = (var, array)
        return var

    # -- what converters ask ----------------------------------------------------------------------------------------

    def is_constant(self, value: Any) -> bool:
        """Whether a value, of ``inputs`` or of ``values``, is made of numbers known at import."""
        return isinstance(value, tvm.ir.GenericConst) or (isinstance(value, KnownValue) and value.is_number)

    def constant_value(self, value: Any) -> np.ndarray[Any, Any]:
        """The numbers of a value for which ``is_constant`` holds."""
        return value.array if isinstance(value, KnownValue) else value.value.numpy()

    def position_ids(self) -> relax.Var:
        """The input that holds the tokens' positions, int64 or int32 [batch, seq]; added if the graph has none."""
        if self._positions is None:
            if self._spare_positions is None:
                raise UnsupportedNode("it needs the tokens' positions, and no input of token ids tells their shape")
            self._positions = self._spare_positions
        return self._positions

    @property
    def added_positions(self) -> relax.Var | None:
        """The positions input that the graph did not have and a converter asked for, or None."""
        return self._spare_positions if self._positions is self._spare_positions else None

    def set_positions(self, existing: relax.Var | None, spare: relax.Var | None) -> None:
        """Set the graph's own input of positions, and the one to add if there is none."""
        self._positions, self._spare_positions = existing, spare

    # -- arithmetic of sizes ------------------------------------------------------------------------------------------

    def simplify(self, size: Any) -> Any:
        """A size in its simplest form, a Python int if it is a number."""
        return number(self.analyzer.simplify(size)) if isinstance(size, tvm.ir.Expr) else int(size)

    def proved(self, condition: Any) -> bool:
        """Whether a condition on sizes always holds."""
        return bool(self.analyzer.can_prove(condition)) if isinstance(condition, tvm.ir.Expr) else bool(condition)

    def equal(self, a: Any, b: Any) -> bool:
        """Whether two sizes are always equal."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self.analyzer.can_prove_equal(a, b))


def _identifier(name: str) -> str:
    """An ONNX name as the name of a Relax variable."""
    word = re.sub(r"\W", "_", name)
    return word if word and not word[0].isdigit() else f"w_{word}"
