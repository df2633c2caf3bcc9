"""Attention in the spellings that models and exporters have, each with inputs and what must be found in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from .gathered_case import Attention, causal, function_of

B, S, P = (tirx.Var(name, "int64") for name in "bsp")
HEADS, KV_HEADS, DIM = 4, 2, 8
SIZES = {"b": 2, "s": 3, "p": 5}
LOW = float(np.finfo("float32").min)
INF = math.inf


@dataclass
class Spelling:
    """A function's arguments and body; ``expected`` is None where one plain attention of ``HEADS`` heads is."""

    arguments: dict[str, tuple]
    body: Callable[..., Any]
    kv_heads: int = HEADS
    heads: int = HEADS
    scale: float = 1.0
    masked: bool = False
    softcap: float = 0.0
    dtype: str = "float32"
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=lambda: SIZES)

    @property
    def mod(self) -> tvm.IRModule:
        return function_of(self.arguments, self.body, self.dtype)

    @property
    def expected(self) -> Attention:
        return Attention(self.heads, self.kv_heads, DIM, self.scale, self.masked, self.softcap)

    def arrays(self) -> list[np.ndarray]:
        generator = np.random.default_rng(0)
        return [
            self.inputs[name] if name in self.inputs else self._array(generator, shape)
            for name, shape in self.arguments.items()
        ]

    def _array(self, generator: np.random.Generator, shape: tuple) -> np.ndarray:
        shape = [self.sizes[size.name] if isinstance(size, tirx.Var) else size for size in shape]
        return generator.standard_normal(shape).astype(self.dtype)


def const(value: Any, dtype: str = "float32") -> relax.Expr:
    return relax.const(np.asarray(value, dtype))


def qkv(kv_heads: int = HEADS, **more: tuple) -> dict[str, tuple]:
    """Arguments [b, h, s, d]."""
    kv = (B, kv_heads, P, DIM)
    return {"q": (B, HEADS, S, DIM), "k": kv, "v": kv, **more}


def attend(
    emit: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    before: Callable[[Any], Any] = lambda scores: scores,
    after: Callable[[Any, Any], Any] = lambda weights, scores: weights,
) -> Any:
    """Plain attention with a change of the scores ``before`` the softmax and of the weights ``after`` it."""
    scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
    scores = before(scores)
    return R.matmul(after(emit(R.nn.softmax(scores, -1)), scores), v)


# --- scale


def _on_scores(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda emit, q, k, v: attend(emit, q, k, v, before=lambda s: emit(operation(emit, s)))


def _on_both(emit: Any, q: Any, k: Any, v: Any) -> Any:
    root = const(math.sqrt(0.3))
    q, kt = emit(R.multiply(q, root)), emit(R.multiply(root, emit(R.permute_dims(k, [0, 1, 3, 2]))))
    return R.matmul(emit(R.nn.softmax(emit(R.matmul(q, kt)), -1)), v)


def _everywhere(emit: Any, q: Any, k: Any, v: Any) -> Any:
    q, k = emit(R.divide(q, const(2.0))), emit(R.negative(emit(R.multiply(k, const(0.25)))))
    return attend(emit, q, k, v, before=lambda s: emit(R.divide(emit(R.negative(s)), const([[0.5]]))))


def _from_shape(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """As ONNX computes it: the head dimension is taken out of a shape."""
    sizes = emit(R.shape_to_tensor(emit(R.shape_of(k))))
    dim = emit(R.astype(emit(R.take(sizes, const(3, "int64"), axis=0, mode="fast")), "float32"))
    return attend(emit, q, k, v, before=lambda s: emit(R.divide(s, emit(R.sqrt(dim)))))


SCALES = {
    "no_scale": Spelling(qkv(), attend),
    "multiplied": Spelling(qkv(), _on_scores(lambda e, s: R.multiply(const(0.3), s)), scale=0.3),
    "divided": Spelling(qkv(), _on_scores(lambda e, s: R.divide(s, const(4.0))), scale=0.25),
    "divided_by_root": Spelling(
        qkv(), _on_scores(lambda e, s: R.divide(s, e(R.sqrt(e(R.astype(const(8), "float32")))))), scale=8**-0.5
    ),
    "power": Spelling(
        qkv(), _on_scores(lambda e, s: R.multiply(s, e(R.power(const(8.0), const(-0.5))))), scale=8**-0.5
    ),
    "full": Spelling(qkv(), _on_scores(lambda e, s: R.multiply(s, e(R.full((1, 1), const(0.7))))), scale=0.7),
    "on_queries": Spelling(qkv(), lambda e, q, k, v: attend(e, e(R.multiply(q, const(0.3))), k, v), scale=0.3),
    "on_keys": Spelling(qkv(), lambda e, q, k, v: attend(e, q, e(R.divide(k, const(8.0))), v), scale=0.125),
    "split": Spelling(qkv(), _on_both, scale=0.3),
    "everywhere": Spelling(qkv(), _everywhere, scale=0.25),
    "from_shape": Spelling(qkv(), _from_shape, scale=8**-0.5),
}


# --- masks


def _masked(change: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    return lambda emit, q, k, v, m: attend(emit, q, k, v, before=lambda s: emit(change(emit, s, m)))


def _visible(row: bool = True) -> np.ndarray:
    """Which key each query sees, [2, 1, 3, 5]; without ``row`` the first query of the second row sees none."""
    visible = np.broadcast_to(causal(3, 5) == 0, (2, 1, 3, 5)).copy()
    visible[1, :, :, 1] = False
    if not row:
        visible[1, :, 0] = False
    return visible


def _mask(shape: tuple, body: Callable[..., Any], value: np.ndarray, scale: float = 1.0) -> Spelling:
    dtype = str(value.dtype)
    return Spelling(qkv(m=(shape, dtype)), body, scale=scale, masked=True, inputs={"m": value})


_ADDITIVE = np.where(_visible(), 0, -INF).astype("float32")
_FULL = (B, 1, S, P)


def _one_minus(emit: Any, scores: Any, m: Any) -> Any:
    return R.add(scores, emit(R.multiply(emit(R.subtract(const(1.0), emit(R.astype(m, "float32")))), const(LOW))))


def _slice_of_buffer(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """GPT-2: a slice of a constant triangle, ending at the last key."""
    buffer = const(np.tri(16, dtype=bool)[None, None], "bool")
    ones, axes = [1, 1], [2, 3]
    visible = emit(R.strided_slice(buffer, axes, [2, 0], [5, 5], ones))
    return attend(emit, q, k, v, before=lambda s: emit(R.where(visible, s, const(LOW))))


def _batch_of_heads(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
    """Batch and heads merged in the scores, and the mask repeated for each head."""
    q, k, v = (emit(R.reshape(x, [B * HEADS, length, DIM])) for x, length in ((q, S), (k, P), (v, P)))
    m = emit(R.reshape(emit(R.broadcast_to(m, [B, HEADS, S, P])), [B * HEADS, S, P]))
    scores = emit(R.add(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), m))
    return R.reshape(emit(R.matmul(emit(R.nn.softmax(scores, -1)), v)), [B, HEADS, S, DIM])


def _chosen_per_head(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
    """A mask that has an axis of heads and is the same for all."""
    m = emit(R.broadcast_to(m, [B, HEADS, S, P]))
    return attend(emit, q, k, v, before=lambda s: emit(R.add(s, emit(R.where(m, const(0.0), const(LOW))))))


def _two_masks(emit: Any, q: Any, k: Any, v: Any, m: Any, n: Any) -> Any:
    hidden = lambda s: emit(R.where(m, const(-1e9), s))  # noqa: E731
    return attend(emit, q, k, v, before=lambda s: emit(R.add(n, hidden(s))))


def _bounded(emit: Any, scores: Any, m: Any) -> Any:
    return R.maximum(emit(R.add(scores, m)), const(LOW))


_EMPTY_ROW = np.where(_visible(False), 0, -INF).astype("float32")
_FILLS = {"inf": -INF, "billion": -1e9, "ten_thousand": -1e4, "lowest": LOW}

MASKS = {
    "additive": _mask(_FULL, _masked(lambda e, s, m: R.add(s, m)), _ADDITIVE),
    "added_first": _mask(_FULL, _masked(lambda e, s, m: R.add(m, e(R.multiply(s, const(0.5))))), _ADDITIVE, 0.5),
    "subtracted": _mask(_FULL, _masked(lambda e, s, m: R.subtract(s, m)), -np.maximum(_ADDITIVE, LOW)),
    "scaled_with_scores": _mask(
        _FULL, _masked(lambda e, s, m: R.multiply(e(R.add(s, m)), const(0.5))), np.maximum(_ADDITIVE, -3.0), 0.5
    ),
    "of_keys": _mask((B, 1, 1, P), _masked(lambda e, s, m: R.add(s, m)), _ADDITIVE[:, :, -1:]),
    "without_batch": _mask((S, P), _masked(lambda e, s, m: R.add(s, m)), causal(3, 5)),
    "zeros_and_ones": _mask((B, 1, S, P), _masked(_one_minus), _visible().astype("int64")),
    **{
        f"where_{name}": _mask(
            _FULL, _masked(lambda e, s, m, fill=fill: R.where(m, s, const(fill))), _visible(name == "inf")
        )
        for name, fill in _FILLS.items()
    },
    "filled": _mask(_FULL, _masked(lambda e, s, m: R.where(m, e(R.full_like(s, const(LOW))), s)), ~_visible(False)),
    "bounded": _mask(_FULL, _masked(_bounded), _EMPTY_ROW),
    "batch_of_heads": _mask(_FULL, _batch_of_heads, _ADDITIVE),
    "chosen_per_head": _mask(_FULL, _chosen_per_head, _visible()),
    "two_masks": Spelling(
        qkv(m=(_FULL, "bool"), n=((B, 1, 1, P), "float32")),
        _two_masks,
        masked=True,
        inputs={"m": ~_visible(), "n": np.float32([0, 0, 0, 0, 0, LOW, 0, 0, 0, 0]).reshape(2, 1, 1, 5)},
    ),
    "slice_of_buffer": Spelling(
        {"q": (B, HEADS, 3, DIM), "k": (B, HEADS, 5, DIM), "v": (B, HEADS, 5, DIM)}, _slice_of_buffer, masked=True
    ),
    "common_shift": Spelling(qkv(), _on_scores(lambda e, s: R.add(s, const(3.0)))),
    "less_the_largest": Spelling(qkv(), _on_scores(lambda e, s: R.subtract(s, e(R.max(s, [-1], keepdims=True))))),
}


# --- guards of rows without a key


def _guarded(emit: Any, weights: Any, scores: Any) -> Any:
    """As torch decomposes its safe softmax, ``any`` being a maximum of int8 in TVM."""
    seen = emit(R.logical_not(emit(R.equal(scores, const(-INF)))))
    seen = emit(R.max(emit(R.astype(seen, "int8")), [-1], keepdims=True))
    empty = emit(R.logical_not(emit(R.astype(seen, "bool"))))
    return emit(R.where(empty, emit(R.full_like(weights, const(0.0))), weights))


def _without_nan(emit: Any, weights: Any, scores: Any) -> Any:
    return emit(R.where(emit(R.isnan(weights)), const(0.0), weights))


def _guard(guard: Callable[..., Any], change: Callable[..., Any], value: np.ndarray) -> Spelling:
    def body(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
        before, after = (lambda s: emit(change(s, m))), (lambda w, s: guard(emit, w, s))
        return attend(emit, q, k, v, before=before, after=after)

    return _mask(_FULL, body, value)


GUARDS = {
    "guarded": _guard(_guarded, R.add, _EMPTY_ROW),
    "guarded_choice": _guard(_guarded, lambda s, m: R.where(m, s, const(-INF)), _visible(False)),
    "without_nan": _guard(_without_nan, R.add, _EMPTY_ROW),
    "guarded_finite": _guard(_guarded, lambda s, m: R.where(m, s, const(LOW)), _visible(False)),
}
