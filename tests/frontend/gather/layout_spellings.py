"""Spellings of layouts, repeated heads, soft-capping and casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.relax import op as R

from .gathered_case import causal
from .spellings import DIM, HEADS, KV_HEADS, LOW, B, P, S, Spelling, attend, const, qkv

GROUP = HEADS // KV_HEADS


# --- layouts


def _softmax(emit: Any, scores: Any, axis: int = -1) -> Any:
    return emit(R.nn.softmax(emit(R.multiply(scores, const(0.3))), axis))


def _merged(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """Products of rank 3 over batch times heads, scores of rank 4."""
    q, k, v = (emit(R.reshape(x, [B * HEADS, length, DIM])) for x, length in ((q, S), (k, P), (v, P)))
    scores = emit(R.reshape(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), [B, HEADS, S, P]))
    weights = emit(R.reshape(_softmax(emit, scores), [B * HEADS, S, P]))
    return R.reshape(emit(R.matmul(weights, v)), [B, HEADS, S, DIM])


def _keys_transposed(emit: Any, q: Any, kt: Any, v: Any) -> Any:
    return R.matmul(_softmax(emit, emit(R.matmul(q, kt))), v)


def _joined_first(emit: Any, q: Any, past: Any, new: Any, v: Any) -> Any:
    """The cache is [b, s, h, d] and turned after the new tokens joined it."""
    k = emit(R.permute_dims(emit(R.concat([past, new], axis=1)), [0, 2, 3, 1]))
    return R.matmul(_softmax(emit, emit(R.matmul(q, k))), v)


def _sequence_first(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """[s, b, h, d], heads and batch merged, as in Megatron."""
    q, k, v = (
        emit(R.permute_dims(emit(R.reshape(x, [length, B * HEADS, DIM])), [1, 0, 2]))
        for x, length in ((q, S), (k, P), (v, P))
    )
    scores = emit(R.reshape(emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1])))), [B, HEADS, S, P]))
    weights = emit(R.reshape(_softmax(emit, scores), [B * HEADS, S, P]))
    out = emit(R.reshape(emit(R.matmul(weights, v)), [B, HEADS, S, DIM]))
    return R.reshape(emit(R.permute_dims(out, [2, 0, 1, 3])), [S, B, HEADS * DIM])


def _einsum(first: str, second: str) -> Callable[..., Any]:
    def body(emit: Any, q: Any, k: Any, v: Any) -> Any:
        return R.einsum((_softmax(emit, emit(R.einsum((q, k), first))), v), second)

    return body


def _keys_first(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """Scores [keys, queries], the softmax over the first of them, and values times weights."""
    weights = _softmax(emit, emit(R.matmul(k, emit(R.permute_dims(q, [0, 1, 3, 2])))), axis=2)
    return R.matmul(emit(R.permute_dims(v, [0, 1, 3, 2])), weights)


def _single_head(emit: Any, q: Any, k: Any, v: Any) -> Any:
    return R.matmul(_softmax(emit, emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1]))))), v)


def _flat(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """Queries, keys and values as linear layers leave them: [b, s, h*d]."""
    q, k, v = (
        emit(R.permute_dims(emit(R.reshape(x, [B, length, HEADS, DIM])), [0, 2, 1, 3]))
        for x, length in ((q, S), (k, P), (v, P))
    )
    return R.matmul(_softmax(emit, emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))), v)


_BSHD = {"q": (B, S, HEADS, DIM), "k": (B, P, HEADS, DIM), "v": (B, P, HEADS, DIM)}
_SBHD = {"q": (S, B, HEADS, DIM), "k": (P, B, HEADS, DIM), "v": (P, B, HEADS, DIM)}

LAYOUTS = {
    "merged": Spelling(qkv(), _merged, scale=0.3),
    "keys_transposed": Spelling(qkv() | {"k": (B, HEADS, DIM, P)}, _keys_transposed, scale=0.3),
    "joined_first": Spelling(
        {
            "q": (B, HEADS, S, DIM),
            "past": (B, P, HEADS, DIM),
            "new": (B, S, HEADS, DIM),
            "v": (B, HEADS, P + S, DIM),
        },
        _joined_first,
        scale=0.3,
        inputs={"v": np.random.default_rng(5).standard_normal((2, HEADS, 8, DIM)).astype("float32")},
    ),
    "sequence_first": Spelling(_SBHD, _sequence_first, scale=0.3),
    "einsum_bhsd": Spelling(qkv(), _einsum("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"), scale=0.3),
    "einsum_bshd": Spelling(_BSHD, _einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"), scale=0.3),
    "einsum_transposed": Spelling(_BSHD, _einsum("b q h d, b k h d -> b h q k", "bhqk,bkhd->bhdq"), scale=0.3),
    "keys_first": Spelling(qkv(), _keys_first, scale=0.3),
    "single_head": Spelling(
        {"q": (B, S, DIM), "k": (B, P, DIM), "v": (B, P, DIM)}, _single_head, heads=1, kv_heads=1, scale=0.3
    ),
    "flat": Spelling({"q": (B, S, HEADS * DIM), "k": (B, P, HEADS * DIM), "v": (B, P, HEADS * DIM)}, _flat, scale=0.3),
}


# --- repeated heads


def _repeated(repeat: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda emit, q, k, v: attend(emit, q, repeat(emit, k), repeat(emit, v))


def _expanded(emit: Any, x: Any) -> Any:
    wide = emit(R.broadcast_to(emit(R.expand_dims(x, [2])), [B, KV_HEADS, GROUP, P, DIM]))
    return emit(R.reshape(wide, [B, HEADS, P, DIM]))


def _taken(index: list[int]) -> Callable[[Any, Any], Any]:
    return lambda emit, x: emit(R.take(x, const(index, "int64"), axis=1, mode="clip"))


def _grouped(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """[b, kv_head, group, s, d] times keys and values with a group of 1."""
    q = emit(R.reshape(q, [B, KV_HEADS, GROUP, S, DIM]))
    k, v = (emit(R.expand_dims(x, [2])) for x in (k, v))
    weights = emit(R.nn.softmax(emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 2, 4, 3])))), -1))
    return R.reshape(emit(R.matmul(weights, v)), [B, HEADS, S, DIM])


def _grouped_einsum(emit: Any, q: Any, k: Any, v: Any) -> Any:
    q = emit(R.reshape(q, [B, S, KV_HEADS, GROUP, DIM]))
    weights = emit(R.nn.softmax(emit(R.einsum((q, k), "bqhgd,bkhd->bhgqk")), -1))
    return R.reshape(emit(R.einsum((weights, v), "bhgqk,bkhd->bqhgd")), [B, S, HEADS * DIM])


def _heads_in_rows(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """One kv head [b, s, d]; heads and queries are one axis of the products."""
    scores = emit(R.matmul(emit(R.reshape(q, [B, HEADS * S, DIM])), emit(R.permute_dims(k, [0, 2, 1]))))
    weights = emit(R.nn.softmax(emit(R.reshape(scores, [B, HEADS, S, P])), -1))
    out = emit(R.matmul(emit(R.reshape(weights, [B, HEADS * S, P])), v))
    return R.reshape(out, [B, HEADS, S, DIM])


def _heads_in_rows_inside(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
    """As above with [s, h] in the rows, and a mask [b, s, 1, keys] (GPT-BigCode)."""
    scores = emit(R.matmul(emit(R.reshape(q, [B, S * HEADS, DIM])), emit(R.permute_dims(k, [0, 2, 1]))))
    scores = emit(R.where(m, emit(R.reshape(scores, [B, S, HEADS, P])), const(LOW)))
    weights = emit(R.reshape(emit(R.nn.softmax(scores, -1)), [B, S * HEADS, P]))
    return R.reshape(emit(R.matmul(weights, v)), [B, S, HEADS * DIM])


def _copies(emit: Any, x: Any) -> Any:
    return emit(R.concat([x, x], axis=1))


_ONE = {"k": (B, P, DIM), "v": (B, P, DIM)}

REPEATS = {
    "expanded": Spelling(qkv(KV_HEADS), _repeated(_expanded), KV_HEADS),
    "repeat": Spelling(qkv(KV_HEADS), _repeated(lambda e, x: e(R.repeat(x, GROUP, 1))), KV_HEADS),
    "tile": Spelling(qkv(KV_HEADS), _repeated(lambda e, x: e(R.tile(x, [1, GROUP, 1, 1]))), KV_HEADS),
    "tile_one": Spelling(qkv(1), _repeated(lambda e, x: e(R.tile(x, [HEADS, 1, 1]))), 1),
    "copies": Spelling(qkv(KV_HEADS), _repeated(_copies), KV_HEADS),
    "taken": Spelling(qkv(KV_HEADS), _repeated(_taken([0, 0, 1, 1])), KV_HEADS),
    "taken_around": Spelling(qkv(KV_HEADS), _repeated(_taken([0, 1, 0, 1])), KV_HEADS),
    "grouped": Spelling(qkv(KV_HEADS), _grouped, KV_HEADS),
    "grouped_einsum": Spelling(
        {"q": (B, S, HEADS, DIM), "k": (B, P, KV_HEADS, DIM), "v": (B, P, KV_HEADS, DIM)}, _grouped_einsum, KV_HEADS
    ),
    "one_head_broadcast": Spelling(qkv(1), attend, 1),
    "heads_in_rows": Spelling(qkv() | _ONE, _heads_in_rows, 1),
    "heads_in_rows_inside": Spelling(
        {"q": (B, S, HEADS, DIM), **_ONE, "m": ((1, S, 1, P), "bool")},
        _heads_in_rows_inside,
        1,
        masked=True,
        inputs={"m": (causal(3, 5) == 0)[None, :, None]},
    ),
}


# --- soft-capping


def _capped(emit: Any, scores: Any) -> Any:
    """Scores times 0.5, capped at 2."""
    bounded = emit(R.tanh(emit(R.divide(emit(R.multiply(scores, const(0.5))), const(2.0)))))
    return emit(R.multiply(bounded, const(2.0)))


def _capped_masked(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
    return attend(emit, q, k, v, before=lambda s: emit(R.add(_capped(emit, s), m)))


SOFTCAPS = {
    "capped": Spelling(qkv(), lambda e, *x: attend(e, *x, before=lambda s: _capped(e, s)), scale=0.5, softcap=2.0),
    "capped_at_one": Spelling(qkv(), lambda e, *x: attend(e, *x, before=lambda s: e(R.tanh(s))), softcap=1.0),
    "capped_masked": Spelling(
        qkv(KV_HEADS, m=((B, 1, S, P), "float32")),
        lambda e, q, k, v, m: _capped_masked(e, q, _expanded(e, k), _expanded(e, v), m),
        KV_HEADS,
        scale=0.5,
        softcap=2.0,
        masked=True,
        inputs={"m": np.broadcast_to(causal(3, 5), (2, 1, 3, 5)).copy()},
    ),
}


# --- casts


def _cast(emit: Any, dtype: str, *tensors: Any) -> list[Any]:
    return [emit(R.astype(x, dtype)) for x in tensors]


def _softmax_in_float32(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
    """transformers: scores in half precision, the softmax in float32, its weights cast back."""
    scores = emit(R.multiply(emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2])))), const(0.25, "float16")))
    (wide,) = _cast(emit, "float32", emit(R.add(scores, m)))
    return R.matmul(_cast(emit, "float16", emit(R.nn.softmax(wide, -1)))[0], v)


def _all_in_float32(emit: Any, q: Any, k: Any, v: Any, m: Any) -> Any:
    """Everything is widened and the result is cast back; the mask is in float32."""
    q, k, v = _cast(emit, "float32", q, k, v)
    out = attend(emit, q, k, v, before=lambda s: emit(R.add(emit(R.multiply(s, const(0.25))), m)))
    return R.astype(emit(out), "float16")


def _result_in_float32(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """The result is not narrowed again, so that attention is in float32."""
    return attend(emit, *_cast(emit, "float32", q, k, v))


def _values_in_float16(emit: Any, q: Any, k: Any, v: Any) -> Any:
    """Queries and keys are float32 by themselves, values are not: all becomes float32."""
    scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 1, 3, 2]))))
    return R.matmul(_cast(emit, "float16", emit(R.nn.softmax(scores, -1)))[0], v)


def _half(low: float, dtype: str) -> dict[str, np.ndarray]:
    return {"m": np.broadcast_to(causal(3, 5, low), (2, 1, 3, 5)).astype(dtype)}


_HALF_MASK = ((B, 1, S, P), "float16")
_WIDE_MASK = ((B, 1, S, P), "float32")

CASTS = {
    "softmax_in_float32": Spelling(
        qkv(m=_HALF_MASK),
        _softmax_in_float32,
        scale=0.25,
        masked=True,
        dtype="float16",
        inputs=_half(-math.inf, "float16"),
    ),
    "all_in_float32": Spelling(
        qkv(m=_WIDE_MASK), _all_in_float32, scale=0.25, masked=True, dtype="float16", inputs=_half(LOW, "float32")
    ),
    "result_in_float32": Spelling(qkv(), _result_in_float32, dtype="float16"),
    "values_in_float16": Spelling(
        qkv() | {"q": ((B, HEADS, S, DIM), "float32"), "k": ((B, HEADS, P, DIM), "float32")},
        _values_in_float16,
        dtype="float16",
        inputs={
            name: np.random.default_rng(3).standard_normal((2, HEADS, length, DIM)).astype("float32")
            for name, length in (("q", 3), ("k", 5))
        },
    ),
}
