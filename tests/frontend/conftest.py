"""Tiny models, and an executor of canonical modules: attention in NumPy, all else compiled by TVM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

_NUMBER = itertools.count()

_TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}


def tiny_model(kind: str, **overrides) -> torch.nn.Module:
    """A random model of a transformers config class; norms and biases are not trivial."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**(_GPT2 if kind == "GPT2" else _TINY) | overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    return model


def reference_attention(q, k, v, scale, window):
    """BSHD attention with grouped heads; the last query sees the last key."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    distance = np.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - np.arange(k.shape[1])
    hidden = (distance < 0) | ((distance >= window) if window else False)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def attention_attributes(call: relax.Call) -> tuple[float, int | None]:
    """(scale, window) of an ``R.nn.attention``."""
    window = call.attrs.window_size
    return float(call.attrs.scale.value), None if window is None else int(window)


@mutator
class _AttentionToNumpy(PyExprMutator):
    """Replace each attention by a call of a NumPy function."""

    def visit_call_(self, call):
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") != "relax.nn.attention":
            return call
        scale, window = attention_attributes(call)

        def attend(q, k, v, out):
            out.copyfrom(
                reference_attention(q.numpy(), k.numpy(), v.numpy(), scale, window).astype(out.dtype)
            )

        name = f"rotquant.test.attention_{next(_NUMBER)}"
        tvm.register_global_func(name, attend, override=True)
        return relax.op.call_dps_packed(name, relax.Tuple(list(call.args)), out_ty=call.args[0].ty)


@dataclass
class CanonicalRunner:
    """A compiled canonical module with its weights."""

    imported: object

    def __post_init__(self):
        function = _AttentionToNumpy(self.imported.mod).visit_expr(self.imported.mod["main"])
        mod = relax.get_pipeline("zero")(tvm.IRModule({"main": function}))
        self.vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
        self.weights = [tvm.runtime.tensor(weight) for weight in self.imported.weights]
        self.dtype = self.imported.weights[0].dtype

    def empty_past(self, batch):
        return [
            np.zeros((batch, kv_heads, 0, head_dim), self.dtype)
            for kv_heads, _, head_dim in self.imported.config["layers"]
            for _ in "kv"
        ]

    def step(self, ids, past, last=None, positions=None):
        """ids [batch, seq] → (logits of token ``last`` of each row, presents)."""
        batch, seq = ids.shape
        if positions is None:
            positions = np.broadcast_to(np.arange(seq) + past[0].shape[2], (batch, seq))
        last = np.full(batch, seq - 1) if last is None else last
        inputs = [np.ascontiguousarray(x, dtype=np.int32) for x in (ids, positions, last)]
        out = self.vm["main"](*(tvm.runtime.tensor(x) for x in [*inputs, *past]), *self.weights)
        logits, *presents = (x.numpy() for x in out)
        return logits, presents


@pytest.fixture
def runner():
    return CanonicalRunner


@pytest.fixture(scope="session")
def tiny():
    return tiny_model


@pytest.fixture
def attentions():
    """List (scale, window) of a module's attentions, in order."""

    def find(mod):
        bindings = relax.analysis.get_var2val(mod["main"]).values()
        calls = [v for v in bindings if isinstance(v, relax.Call)]
        return [attention_attributes(c) for c in calls if getattr(c.op, "name", "") == "relax.nn.attention"]

    return find
