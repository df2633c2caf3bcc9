"""Steps in NumPy: an exported program's as its caller would run it, and the canonical one that is made of it."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax, tirx

from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.step_view import StepView
from rotquant_tvm.frontend.step_graph import SOFTCAPS

_erf = np.vectorize(math.erf, otypes=[np.float64])


def attention(attrs, cap, query, key, value, bias=0.0):
    """BSHD operands with grouped heads; the last query sees the last key."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query.astype(np.float64), key.astype(np.float64)) * float(attrs.scale.value)
    scores = cap * np.tanh(scores / cap) if cap else scores
    if attrs.causal_mask:
        assert attrs.causal_mask == "BottomRight"
        distance = np.arange(key.shape[1] - query.shape[1], key.shape[1])[:, None] - np.arange(key.shape[1])
        hidden = (distance < 0) | (distance >= (attrs.window_size or np.inf))
        scores = np.where(hidden, -np.inf, scores)
    scores = scores + np.asarray(bias, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def _rms_norm(attrs, x, weight):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + float(attrs.epsilon)) * weight


def _layer_norm(attrs, x, weight, bias):
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + float(attrs.epsilon)) * weight + bias


_NEURAL = {
    "relax.nn.rms_norm": _rms_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.silu": lambda _, x: x / (1 + np.exp(-x.astype(np.float64))),
    "relax.nn.gelu": lambda _, x: x * 0.5 * (1 + _erf(x / np.sqrt(2))),
    "relax.nn.gelu_tanh": lambda _, x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


_ATTENTION = ("relax.nn.attention", "relax.nn.attention_bias")


class _Run(Evaluation):
    def _cap(self, call) -> float:
        """The soft-capping of an attention; 0 for none."""
        caps = (self.view.function.attrs or {}).get(SOFTCAPS, [])
        calls = [value for var, value in self.view.values.items() if "relax." + self.view.op(var) in _ATTENTION]
        return float(caps[next(i for i, other in enumerate(calls) if other.same_as(call))]) if caps else 0.0

    def _call(self, call):
        if call.op.name in _ATTENTION:
            result = attention(call.attrs, self._cap(call), *(self._expr(arg) for arg in call.args))
        elif call.op.name in _NEURAL:
            result = _NEURAL[call.op.name](call.attrs, *(self._expr(arg) for arg in call.args))
        else:
            return super()._call(call)
        return result.astype(str(call.ty.dtype))


def run(function: relax.Function, values: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a function; every value must have its parameter's rank, sizes and dtype."""
    sizes = {}
    for param, value in zip(function.params, values, strict=True):
        assert str(param.ty.dtype) == str(value.dtype), param.name
        for size, actual in zip(param.ty.shape.values, value.shape, strict=True):
            wanted = sizes.setdefault(size, actual) if isinstance(size, tirx.Var) else int(size)
            assert wanted == actual, (param.name, value.shape)
    view = StepView(function)
    run = _Run(view, dict(zip(function.params, values, strict=True)), sizes)
    return [np.asarray(run.value(output)) for output in view.outputs]


def run_step(graph, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of a step graph by name; inputs by their names, with "." as "__"."""
    values = [np.asarray(inputs[name.replace(".", "__")]) for name in graph.inputs]
    return dict(zip(graph.outputs, run(graph.mod["main"], [*values, *graph.weights]), strict=True))


class CanonicalRun:
    """Calls of an imported model one after the other, as a session makes them."""

    def __init__(self, imported, batch: int) -> None:
        self.imported, self.batch, self.length = imported, batch, 0
        function = imported.mod["main"]
        pasts = function.params[3 : int(function.attrs["num_input"])]
        self.pasts = [
            np.zeros((batch, int(p.ty.shape[1]), 0, int(p.ty.shape[3])), str(p.ty.dtype)) for p in pasts
        ]

    def step(self, ids: np.ndarray, last: list[int] | None = None) -> np.ndarray:
        """Logits [batch, vocab] of the token ``last`` of each row, by default the last."""
        seq = ids.shape[1]
        positions = np.broadcast_to(np.arange(self.length, self.length + seq), ids.shape)
        last = np.full(self.batch, seq - 1) if last is None else np.asarray(last)
        inputs = [x.astype(np.int32) for x in (ids, positions, last)]
        logits, *self.pasts = run(self.imported.mod["main"], [*inputs, *self.pasts, *self.imported.weights])
        self.length += seq
        return logits
