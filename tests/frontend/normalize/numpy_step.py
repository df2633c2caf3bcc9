"""Running steps in NumPy, and sequences of calls through a source's step and through the canonical one."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, tirx

from rotquant_tvm.frontend.imported_model import ImportedModel
from rotquant_tvm.frontend.normalize.evaluate import Evaluation
from rotquant_tvm.frontend.normalize.step_view import StepView
from rotquant_tvm.frontend.step_graph import SOFTCAPS, StepGraph


def _attention(query, key, value, bias, scale, causal, window, cap):
    key, value = (np.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query.astype(np.float64), key.astype(np.float64)) * scale
    scores = cap * np.tanh(scores / cap) if cap else scores
    if bias is not None:
        scores = scores + bias
    distance = np.arange(key.shape[1] - query.shape[1], key.shape[1])[:, None] - np.arange(key.shape[1])
    hidden = (distance < 0) | (distance >= (window or np.inf)) if causal else np.zeros_like(distance, bool)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value).astype(query.dtype)


class _Run(Evaluation):
    """Evaluation of a whole step, attention and norms included."""

    def _call(self, call):
        name = call.op.name
        if name in ("relax.nn.attention", "relax.nn.attention_bias"):
            args = [self._expr(arg) for arg in call.args]
            attrs = call.attrs
            window = None if attrs.window_size is None else int(attrs.window_size)
            caps = [float(cap) for cap in (self.view.function.attrs or {}).get(SOFTCAPS, [])]
            calls = [v for var, v in self.view.values.items() if self.view.op(var).startswith("nn.attention")]
            cap = caps[next(i for i, v in enumerate(calls) if v.same_as(call))] if caps else 0.0
            bias = args[3] if len(args) > 3 else None
            return _attention(*args[:3], bias, float(attrs.scale.value), bool(attrs.causal_mask), window, cap)
        if name == "relax.nn.rms_norm":
            x, weight = (self._expr(arg) for arg in call.args)
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight
        return super()._call(call)


def run(function: relax.Function, params: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a function for values of its parameters, which tell the sizes."""
    sizes = {}
    for param, value in zip(function.params, params, strict=True):
        for size, actual in zip(param.ty.shape.values, value.shape, strict=True):
            if isinstance(size, tirx.Var):
                assert sizes.setdefault(size, actual) == actual, f"{param.name} {value.shape}"
    view = StepView(function)
    evaluation = _Run(view, dict(zip(function.params, params, strict=True)), sizes)
    return [np.asarray(evaluation.value(output)) for output in view.outputs]


class SourceRun:
    """Calls of a source's step one after the other, as a caller that follows its conventions makes them."""

    def __init__(self, graph: StepGraph, batch: int) -> None:
        self.graph, self.batch, self.length = graph, batch, 0
        self.pasts: dict[str, np.ndarray] = {}
        self.ids = np.zeros((batch, 0), np.int64)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [batch, seq, vocab] of new tokens; the presents become the next pasts, in the order of the names.

        A source without a cache runs over all tokens so far.
        """
        graph, function = self.graph, self.graph.mod["main"]
        if not any(name.startswith("past_") for name in graph.inputs):
            ids = self.ids = np.concatenate([self.ids, ids], axis=1)
            self.length = 0
        seq = ids.shape[1]
        total = self.length + seq
        named = zip(graph.inputs, function.params, strict=False)
        feed = [self._input(name, param, ids, total) for name, param in named]
        outputs = dict(zip(graph.outputs, run(function, [*feed, *graph.weights]), strict=True))
        names = [name for name in graph.inputs if name.startswith("past_")]
        for index, name in enumerate(names):
            self.pasts[name] = outputs[f"present.{index}"]
        self.length = total
        return outputs["logits"]

    def _input(self, name, param, ids, total):
        dtype = str(param.ty.dtype)
        positions = np.arange(self.length, total)
        if name == "input_ids":
            return ids.astype(dtype)
        if name == "position_ids":
            return np.broadcast_to(positions, ids.shape).astype(dtype)
        if name == "cache_position":
            return positions.astype(dtype)
        if name == "attention_mask":
            return np.ones((self.batch, total), dtype)
        if name == "mask":
            width = param.ty.shape[3]
            width = int(width) if isinstance(width, tirx.IntImm) else total
            visible = np.arange(width) <= positions[:, None]
            visible = np.broadcast_to(visible, (self.batch, 1, *visible.shape))
            return visible if dtype == "bool" else np.where(visible, 0.0, -1e9).astype(dtype)
        if name not in self.pasts:
            shape = [int(tvm.sym.Analyzer().simplify(_bound(size, self.batch))) for size in param.ty.shape.values]
            self.pasts[name] = np.zeros(shape, dtype)
        return self.pasts[name]


def _bound(size, batch):
    from tvm_ffi import structural_map

    return structural_map(size, (tirx.Var, lambda var: tirx.IntImm("int64", batch if var.name == "b" else 0)))


class CanonicalRun:
    """Calls of a canonical step; rows may have lengths of their own through ``positions``."""

    def __init__(self, imported: ImportedModel, batch: int) -> None:
        self.imported, self.batch, self.length = imported, batch, 0
        function = imported.mod["main"]
        inputs = int(function.attrs["num_input"])
        self.pasts = [
            np.zeros((batch, int(param.ty.shape[1]), 0, int(param.ty.shape[3])), str(param.ty.dtype))
            for param in function.params[3:inputs]
        ]

    def step(self, ids: np.ndarray, last: np.ndarray | None = None, positions: np.ndarray | None = None) -> np.ndarray:
        """Logits [batch, vocab] of the token ``last`` of each row (default: the last)."""
        seq = ids.shape[1]
        if positions is None:
            positions = np.broadcast_to(np.arange(self.length, self.length + seq), ids.shape)
        last = np.full(self.batch, seq - 1) if last is None else last
        inputs = [ids.astype("int32"), positions.astype("int32"), last.astype("int32"), *self.pasts]
        logits, *self.pasts = run(self.imported.mod["main"], [*inputs, *self.imported.weights])
        self.length += seq
        return logits


def compare(graph: StepGraph, imported: ImportedModel, batch: int = 2, chunks: tuple[int, ...] = (4, 3, 1, 1)) -> None:
    """Run chunks through the source and through the canonical step and compare the logits of their last tokens."""
    source, canonical = SourceRun(graph, batch), CanonicalRun(imported, batch)
    rng = np.random.default_rng(7)
    for chunk in chunks:
        ids = rng.integers(0, 23, (batch, chunk))
        wanted = source.step(ids)[:, -1]
        np.testing.assert_allclose(canonical.step(ids), wanted, rtol=2e-4, atol=2e-4)
