"""Running a StepGraph's function, attention in NumPy and all else compiled by TVM."""

from __future__ import annotations

import itertools

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from rotquant_tvm.frontend.step_graph import SOFTCAPS, StepGraph

from .onnx_cases import Graph, imported, reference

_NUMBER = itertools.count()


def attention(q, k, v, bias=None, *, scale, causal, window, softcap):
    """Attention in float64 of q [batch, seq, heads, d] over k, v [batch, length, kv_heads, d]; bias as TVM has it."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    if bias is not None:
        scores = scores + bias.astype(np.float64)
    distance = np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - np.arange(k.shape[1])
    hidden = (distance < 0) | (distance >= (window or np.inf)) if causal else np.zeros_like(distance, bool)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@mutator
class _AttentionToNumpy(PyExprMutator):
    """Replace each attention by a call of a NumPy function."""

    def __init__(self, mod, softcaps):
        super().__init__(mod)
        self.softcaps = iter(softcaps)

    def visit_call_(self, call):
        call = self.visit_expr_post_order(call)
        if not getattr(call.op, "name", "").startswith("relax.nn.attention"):
            return call
        settings = {
            "scale": float(call.attrs.scale.value),
            "causal": {None: False, "BottomRight": True}[call.attrs.causal_mask],
            "window": None if call.attrs.window_size is None else int(call.attrs.window_size),
            "softcap": next(self.softcaps, 0.0),
        }

        def attend(*tensors):
            *operands, out = tensors
            out.copyfrom(attention(*(x.numpy() for x in operands), **settings).astype(out.dtype))

        name = f"rotquant.test.step_attention_{next(_NUMBER)}"
        tvm.register_global_func(name, attend, override=True)
        return relax.op.call_dps_packed(name, relax.Tuple(list(call.args)), out_ty=call.ty)


class StepRunner:
    """A compiled StepGraph with its weights."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        function = graph.mod["main"]
        softcaps = function.attrs.get(SOFTCAPS) if function.attrs else None
        function = _AttentionToNumpy(graph.mod, [float(cap) for cap in softcaps or ()]).visit_expr(function)
        mod = relax.get_pipeline("zero")(tvm.IRModule({"main": function}))
        with tvm.transform.PassContext(opt_level=3, disabled_pass=["RewriteDataflowReshape"]):
            executable = tvm.compile(mod, "llvm")
        self.vm = relax.VirtualMachine(executable, tvm.cpu())
        self.weights = [tvm.runtime.tensor(np.ascontiguousarray(weight)) for weight in graph.weights]

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name for inputs by name."""
        inputs = [tvm.runtime.tensor(np.array(feed[name], order="C")) for name in self.graph.inputs]
        outputs = self.vm["main"](*inputs, *self.weights)
        outputs = [outputs] if isinstance(outputs, tvm.runtime.Tensor) else list(outputs)
        return {name: out.numpy() for name, out in zip(self.graph.outputs, outputs, strict=True)}


def check(graph: Graph, folder, rtol: float = 1e-4, feeds: list[dict[str, np.ndarray]] | None = None) -> StepGraph:
    """Compare all outputs of a graph with onnxruntime's, each relative to its largest element; returns the import.

    ``feeds``: inputs in the place of the graph's own, and what it has no input for is not in the file.
    """
    model = graph.model()
    step = imported(model, folder)
    run = StepRunner(step)
    for feed in feeds or [graph.feed]:
        expected, results = reference(model, feed), run(feed)
        assert set(results) == set(expected) and expected
        for name, wanted in expected.items():
            check_close(name, results[name], wanted, rtol)
    return step


def check_close(name: str, result: np.ndarray, wanted: np.ndarray, rtol: float) -> None:
    """Compare two tensors, relative to the largest element."""
    assert result.shape == wanted.shape and result.dtype == wanted.dtype, name
    error = np.abs(result.astype(np.float64) - wanted).max() / np.abs(wanted.astype(np.float64)).max()
    assert error <= rtol, f"{name} differs by {error:.1e}"
