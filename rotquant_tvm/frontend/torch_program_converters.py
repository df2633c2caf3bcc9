"""Converters for operators of exported programs: attention kept whole, and writes into a cache."""

from __future__ import annotations

from typing import Any

import torch
import tvm
from torch import fx
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.torch_converters import CONVERTERS, Converter

WHOLE = (torch.ops.aten.scaled_dot_product_attention.default,)
"""Operators that stay whole when a program is taken apart."""


def _arguments(node: fx.Node, importer: Any) -> dict[str, Any]:
    """Return the operands of a torch operator under the names of its schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), importer.retrieve_args(node), strict=False))
    given |= importer._retrieve_args(dict(node.kwargs))
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _attention(node: fx.Node, importer: Any) -> relax.Var:
    """Convert a scaled_dot_product_attention [batch, heads, seq, head_dim] with its mask, scale and grouped heads."""
    given = _arguments(node, importer)
    shapes = [node.args[i].meta["val"].shape for i in range(3)]  # type: ignore[union-attr]
    query, key, value = shapes
    if len(query) != 4 or len(key) != 4 or len(value) != 4:
        raise ModelError("scaled_dot_product_attention has operands that are not [batch, heads, seq, head_dim]")
    if query[3] != key[3] or key[3] != value[3]:
        raise ModelError(
            f"attention has keys of {key[3]} and values of {value[3]} dimensions (latent attention), which is not "
            "supported"
        )
    if key[1] != value[1] or (query[1] != key[1] and not given.get("enable_gqa")):
        raise ModelError(f"attention has {query[1]} query heads for {key[1]} and {value[1]} heads of keys and values")
    if given["dropout_p"]:
        raise ModelError("attention drops scores out; call model.eval() before the export")
    if given["is_causal"] and str(query[2]) != str(key[2]):
        raise ModelError(
            "scaled_dot_product_attention(is_causal=True) lets the first query see the first key alone, which is not "
            "causal when there is a past; give it a mask (attn_mask) instead"
        )
    emit = importer.block_builder.emit
    operands = [emit(R.permute_dims(given[name], [0, 2, 1, 3])) for name in ("query", "key", "value")]
    if any(operand.ty.shape is None for operand in operands):  # TVM would crash
        raise ModelError(f"attention has operands of unknown shape: {[tuple(shape) for shape in shapes]}")
    scale = float(given["scale"]) if given.get("scale") is not None else int(query[3]) ** -0.5
    if given["is_causal"]:
        out = emit(R.nn.attention(*operands, scale=scale, causal_mask="BottomRight"))
    else:
        mask = _additive(given["attn_mask"], operands[0].ty.dtype.dtype, emit)
        out = emit(R.nn.attention(*operands, bias=mask, scale=scale))
    return emit(R.permute_dims(out, [0, 2, 1, 3]))


def _additive(mask: relax.Expr | None, dtype: str, emit: Any) -> relax.Expr | None:
    """Return a mask of rank 4 that is added to the scores; torch adds leading axes and reads true as visible."""
    if mask is None:
        return None
    if mask.ty.dtype.dtype == "bool":
        mask = emit(R.where(mask, relax.const(0.0, dtype), relax.const(float("-inf"), dtype)))
    if mask.ty.ndim < 4:
        mask = emit(R.expand_dims(mask, list(range(4 - mask.ty.ndim))))
    return mask


def _attention_with_statistics(node: fx.Node, importer: Any) -> relax.Tuple:
    """Convert the form that torch takes attention apart into on CPUs; nobody reads the sums beside the result."""
    return relax.Tuple([_attention(node, importer)])


def _put_along(cache: relax.Expr, axis: int, index: relax.Expr, new: relax.Expr, emit: Any) -> relax.Var:
    """Write ``new`` into ``cache`` at places ``index`` [n] of an axis."""
    shape = list(cache.ty.shape.values)
    shape[axis] = index.ty.shape.values[0]
    places = emit(R.reshape(emit(R.astype(index, "int64")), [-1 if i == axis else 1 for i in range(len(shape))]))
    if not _has_shape(new, shape):
        new = emit(R.broadcast_to(new, shape))
    return emit(R.scatter_elements(cache, emit(R.broadcast_to(places, shape)), new, axis=axis))


def _has_shape(value: relax.Expr, shape: list[Any]) -> bool:
    found = value.ty.shape.values
    return len(found) == len(shape) and all(map(tvm.sym.Analyzer().can_prove_equal, found, shape))


def _index_copy(node: fx.Node, importer: Any) -> relax.Var:
    given = _arguments(node, importer)
    axis = given["dim"] % given["self"].ty.ndim
    return _put_along(given["self"], axis, given["index"], given["source"], importer.block_builder.emit)


def _index_put(node: fx.Node, importer: Any) -> relax.Var:
    """Convert ``x[:, :, index] = new`` with one index of rank 1."""
    given = _arguments(node, importer)
    used = [(axis, index) for axis, index in enumerate(given["indices"]) if index is not None]
    if len(used) != 1 or used[0][1].ty.ndim != 1 or used[0][1].ty.dtype.dtype == "bool" or given["accumulate"]:
        raise ModelError(
            "index_put writes other than to whole rows at positions of rank 1; write a cache as "
            "cache[:, :, positions] = new"
        )
    axis, index = used[0]
    return _put_along(given["self"], axis, index, given["values"], importer.block_builder.emit)


def _slice_scatter(node: fx.Node, importer: Any) -> relax.Var:
    """Convert ``x[:, start:end] = new``; the number of places is that of the new rows."""
    given, emit = _arguments(node, importer), importer.block_builder.emit
    shape = given["self"].ty.shape.values
    axis, step = given["dim"] % len(shape), given["step"]
    start = 0 if given["start"] is None else given["start"]
    if isinstance(start, int) and start < 0:  # counted from the end
        start = shape[axis] + start
    count = given["src"].ty.shape.values[axis]
    if isinstance(start, int) and start == 0 and step == 1 and _has_shape(given["src"], list(shape)):
        return given["src"]  # all of it: x[:, index] = new writes a slice of everything
    places = emit(R.arange(start, start + count * step, step, "int64"))
    return _put_along(given["self"], axis, places, given["src"], emit)


def _copy(node: fx.Node, importer: Any) -> relax.Expr:
    """``copy`` without a write: the source in the shape and dtype of the target."""
    given, emit = _arguments(node, importer), importer.block_builder.emit
    dtype, source = given["self"].ty.dtype.dtype, given["src"]
    source = source if source.ty.dtype.dtype == dtype else emit(R.astype(source, dtype))
    shape = list(given["self"].ty.shape.values)
    return source if _has_shape(source, shape) else emit(R.broadcast_to(source, shape))


def _rms_norm(node: fx.Node, importer: Any) -> relax.Var:
    given = _arguments(node, importer)
    dtype = given["input"].ty.dtype.dtype
    sizes = [int(size) for size in given["normalized_shape"]]
    weight, eps = given["weight"], given["eps"]
    weight = R.ones(sizes, dtype) if weight is None else weight
    eps = torch.finfo(getattr(torch, dtype)).eps if eps is None else float(eps)
    axes = list(range(-len(sizes), 0))
    return importer.block_builder.emit(R.nn.rms_norm(given["input"], weight, axes=axes, epsilon=eps))


def _repeat_interleave(node: fx.Node, importer: Any) -> relax.Var:
    """Along an axis; without one, of all elements in a row."""
    given = _arguments(node, importer)
    return importer.block_builder.emit(R.repeat(given["self"], given["repeats"], given["dim"]))


def _where(node: fx.Node, importer: Any) -> relax.Var:
    """``where`` with numbers for one or both sides."""
    given = _arguments(node, importer)
    dtype = importer._convert_data_type(node.meta["val"].dtype)
    operands = (given["self"], given["other"])
    sides = [x if isinstance(x, relax.Expr) else relax.const(x, dtype) for x in operands]
    emit = importer.block_builder.emit
    sides = [x if x.ty.dtype.dtype == dtype else emit(R.astype(x, dtype)) for x in sides]
    return emit(R.where(given["condition"], *sides))


def _masked_fill(node: fx.Node, importer: Any) -> relax.Var:
    given = _arguments(node, importer)
    value, dtype, emit = given["value"], given["self"].ty.dtype.dtype, importer.block_builder.emit
    value = emit(R.astype(value, dtype)) if isinstance(value, relax.Expr) else relax.const(value, dtype)
    return emit(R.where(given["mask"], value, given["self"]))


def _filled(value: float | None) -> Converter:
    """``ones``, ``zeros_like`` and their kin: one value, or the operand ``fill_value``, in torch's own dtype."""

    def convert(node: fx.Node, importer: Any) -> relax.Var:
        given = _arguments(node, importer)
        dtype = importer._convert_data_type(node.meta["val"].dtype)
        sizes = given["size"] if "size" in given else list(given["self"].ty.shape.values)
        number = given["fill_value"] if value is None else value
        if not isinstance(number, (int, float)):
            raise ModelError(f"{node.target} is filled with what is no number; it is not supported")
        return importer.block_builder.emit(R.full(relax.ShapeExpr(sizes), relax.const(number, dtype), dtype))

    return convert


def _dropout(node: fx.Node, importer: Any) -> relax.Expr:
    given = _arguments(node, importer)
    if given["train"] and given["p"]:
        raise ModelError("the program drops values out; call model.eval() before the export")
    return given["input"]


def _refused(remedy: str) -> Converter:
    def refuse(node: fx.Node, importer: Any) -> relax.Expr:
        raise ModelError(f"{node.target}: {remedy}")

    return refuse


_COMPLEX = _refused("complex numbers are not supported; write the rotary embedding with real ones")
_DATA = _refused("sizes that depend on the data are not supported; keep positions in tensors, without .item()")
_ROLL = _refused("a cache that is rolled is not supported; export with a cache that keeps every token")

PROGRAM_CONVERTERS: dict[str, Converter] = CONVERTERS | {
    "scaled_dot_product_attention.default": _attention,
    "_scaled_dot_product_flash_attention_for_cpu.default": _attention_with_statistics,
    "index_copy.default": _index_copy,
    "index_put.default": _index_put,
    "_unsafe_index_put.default": _index_put,
    "slice_scatter.default": _slice_scatter,
    "copy.default": _copy,
    "rms_norm.default": _rms_norm,
    "repeat_interleave.self_int": _repeat_interleave,
    "where.self": _where,
    "where.ScalarSelf": _where,
    "where.ScalarOther": _where,
    "where.Scalar": _where,
    "masked_fill.Scalar": _masked_fill,
    "masked_fill.Tensor": _masked_fill,
    "dropout.default": _dropout,
    "ones.default": _filled(1),
    "ones_like.default": _filled(1),
    "new_ones.default": _filled(1),
    "zeros.default": _filled(0),
    "zeros_like.default": _filled(0),
    "new_zeros.default": _filled(0),
    "full.default": _filled(None),
    "full_like.default": _filled(None),
    "new_full.default": _filled(None),
    "lift_fresh_copy.default": CONVERTERS["alias.default"],
    "roll.default": _ROLL,
    "view_as_complex.default": _COMPLEX,
    "view_as_real.default": _COMPLEX,
    "polar.default": _COMPLEX,
    "complex.default": _COMPLEX,
    "item.default": _DATA,
    "_local_scalar_dense.default": _DATA,
    "nonzero.default": _DATA,
    "masked_select.default": _DATA,
}
