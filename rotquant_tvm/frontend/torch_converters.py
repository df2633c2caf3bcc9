"""Converters from torch operators to Relax that replace or add to those of TVM's importer.

TVM fixes float32 as the result of every product, looks embeddings up through two reshapes, compares symbolic
sizes as if they were numbers and drops some dtypes; attention is our own operator. Each converter takes the
torch node and the importer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import relax
from tvm.relax import op as R

Converter = Callable[[fx.Node, Any], relax.Expr]


def _causal_attention(node: fx.Node, importer: Any) -> relax.Var:
    """BHSD operands to ``R.nn.attention`` in BSHD; the result is BSHD on both sides. ``softcaps`` gives the rest."""
    q, k, v, scale, window = importer.retrieve_args(node)[:5]
    emit = importer.block_builder.emit
    q, k, v = (emit(R.permute_dims(x, [0, 2, 1, 3])) for x in (q, k, v))
    return emit(R.nn.attention(q, k, v, scale=scale, causal_mask="BottomRight", window_size=window))


def softcaps(graph: fx.Graph) -> list[float]:
    """Return the softcap of every attention of an exported graph, in order; 0 for none."""
    calls = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "causal_attention.default"]
    return [float(node.args[5] or 0) if len(node.args) > 5 else 0.0 for node in calls]


def _select_token(node: fx.Node, importer: Any) -> relax.Var:
    hidden, last = importer.retrieve_args(node)
    emit = importer.block_builder.emit
    index = emit(R.expand_dims(emit(R.astype(last, "int64")), 1))  # gather_nd takes int64 only
    return emit(R.gather_nd(hidden, index, batch_dims=1))


def _linear(node: fx.Node, importer: Any) -> relax.Var:
    x, weight, *bias = importer.retrieve_args(node)
    emit = importer.block_builder.emit
    product = emit(R.matmul(x, emit(R.permute_dims(weight))))
    return emit(R.add(product, bias[0])) if bias and bias[0] is not None else product


def _matmul(node: fx.Node, importer: Any) -> relax.Var:
    a, b = importer.retrieve_args(node)
    return importer.block_builder.emit(R.matmul(a, b))


def _addmm(node: fx.Node, importer: Any) -> relax.Var:
    bias, a, b = importer.retrieve_args(node)
    emit = importer.block_builder.emit
    return emit(R.add(emit(R.matmul(a, b)), bias))


def _reshape(node: fx.Node, importer: Any) -> relax.Expr:
    """Sizes come from torch's own result where they are fixed; a -1 left over is a dynamic one."""
    x = importer.env[node.args[0]]
    wanted: Any = node.args[1]
    sizes = []
    for size, actual in zip(wanted, node.meta["val"].shape, strict=True):
        if isinstance(size, fx.Node):
            sizes.append(importer.env[size])
        else:
            sizes.append(int(actual) if isinstance(actual, int) else size)
    return importer.block_builder.emit(R.reshape(x, sizes))


def _layer_norm(node: fx.Node, importer: Any) -> relax.Var:
    """Normalize over the last axes; the weight and the bias may each be absent."""
    x, shape, *rest = importer.retrieve_args(node)
    weight, bias, eps = [*rest, *(None, None, 1e-5)[len(rest) :]][:3]
    sizes, dtype = [int(size) for size in shape], importer._convert_data_type(node.meta["val"].dtype)
    weight = relax.const(np.ones(sizes), dtype) if weight is None else weight
    bias = relax.const(np.zeros(sizes), dtype) if bias is None else bias
    axes = list(range(-len(sizes), 0))
    return importer.block_builder.emit(R.nn.layer_norm(x, weight, bias, axes=axes, epsilon=eps))


def _softmax(node: fx.Node, importer: Any) -> relax.Var:
    """Take the softmax in the dtype of the result, to which torch casts first."""
    x, axis = importer.retrieve_args(node)[:2]
    dtype = importer._convert_data_type(node.meta["val"].dtype)
    x = x if x.ty.dtype.dtype == dtype else importer.block_builder.emit(R.astype(x, dtype))
    return importer.block_builder.emit(R.nn.softmax(x, axis))


def _embedding(node: fx.Node, importer: Any) -> relax.Var:
    """Look rows up. Ids are clipped: TVM warns of the default mode, which trusts them, and that is not faster."""
    weight, ids = importer.retrieve_args(node)[:2]
    return importer.block_builder.emit(R.take(weight, ids, axis=0, mode="clip"))


def _select(node: fx.Node, importer: Any) -> relax.Var:
    """Take one index of an axis; torch counts negative ones from the end."""
    x, axis, index = importer.retrieve_args(node)
    return importer.block_builder.emit(R.take(x, relax.const(index, "int64"), axis=axis, mode="wrap"))


def _index(node: fx.Node, importer: Any) -> relax.Var:
    """``x[:, index]``: one tensor of integers, of which torch counts negative ones from the end; TVM would not."""
    x, indices = importer.retrieve_args(node)
    used = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or used[0][1].ty.dtype.dtype == "bool":
        return importer._index_tensor(node)
    axis, index = used[0]
    return importer.block_builder.emit(R.take(x, index, axis=axis, mode="wrap"))


def _cast(node: fx.Node, importer: Any) -> relax.Expr:
    """Any spelling of ``Tensor.to``: the dtype is the node's own; a cast to the same dtype vanishes."""
    x = importer.env[node.args[0]]
    dtype = importer._convert_data_type(node.meta["val"].dtype)
    return x if x.ty.dtype.dtype == dtype else importer.block_builder.emit(R.astype(x, dtype))


def _same(node: fx.Node, importer: Any) -> relax.Expr:
    return importer.env[node.args[0]]


CONVERTERS: dict[str, Converter] = {
    "causal_attention.default": _causal_attention,
    "select_token.default": _select_token,
    "linear.default": _linear,
    "matmul.default": _matmul,
    "mm.default": _matmul,
    "bmm.default": _matmul,
    "addmm.default": _addmm,
    "embedding.default": _embedding,
    "layer_norm.default": _layer_norm,
    "select.int": _select,
    "index.Tensor": _index,
    "softmax.int": _softmax,
    "view.default": _reshape,
    "reshape.default": _reshape,
    "_unsafe_view.default": _reshape,
    "to.dtype": _cast,
    "to.device": _cast,
    "to.dtype_layout": _cast,
    "to.other": _cast,
    "_to_copy.default": _cast,
    "alias.default": _same,
}
