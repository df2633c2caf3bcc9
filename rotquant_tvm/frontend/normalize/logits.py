"""The logits among a step's outputs, and the place before the output layer where one token of each row is enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax, tirx

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.normalize.cases import StepInputs
from rotquant_tvm.frontend.normalize.input_roles import IDS
from rotquant_tvm.frontend.normalize.movement import moved_from
from rotquant_tvm.frontend.normalize.scalar_operators import ELEMENTWISE
from rotquant_tvm.frontend.normalize.size_arithmetic import Size, number, same_size, size_vars
from rotquant_tvm.frontend.normalize.step_view import dims, dtype_of, op_name
from rotquant_tvm.frontend.step_graph import StepGraph


@dataclass(frozen=True)
class OutputLayer:
    """The last operators, each of which computes a token from itself.

    ``logits`` is computed from ``hidden`` (a token per row of [batch, seq, width] or [batch * seq, width]) by the
    variables ``chain``, in order. ``selected``: the source itself takes the last token, and ``chain`` begins behind
    that, with [batch, 1, width] or [batch, width] in the variable ``selected`` in place of ``hidden``.
    """

    logits: relax.Var
    hidden: relax.Var
    chain: tuple[relax.Var, ...]
    selected: relax.Var | None


def find_logits(step: StepInputs, graph: StepGraph, presents: set[int]) -> int:
    """The output that holds the logits; raises ModelError if there is none, or more than one could."""
    found = []
    for index, output in enumerate(step.view.outputs):
        shape = dims(output)
        if index in presents or not isinstance(output, relax.Var) or "float" not in dtype_of(output) or not shape:
            continue
        if len(shape) in (2, 3) and isinstance(shape[-1], int) and same_size(shape[0], step.roles.batch):
            found.append(index)
    named = [index for index in found if "logits" in graph.outputs[index].lower()]
    vocabulary = _vocabulary(step)
    sized = [index for index in found if dims(step.view.outputs[index])[-1] == vocabulary]
    for choice in (named, found, sized):
        if len(choice) == 1:
            return choice[0]
    if not found:
        raise ModelError(f"{graph.source}: no output holds logits [batch, seq, vocab]; its outputs are {graph.outputs}")
    names = ", ".join(repr(graph.outputs[index]) for index in found)
    raise ModelError(f"{graph.source}: any of the outputs {names} could be the logits; name that one logits")


def _vocabulary(step: StepInputs) -> int | None:
    """Rows of the table that the token ids look up."""
    ids = step.roles.of(IDS, step.inputs)[0]
    for var in step.view.values:
        call = step.view.values[var]
        if op_name(call) == "take" and ids in set(step.view.slice([call.args[1]])):
            shape = dims(call.args[0])
            return shape[0] if shape and isinstance(shape[0], int) else None
    return None


def find_output_layer(step: StepInputs, logits: relax.Var, source: str) -> OutputLayer:
    """Walk back from the logits over operators that compute each token from itself, to before the last products."""
    walk = _Walk(step)
    at, best = logits, (logits, 0)
    chain: list[relax.Var] = []
    while True:
        if (whole := walk.selection(at)) is not None:
            return OutputLayer(logits, whole, tuple(reversed(chain)), at)
        before = walk.before(at)
        if before is None:
            break
        chain.append(at)
        if step.view.op(at) == "matmul":
            best = (before, len(chain))
        at = before
    hidden, length = best
    if not walk.is_per_token(hidden):
        raise ModelError(f"{source}: the logits have the shape {dims(logits)}, not [batch, seq, vocab]")
    return OutputLayer(logits, hidden, tuple(reversed(chain[:length])), None)


class _Walk:
    """Steps back from a value of all tokens to the one that it is computed from, token by token."""

    def __init__(self, step: StepInputs) -> None:
        self.step, self.batch, self.seq = step, step.roles.batch, step.roles.seq

    def is_per_token(self, var: relax.Expr) -> bool:
        """Whether a value has the shape [batch, seq, width] or [batch * seq, width]."""
        shape = dims(var)
        if shape is None or not isinstance(shape[-1], int):
            return False
        if len(shape) == 3:
            return same_size(shape[0], self.batch) and same_size(shape[1], self.seq)
        return len(shape) == 2 and same_size(shape[0], self.batch * self.seq)

    def before(self, var: relax.Var) -> relax.Var | None:
        """The value that a token of ``var`` is computed from, token by token; None if it is computed otherwise."""
        call = self.step.view.value(var)
        name = op_name(call)
        shape = dims(var)
        if not name or shape is None:
            return None
        if name == "matmul":
            x, weight = call.args
            usable = len(dims(weight) or []) == 2 and self._fixed(weight)
            return x if usable and isinstance(x, relax.Var) else None
        if name in ("nn.layer_norm", "nn.rms_norm"):
            axes = [int(axis) % len(shape) for axis in call.attrs.axes]
            fixed = all(self._fixed(arg) for arg in call.args[1:])
            return call.args[0] if fixed and axes == [len(shape) - 1] else None
        if name in ("reshape", "strided_slice"):
            same = self.is_per_token(var) and self.is_per_token(call.args[0])
            same = same and dims(call.args[0])[-1] == shape[-1]
            return call.args[0] if same and isinstance(call.args[0], relax.Var) and self._unit_stride(call) else None
        if name in ELEMENTWISE:
            return self._elementwise(call, shape)
        return None

    def _elementwise(self, call: relax.Call, shape: list[Size]) -> relax.Var | None:
        tokens = [arg for arg in call.args if isinstance(arg.ty, relax.TensorType) and not self._fixed(arg)]
        if len(tokens) != 1 or not isinstance(tokens[0], relax.Var):
            return None
        same = [str(size) for size in dims(tokens[0]) or []] == [str(size) for size in shape]
        return tokens[0] if same else None

    def _fixed(self, expr: relax.Expr) -> bool:
        """Whether an expression is made of weights and constants, and of one size for any number of tokens."""
        inputs = set(self.step.inputs)
        return not size_vars([expr.ty]) and not any(var in inputs for var in self.step.view.slice([expr]))

    @staticmethod
    def _unit_stride(call: relax.Call) -> bool:
        """Whether a slice of the same shape is the whole: the strides are 1."""
        if op_name(call) != "strided_slice" or len(call.args) < 5:
            return True
        return all(isinstance(stride, tirx.IntImm) and int(stride) == 1 for stride in call.args[4].fields)

    def selection(self, var: relax.Var) -> relax.Var | None:
        """The value of all tokens, [batch, seq, width], of which ``var`` is the last token; None if it is none."""
        call = self.step.view.value(var)
        name = op_name(call)
        if name not in ("strided_slice", "take") or not isinstance(call.args[0], relax.Var):
            return None
        whole = call.args[0]
        if len(dims(whole) or []) != 3 or not self.is_per_token(whole) or moved_from(self.step.view, var) is None:
            return None
        last = self.seq - 1
        if name == "take":
            index = call.args[1].value.numpy() if not isinstance(call.args[1], relax.Var) else None
            axis = int(call.attrs.axis) % 3 if call.attrs.axis is not None else -1
            return whole if axis == 1 and index is not None and np.all(index == -1) and index.size == 1 else None
        axes, begins = ([*arg.fields] for arg in call.args[1:3])
        if [int(axis) % 3 for axis in axes] != [1] or not self._unit_stride(call):
            return None
        begin = begins[0]
        is_last = int(begin) == -1 if isinstance(begin, tirx.IntImm) else same_size(begin, last)
        return whole if is_last and self._is_one(var) else None

    def _is_one(self, var: relax.Var) -> bool:
        """Whether the second axis has one element; TVM does not know that there is a token at all."""
        shape = dims(var)
        return shape is not None and all(number(shape[1], {self.seq: seq}) == 1 for seq in (1, 2, 7))
