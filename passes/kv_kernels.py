"""The operators that the KV passes call, as PrimFuncs of one module, each carrying what it is as an attribute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.formats import Codec, Rotation, TileLayout
from rotquant_tvm.ops.append_plain import RowRotations
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .find_attention import AttentionSite


class KernelLibrary:
    """Adds kernels for one target to the module of a ``BlockBuilder``, each once."""

    def __init__(self, builder: relax.BlockBuilder, target: tvm.target.Target | None = None) -> None:
        target = target or tvm.target.Target.current(allow_none=True)
        self.axes = ops.Axes.of(target if target is not None else "llvm")
        self._builder = builder
        self._known: dict[Any, tvm.ir.GlobalVar] = {}

    def _add(self, key: tuple[Any, ...], build: Any, shape: SiteShape | None = None) -> tvm.ir.GlobalVar:
        if key not in self._known:
            func = build().without_attr("global_symbol").with_attr("tirx.is_scheduled", True)
            if shape is not None:
                func = shape.attach(func)
            self._known[key] = self._builder.add_func(func, "kv_" + str(key[0]))
        return self._known[key]

    def advance(self) -> tvm.ir.GlobalVar:
        """``ops.advance``."""
        return self._add(("advance",), lambda: ops.advance(self.axes))

    def rotate(self, structure: tuple[Any, ...], head_dim: int, dtype: str) -> tvm.ir.GlobalVar:
        """``ops.rotate``."""
        return self._add(
            ("rotate", structure, head_dim, dtype), lambda: ops.rotate(structure, head_dim, dtype, self.axes)
        )

    def roundtrip(self, codec: Codec, dtype: str) -> tvm.ir.GlobalVar:
        """``ops.roundtrip``."""
        key = ("roundtrip", codec.format, codec.rotation.structure, codec.head_dim, dtype)
        return self._add(key, lambda: ops.roundtrip(codec, dtype, self.axes))

    def append(self, shape: SiteShape, ordered: bool = False, rotated: str = "") -> tvm.ir.GlobalVar:
        """``ops.append``; ``ordered``: it takes an attention's output, so as to come after it.

        ``rotated``: "k", "v" or "kv", whose new vectors come rotated (``FoldRotation``). Such a kernel carries no
        shape: kernels laid out by hand rotate both.
        """
        options = {"wraps": shape.wraps, "after": shape.heads if ordered else 0}
        codecs = [c.in_rotated_basis() if role in rotated else c for role, c in zip("kv", shape.codecs(), strict=True)]
        key = ("append", shape.k, shape.v, shape.kv_heads, shape.head_dim, shape.dtype, rotated, *options.values())
        build = lambda: ops.append(*codecs, shape.kv_heads, shape.dtype, self.axes, **options)  # noqa: E731
        return self._add(key, build, None if rotated else shape)

    def plan_flush(self, policy: CachePolicy, chunk: bool) -> tvm.ir.GlobalVar:
        """``ops.plan_flush``."""
        return self._add(("plan_flush", policy, chunk), lambda: ops.plan_flush(policy, self.axes, chunk=chunk))

    def flush(self, shape: SiteShape, ordered: bool) -> tvm.ir.GlobalVar:
        """``ops.flush``; ``ordered``: it takes an attention's output, so as to come after it."""
        common = (shape.kv_heads, shape.dtype, shape.cache_policy, self.axes)
        options = {"wraps": shape.wraps, "after": shape.heads if ordered else 0}
        key = ("flush", shape.k, shape.v, shape.head_dim, *options.values(), *common)
        return self._add(key, lambda: ops.flush(*shape.codecs(), *common, **options), shape)

    def append_plain(self, shape: SiteShape, rotations: RowRotations | None = None) -> tvm.ir.GlobalVar:
        """``ops.append_plain``."""
        k, v = shape.codecs()
        words = TileLayout(k.format, v.format, shape.head_dim).tile_bytes // 4
        common = (shape.kv_heads, shape.head_dim, words, shape.dtype, shape.cache_policy, self.axes)
        build = lambda: ops.append_plain(*common, rotations=rotations)  # noqa: E731
        return self._add(("append_plain", rotations, *common), build, shape)

    def join(self, result: tuple[int, str], others: tuple[tuple[int, str], ...]) -> tvm.ir.GlobalVar:
        """``ops.join``."""
        return self._add(("join", result, others), lambda: ops.join(result, others, self.axes))

    def split_centre(self, site: AttentionSite, dtype: str, sinks: int, center: int) -> tvm.ir.GlobalVar:
        """``ops.split_centre``."""
        common = (site.kv_heads, site.head_dim, dtype, sinks, center, self.axes)
        return self._add(("split_centre", *common), lambda: ops.split_centre(*common))

    def dequantize_segments(self, shape: SiteShape) -> tvm.ir.GlobalVar:
        """``ops.dequantize_segments``."""
        common = (shape.kv_heads, shape.cache_policy, self.axes)
        key = ("dequantize_segments", shape.k, shape.v, shape.head_dim, shape.wraps, *common)
        return self._add(key, lambda: ops.dequantize_segments(*shape.codecs(), *common, wraps=shape.wraps))

    def dequantize_cache(self, shape: SiteShape) -> tvm.ir.GlobalVar:
        """``ops.dequantize_cache``."""
        key = ("dequantize_cache", shape.k, shape.v, shape.kv_heads, shape.head_dim)
        return self._add(key, lambda: ops.dequantize_cache(*shape.codecs(), shape.kv_heads, self.axes))

    def attention_dense(self, shape: SiteShape) -> tvm.ir.GlobalVar:
        """``ops.attention_dense``; it carries ``shape`` for the passes that follow."""
        build = lambda: ops.attention_dense(  # noqa: E731
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.scale,
            shape.dtype,
            self.axes,
            chunk=shape.chunk,
            window=shape.window,
            softcap=shape.softcap,
            sinks=shape.cache_policy.sinks,
        )
        return self._add(("attention_dense", shape), build, shape)

    def attention_packed(self, shape: SiteShape, splits: int) -> tvm.ir.GlobalVar:
        """``ops.attention_prefill`` for a chunk, else ``ops.attention_decode`` in ``splits``; it carries its shape."""
        common = (*shape.codecs(), shape.heads, shape.kv_heads, shape.scale, shape.dtype, self.axes)
        options = {"window": shape.window, "softcap": shape.softcap, "policy": shape.cache_policy}
        if shape.chunk:
            build = lambda: ops.attention_prefill(*common, rotated=shape.rotated, **options)  # noqa: E731
            return self._add(("attention_prefill", shape), build, shape)
        shape = replace(shape, splits=splits)
        return self._add(
            ("attention_decode", shape),
            lambda: ops.attention_decode(*common, splits=splits, rotated=shape.rotated, **options),
            shape,
        )


def rotation_constant(rotation: Rotation) -> tvm.ir.GenericConst:
    """A rotation's coefficients as the kernels take them (one unused element for the identity)."""
    data = np.asarray(rotation.data, "float32")
    return relax.const(data if data.size else np.zeros(1, "float32"))


def kernel_of(mod: tvm.IRModule, value: Any) -> tuple[str, tvm.tirx.PrimFunc] | None:
    """(operator, PrimFunc) if ``value`` is a ``call_tir`` of a kernel of this project, else None."""
    if not isinstance(value, relax.Call) or getattr(value.op, "name", "") not in (
        "relax.call_tir",
        "relax.call_tir_inplace",
    ):
        return None
    func = mod[value.args[0]]
    name = func.attrs.get(OP_ATTR) if func.attrs is not None else None
    return (str(name), func) if name is not None else None


def site_shape(func: tvm.tirx.PrimFunc) -> SiteShape:
    """The ``SiteShape`` that an attention kernel carries."""
    shape = SiteShape.of(func)
    if shape is None:
        raise RuntimeError("an attention kernel lacks its site's shape")
    return shape
