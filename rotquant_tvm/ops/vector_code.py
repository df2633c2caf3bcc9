"""The arithmetic of one vector, emitted into a TensorIR definition: rotate, quantize, look a code up.

Mathematics and special cases are those of ``rotquant_tvm.formats`` (the NumPy reference); all of it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from ..errors import FormatError
from ..formats import (
    HALF_MAX,
    IP_FLOOR,
    LINEAR_BLOCK,
    NIBBLE_ZERO,
    Codebook,
    Codec,
    KVFormat,
    SignCodebook,
    SplitCodebook,
)
from ..formats.trellis import Trellis
from .axes import Axes
from .linear_code import emit_bytes, emit_nibbles
from .registers import f32 as f32
from .registers import register as register
from .registers import registers as registers
from .sketch_code import emit_residual_sketch
from .tile_access import u32
from .trellis_code import TrellisSearch, state_value, window

Expr = Any
Structure = Sequence[tuple[int, int]]


def sanitize(value: Expr) -> Expr:
    """NaN becomes 0; everything else is clipped to the finite float16 range."""
    x = f32(value)
    clipped = tir.max(tir.min(x, f32(HALF_MAX)), f32(-HALF_MAX))
    return tir.Select(tir.isnan(x), f32(0), clipped)


def rotation_size(structure: Structure, head_dim: int) -> int:
    """Coefficients that a rotation of this structure takes; at least 1, so that its buffer is never empty."""
    return max(1, sum(block for block, _ in structure) * head_dim)


def _block_base(index: Expr, block: int, stride: int, head_dim: int) -> Expr:
    if stride == 1:
        base = index // block * block
        return base if head_dim % block == 0 else tir.min(base, head_dim - block)
    return index - index // stride % block * stride


def emit_rotation(
    axes: Axes, structure: Structure, head_dim: int, coefficients: Any, source: Any, scratch: Any
) -> Any:
    """Apply the layers of a rotation to ``source`` [head_dim]; returns the buffer that holds the result.

    ``source`` and ``scratch`` (float32 [head_dim]) are overwritten alternately; ``coefficients`` is
    ``Rotation.data``.
    """
    offset = 0
    for block, stride in structure:
        with axes.lanes(head_dim) as index:
            base = _block_base(index, block, stride, head_dim)
            row = offset + index * block
            if block <= 4:
                total = f32(0)
                for j in range(block):
                    total = total + coefficients[row + j] * source[base + j * stride]
                T.buffer_store(scratch, total, [index])
            else:
                total = registers(1)
                with T.serial(0, block) as j:
                    T.buffer_store(total, total[0] + coefficients[row + j] * source[base + j * stride], [0])
                T.buffer_store(scratch, total[0], [index])
        offset += block * head_dim
        source, scratch = scratch, source
    return source


def _tree(code: Expr, values: Sequence[float], bit: int) -> Expr:
    if len(values) == 1:
        return f32(float(values[0]))
    half = len(values) // 2
    test = (code >> u32(bit) & u32(1)) == u32(0)
    return tir.Select(test, _tree(code, values[:half], bit - 1), _tree(code, values[half:], bit - 1))


def code_value(codec: Codec, code: Expr) -> Expr:
    """The float32 value of a uint32 code, before the gain (a select tree: no table in memory)."""
    kind = codec.format.codebook
    if kind == "half":
        return tir.reinterpret("float16", code.astype("uint16")).astype("float32")
    if kind == "bfloat16":
        return tir.reinterpret("float32", code << u32(16))
    if kind == "linear" and codec.format.bits == 4:
        return (code.astype("int32") - NIBBLE_ZERO).astype("float32")
    if kind == "linear":
        return code.astype("uint8").astype("int8").astype("float32")
    if codec.code_values is None:
        raise FormatError(f"the codes of {codec.format.name} have no values of their own")
    return _tree(code, [float(c) for c in codec.code_values], codec.format.bits - 1)


def element_value(codec: Codec, code: Callable[[Expr], Expr], dim: Expr) -> Expr:
    """The float32 value of the element at ``dim``, before the gain; ``code(dim)`` is a code of its vector (uint32)."""
    if isinstance(codec.codebook, Trellis):
        return state_value(codec.codebook, window(codec.format.bits, codec.head_dim, code, dim))
    if isinstance(codec.codebook, SplitCodebook):
        wide, narrow = (
            _tree(code(dim), [float(c) for c in book.centroids], book.bits - 1)
            for book in (codec.codebook.wide, codec.codebook.narrow)
        )
        return tir.Select(dim < codec.head_dim // 2, wide, narrow)
    return code_value(codec, code(dim))


def gain_row(fmt: KVFormat, dim: Expr) -> Expr:
    """Which of a vector's gains belongs to a dimension (None if the format stores none)."""
    if fmt.codebook in ("half", "bfloat16"):
        return None
    return dim // LINEAR_BLOCK if fmt.codebook == "linear" else 0


StoreCode = Callable[[Expr, Expr], None]
StoreGain = Callable[[Expr, Expr], None]


def emit_encode(
    axes: Axes,
    codec: Codec,
    coefficients: Any,
    load: Callable[[Expr], Expr],
    store_code: StoreCode,
    store_gain: StoreGain,
    buffers: EncodeBuffers,
) -> None:
    """Quantize one vector: ``load(dim)`` gives its elements, codes and gains go to the two callbacks."""
    head_dim, x = codec.head_dim, buffers.x
    with axes.lanes(head_dim) as dim:
        T.buffer_store(x, sanitize(load(dim)), [dim])
    kind = codec.format.codebook
    if kind == "half":
        with axes.lanes(head_dim) as dim:
            store_code(dim, tir.reinterpret("uint16", x[dim].astype("float16")).astype("uint32"))
    elif kind == "bfloat16":
        with axes.lanes(head_dim) as dim:
            store_code(dim, _bfloat16_bits(x[dim]))
    elif kind == "linear":
        emit = emit_bytes if codec.format.bits == 8 else emit_nibbles
        emit(axes, head_dim, x, store_code, store_gain, buffers.stats)
    else:
        _emit_codebook(axes, codec, coefficients, store_code, store_gain, buffers)


class EncodeBuffers:
    """Scratch of ``emit_encode``: two vectors and a few statistics, shared by the lanes of a block."""

    def __init__(self, axes: Axes, head_dim: int) -> None:
        self.x = T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch)
        self.y = T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch)
        self.stats = T.sblock_alloc_buffer((max(4, -(-head_dim // 32)),), "float32", scope=axes.scratch)
        self._axes = axes
        self._searches: dict[int, TrellisSearch] = {}

    def search(self, trellis: Trellis) -> TrellisSearch:
        """The encoder of a trellis, whose scratch is allocated when it is first asked for."""
        if trellis.bits not in self._searches:
            self._searches[trellis.bits] = TrellisSearch(self._axes, trellis)
        return self._searches[trellis.bits]


def _bfloat16_bits(value: Expr) -> Expr:
    bits = tir.reinterpret("uint32", value)
    return bits + u32(0x7FFF) + (bits >> u32(16) & u32(1)) >> u32(16)


def _emit_codebook(
    axes: Axes,
    codec: Codec,
    coefficients: Any,
    store_code: StoreCode,
    store_gain: StoreGain,
    buffers: EncodeBuffers,
) -> None:
    head_dim, stats = codec.head_dim, buffers.stats
    _emit_norm(axes, head_dim, buffers)
    y = emit_rotation(axes, codec.rotation.structure, head_dim, coefficients, buffers.x, buffers.y)
    spare = buffers.y if y is buffers.x else buffers.x
    if isinstance(codec.codebook, Trellis):
        code, value = buffers.search(codec.codebook).run(y, stats, spare)
    else:
        code = lambda dim: element_code(codec, y[dim], stats[0], dim)  # noqa: E731
        value = lambda dim: element_value(codec, code, dim)  # noqa: E731

    def gain() -> Expr:
        sums = registers(2)
        with T.serial(0, head_dim) as dim:
            centroid = T.Bind(value(dim))
            T.buffer_store(sums, sums[0] + centroid * y[dim], [0])
            T.buffer_store(sums, sums[1] + centroid * centroid, [1])
        return corrected_gain(codec.format.gain, stats[0], sums[0], sums[1])

    if codec.sketch is not None:
        emit_residual_sketch(axes, codec, coefficients, (y, spare), (gain, code, value), store_code, store_gain)
        return
    with axes.lanes(head_dim) as dim:
        store_code(dim, code(dim))
    with axes.lanes(1) as _:
        store_gain(0, gain())


def _emit_norm(axes: Axes, head_dim: int, buffers: EncodeBuffers) -> None:
    with axes.lanes(1) as _:
        total = registers(1)
        with T.serial(0, head_dim) as dim:
            T.buffer_store(total, total[0] + buffers.x[dim] * buffers.x[dim], [0])
        T.buffer_store(buffers.stats, tir.sqrt(total[0]), [0])


def element_code(codec: Codec, value: Expr, norm: Expr, dim: Expr) -> Expr:
    """The code (uint32) of the rotated element at ``dim``."""
    book = codec.codebook
    if isinstance(book, SplitCodebook):
        wide, narrow = (boundary_count(part, value, norm) for part in (book.wide, book.narrow))
        return tir.Select(dim < codec.head_dim // 2, wide, narrow)
    if not isinstance(book, Codebook | SignCodebook):
        raise FormatError(f"the codes of {codec.format.name} are not chosen element by element")
    return boundary_count(book, value, norm)


def boundary_count(codebook: Codebook | SignCodebook, value: Expr, norm: Expr) -> Expr:
    """The code of a rotated element: how many of the codebook's boundaries, times the norm, lie below it.

    All-zero vectors get the middle code in every element.
    """
    boundaries = [float(b) for b in codebook.boundaries]
    code = u32(0)
    for boundary in boundaries:
        code = code + tir.Select(value > f32(boundary) * norm, u32(1), u32(0))
    return tir.Select(norm > f32(0), code, u32(len(boundaries) // 2 + 1))


def corrected_gain(rule: str, norm: Expr, inner: Expr, square: Expr) -> Expr:
    """The fp16 gain by rule (``formats.gains``), saturated to the finite float16 range.

    ``inner`` is ⟨y, c⟩ with y the rotated vector and c its centroids, ``square`` is ‖c‖².
    """
    safe_square = tir.max(square, f32(1e-30))
    if rule == "raw":
        gain = norm
    elif rule == "norm":
        gain = norm / tir.sqrt(safe_square)
    elif rule == "mse":
        gain = inner / safe_square
    else:
        usable = inner > norm * f32(IP_FLOOR)
        gain = tir.Select(usable, norm * norm / tir.Select(usable, inner, f32(1)), norm)
    gain = tir.Select(norm > f32(0), gain, f32(0))
    return tir.max(tir.min(gain, f32(HALF_MAX)), f32(0)).astype("float16")
