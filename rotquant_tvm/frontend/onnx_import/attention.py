"""The standard operator Attention (opset 23 to 25): one ``nn.attention`` or ``nn.attention_bias``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.arithmetic import cast, dtype_of
from rotquant_tvm.frontend.onnx_import.known_value import KnownValue, object_array
from rotquant_tvm.frontend.onnx_import.registry import STANDARD, OnnxNode, UnsupportedNode, onnx_converter
from rotquant_tvm.frontend.onnx_import.reshaping import sizes_of
from rotquant_tvm.frontend.onnx_import.rotary import join_heads, split_heads, swap_heads


@dataclass(frozen=True)
class Masking:
    """What an attention's queries see.

    Attributes: ``causal`` (query i sees key j if j <= i + ``offset``), ``offset`` (the number of keys before
    the first query: a size, or a tensor int64 [batch]), ``window`` (keys seen, the query's own among them, or
    None), ``bias`` (an additive mask of up to four axes, or None) and ``valid`` (int64 [batch], the keys that
    exist in each row, or None for all).
    """

    causal: bool
    offset: Any
    window: int | None = None
    bias: relax.Expr | None = None
    valid: relax.Expr | None = None


def attend(
    node: OnnxNode, q: relax.Expr, k: relax.Expr, v: relax.Expr, scale: float | None, masking: Masking, cap: float = 0.0
) -> relax.Expr:
    """Emit an attention; q [batch, seq, heads, head_dim], k and v [batch, length, kv_heads, head_dim].

    Returns [batch, seq, heads, head_dim]. ``scale`` None is 1 / sqrt(head_dim); ``cap``: scaled scores s become
    cap * tanh(s / cap) before the mask, 0 for none. A mask that is causal and nothing else is told by attributes.
    """
    (seq, heads, head_dim), (length, kv_heads) = sizes_of(q)[1:], sizes_of(k)[1:3]
    if not all(isinstance(size, int) for size in (heads, kv_heads, head_dim)) or heads % kv_heads:
        raise UnsupportedNode(f"{heads} heads of queries do not fit {kv_heads} of keys")
    scale = scale if scale is not None else 1 / math.sqrt(head_dim)
    node.state.softcaps.append(cap)
    causal = masking.causal and masking.bias is None and masking.valid is None
    if causal and not is_tensor(masking.offset) and node.state.equal(masking.offset + seq, length):
        call = R.nn.attention(q, k, v, scale=scale, causal_mask="BottomRight", window_size=masking.window)
        return node.emit(call)
    bias = _bias(node, masking, seq, length, dtype_of(q))
    if bias is None:
        return node.emit(R.nn.attention(q, k, v, scale=scale))
    shape = [1] * (4 - len(sizes_of(bias))) + sizes_of(bias)
    bias = bias if len(shape) == len(sizes_of(bias)) else node.emit(R.reshape(bias, shape))
    return node.emit(R.nn.attention_bias(q, k, v, bias, scale=scale))


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of the function rather than a size."""
    return isinstance(value, tvm.ir.Expr) and not tvm.ir.is_prim_expr(value)


def lowest(dtype: str) -> float:
    """The additive mask of a hidden key: the lowest finite number, so that a row of hidden keys is no NaN."""
    return {"float16": -65504.0, "bfloat16": -3.3895313892515355e38}.get(dtype, float(np.finfo(np.float32).min))


def additive(node: OnnxNode, mask: relax.Expr, dtype: str) -> relax.Expr:
    """A mask of booleans (true: seen) as numbers to add; one of numbers as it is."""
    if dtype_of(mask) != "bool":
        return cast(node, mask, dtype)
    return node.emit(R.where(mask, relax.const(0, dtype), relax.const(lowest(dtype), dtype)))


def _bias(node: OnnxNode, masking: Masking, seq: Any, length: Any, dtype: str) -> relax.Expr | None:
    """All that hides keys as one additive mask, or None if nothing does."""
    seen = _seen(node, masking, seq, length)
    bias = None if masking.bias is None else _padded(node, masking.bias, length, dtype)
    if seen is None:
        return bias if bias is None else additive(node, bias, dtype)
    if bias is not None and dtype_of(bias) == "bool":
        return additive(node, node.emit(R.logical_and(bias, seen)), dtype)
    hidden = additive(node, seen, dtype)
    return hidden if bias is None else node.emit(R.add(additive(node, bias, dtype), hidden))


def _seen(node: OnnxNode, masking: Masking, seq: Any, length: Any) -> relax.Expr | None:
    """Booleans [seq, length] or [batch, 1, seq, length]: what position alone lets queries see."""
    keys = node.emit(R.arange(0, length, 1, "int64"))
    parts = []
    if masking.causal or masking.window is not None:
        if is_tensor(masking.offset):
            queries = node.emit(R.reshape(node.emit(R.arange(0, seq, 1, "int64")), [seq, 1]))
            offset = node.emit(R.reshape(masking.offset, [sizes_of(masking.offset)[0], 1, 1, 1]))
            queries = node.emit(R.add(queries, offset))
        else:
            rows = node.emit(R.arange(masking.offset, masking.offset + seq, 1, "int64"))
            queries = node.emit(R.reshape(rows, [seq, 1]))
        if masking.causal:
            parts.append(node.emit(R.less_equal(keys, queries)))
        if masking.window is not None:
            first = node.emit(R.subtract(queries, relax.const(masking.window, "int64")))
            parts.append(node.emit(R.greater(keys, first)))
    if masking.valid is not None:
        count = node.emit(R.reshape(masking.valid, [sizes_of(masking.valid)[0], 1, 1, 1]))
        parts.append(node.emit(R.less(keys, count)))
    return functools.reduce(lambda a, b: node.emit(R.logical_and(a, b)), parts) if parts else None


def _padded(node: OnnxNode, mask: relax.Expr, length: Any, dtype: str) -> relax.Expr:
    """A mask whose last axis is shorter than the keys hides those that it does not name."""
    sizes = sizes_of(mask)
    last = sizes[-1]
    if node.state.equal(last, 1) or node.state.equal(last, length):
        return mask
    rest = node.state.simplify(length - last)
    if not node.state.proved(rest >= 0 if isinstance(rest, int) else tirx.GE(rest, tirx.const(0, "int64"))):
        raise UnsupportedNode(f"its mask has {last} columns for {length} keys")
    fill = relax.const(False, "bool") if dtype_of(mask) == "bool" else relax.const(lowest(dtype), dtype_of(mask))
    return node.emit(R.concat([mask, node.emit(R.full(relax.ShapeExpr([*sizes[:-1], rest]), fill))], -1))


@onnx_converter(STANDARD, "Attention", since=23)
def _attention(node: OnnxNode) -> list[relax.Expr | None]:
    """Q, K, V with three or four axes; mask, past and the number of valid keys are optional."""
    q, k, v, mask, past_k, past_v, valid = (node.input(index) for index in range(7))
    if node.wants(3):
        raise UnsupportedNode("its output qk_matmul_output is not supported")
    if (past_k is None) != (past_v is None) or (past_k is not None and valid is not None):
        raise UnsupportedNode("past_key and past_value come together, and without nonpad_kv_seqlen")
    flat = len(sizes_of(q)) == 3
    q, k, v = (_heads_first(node, x, flat, name) for x, name in ((q, "q"), (k, "kv"), (v, "kv")))
    offset: Any = 0
    if past_k is not None:
        offset = sizes_of(past_k)[2]
        k, v = (node.emit(R.concat([past, new], 2)) for past, new in ((past_k, k), (past_v, v)))
    if valid is not None:
        valid = cast(node, valid, "int64")
        offset = node.emit(R.subtract(valid, node.state.tensor(KnownValue.of(object_array([seq_of(q)]), "int64"))))
    swapped_q, swapped_k, swapped_v = (swap_heads(node, x) for x in (q, k, v))
    causal = bool(node.attribute("is_causal", 0))
    masking = Masking(causal, offset, _window(node), mask, valid)
    cap = float(node.attribute("softcap", 0.0))
    y = attend(node, swapped_q, swapped_k, swapped_v, node.attribute("scale"), masking, cap)
    return [join_heads(node, y) if flat else swap_heads(node, y), k, v]


def seq_of(q: relax.Expr) -> Any:
    """The length of [batch, heads, seq, head_dim]."""
    return sizes_of(q)[2]


def _heads_first(node: OnnxNode, x: relax.Expr, flat: bool, which: str) -> relax.Expr:
    """[batch, seq, width] as [batch, heads, seq, head_dim]; four axes are these already."""
    if not flat:
        return x
    heads = node.attribute(f"{which}_num_heads")
    if not heads:
        raise UnsupportedNode(f"{which}_num_heads is needed for inputs with three axes")
    return split_heads(node, x, heads)


def _window(node: OnnxNode) -> int | None:
    """The window in tokens, a query's own among them (opset 25 counts those to its left)."""
    left, right = node.attribute("left_window_size", -1), node.attribute("right_window_size", -1)
    causal = bool(node.attribute("is_causal", 0))
    if right > 0 and causal:
        right = 0
    if right >= 0 and not causal:
        raise UnsupportedNode("right_window_size without is_causal is not supported")
    return None if left < 0 else left + 1
