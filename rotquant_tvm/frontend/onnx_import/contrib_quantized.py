"""com.microsoft.MatMulNBits and GatherBlockQuantized: integer weights with a scale per block.

The weights become floats at import: this compiler packs the KV cache, its kernels for linear layers and the passes that
join, fold or pack their weights read floats, and no pass would recognize a product over packed integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np
from tvm import relax
from tvm.relax import op as R

from rotquant_tvm.frontend.onnx_import.node_checks import positive, refuse_attributes, refuse_inputs, required
from rotquant_tvm.frontend.onnx_import.registry import OnnxNode, UnsupportedNode, onnx_converter

_CHUNK = 1 << 22
"""Elements widened at a time, so that a large weight needs no more memory than its result and a little."""


@dataclass(frozen=True)
class BlockQuantized:
    """A matrix in integers, with a scale for every ``block`` elements of a row.

    ``codes`` uint8 [rows, bytes] holds ``bits`` per element, the first in the lowest bits; ``scales`` and ``zeros`` are
    [rows, blocks], the latter None where the zero is ``middle``.
    """

    codes: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any] | None
    middle: int
    bits: int
    block: int
    columns: int

    def floats(self) -> np.ndarray[Any, Any]:
        """(code − zero) · scale, [rows, columns] in the scales' dtype."""
        rows = len(self.codes)
        result = np.empty((rows, self.columns), self.scales.dtype)
        step = max(1, _CHUNK // max(1, self.columns))
        for begin in range(0, rows, step):
            part = slice(begin, min(rows, begin + step))
            codes = unpack_bits(self.codes[part], self.bits)[:, : self.columns].astype(np.float32)
            zeros = np.float32(self.middle) if self.zeros is None else self._spread(self.zeros[part])
            result[part] = (codes - zeros) * self._spread(self.scales[part])
        return result

    def _spread(self, blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """One number per block as one per element."""
        return np.repeat(blocks.astype(np.float32), self.block, axis=1)[:, : self.columns]


def unpack_bits(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Return the codes of ``bits`` each in the last axis's bytes, lowest bits first."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


@onnx_converter("com.microsoft", "MatMulNBits")
def _matmul_nbits(node: OnnxNode) -> relax.Expr:
    refuse_inputs(node, {4: "weights in another order (g_idx)"})
    refuse_attributes(node, {"weight_prepacked": (0,)})
    x, name = required(node, 0), _weight_name(node, 1)
    weight = _float_weight(node, f"{name}.float", lambda: _nbits_matrix(node).floats(), str(x.ty.dtype))
    product = R.matmul(x, node.emit(R.permute_dims(weight)))
    return product if node.input(5) is None else R.add(node.emit(product), node.input(5))


def _nbits_matrix(node: OnnxNode) -> BlockQuantized:
    rows, columns, bits, block = _sizes(node, positive(node, "N"), positive(node, "K"))
    blocks = math.ceil(columns / block)
    codes = _shaped(node, 1, (rows, blocks * block * bits // 8), "codes")
    scales = _shaped(node, 2, (rows, blocks), "scales")
    zeros = None
    if node.value(3) is not None:
        if _array(node, 3).dtype == np.uint8:
            packed = _shaped(node, 3, (rows, math.ceil(blocks * bits / 8)), "zero points")
            zeros = unpack_bits(packed, bits)[:, :blocks]
        else:
            zeros = _shaped(node, 3, (rows, blocks), "zero points")
    return BlockQuantized(codes, scales, zeros, 1 << (bits - 1), bits, block, columns)


@onnx_converter("com.microsoft", "GatherBlockQuantized")
def _gather_block_quantized(node: OnnxNode) -> relax.Expr:
    """Rows of a quantized table; ids are clipped, as in every lookup here."""
    refuse_attributes(node, {"gather_axis": (0,), "quantize_axis": (1, -1)})
    name = _weight_name(node, 0)
    table = _float_weight(node, f"{name}.float", lambda: _table(node).floats(), None)
    return R.take(table, required(node, 1), axis=0, mode="clip")


def _table(node: OnnxNode) -> BlockQuantized:
    codes = _array(node, 0)
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise UnsupportedNode(f"its table is {codes.dtype} {list(codes.shape)}; only uint8 [rows, bytes] is supported")
    bits = int(node.attribute("bits", 4))
    rows, columns, bits, block = _sizes(node, len(codes), codes.shape[1] * 8 // (bits if bits > 0 else 4), 128)
    blocks = math.ceil(columns / block)
    scales = _shaped(node, 2, (rows, blocks), "scales")
    zeros = None
    if node.value(3) is not None:
        packed = _shaped(node, 3, (rows, math.ceil(blocks * bits / 8)), "zero points")
        zeros = unpack_bits(packed, bits)[:, :blocks]
    return BlockQuantized(codes, scales, zeros, 1 << (bits - 1), bits, block, columns)


def _sizes(node: OnnxNode, rows: int, columns: int, default: int | None = None) -> tuple[int, int, int, int]:
    """(rows, columns, bits, block). Raises UnsupportedNode for bits or blocks that the operators do not have."""
    bits, block = node.attribute("bits", 4), node.attribute("block_size", default)
    if bits not in (2, 4, 8):
        raise UnsupportedNode(f"it has {bits!r} bits per weight; only 2, 4 and 8 are supported")
    if not isinstance(block, int) or block < 16 or block & (block - 1):
        raise UnsupportedNode(f"its block_size is {block!r}; a power of two from 16 on is needed")
    return rows, columns, int(bits), block


def _weight_name(node: OnnxNode, index: int) -> str:
    """The name in the file of a weight that is a constant there."""
    value = node.value(index)
    for name, (var, _) in node.state.weights.items():
        if value is not None and var.same_as(value):
            return name
    raise UnsupportedNode("its quantized weights are not constants")


def _array(node: OnnxNode, index: int) -> np.ndarray[Any, Any]:
    """The numbers of an input that is a constant."""
    value = node.value(index)
    if node.state.is_constant(value):
        return np.asarray(node.state.constant_value(value))
    return node.state.weights[_weight_name(node, index)][1]


def _shaped(node: OnnxNode, index: int, shape: tuple[int, int], what: str) -> np.ndarray[Any, Any]:
    """A constant in the shape it stands for; files also have it flat or with its blocks apart."""
    array = _array(node, index)
    if array.size != math.prod(shape) or array.ndim > 3:
        raise UnsupportedNode(f"its {what} have the shape {list(array.shape)} where {list(shape)} is needed")
    return array.reshape(shape)


def _float_weight(node: OnnxNode, name: str, make: Any, dtype: str | None) -> relax.Var:
    """The parameter of a weight as floats, made once for all nodes that read it with the same attributes."""
    sizes = tuple(node.attribute(key, 0) for key in ("N", "K", "bits", "block_size"))
    operands = tuple(id(value) if value is not None else None for value in node.values[1:4])
    key = (name, dtype, sizes, operands)
    if key not in node.state.shared:
        floats = make()
        floats = floats if dtype is None else floats.astype(dtype, copy=False)
        node.state.shared[key] = node.state.add_weight(name, floats)
    return node.state.shared[key]
