"""Append on CUDA, one launch: the kernels for ``ops.append``, for one new token per sequence and for any number."""

from __future__ import annotations

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.ops.site_shape import OP_ATTR, SiteShape

from .append_tiles_cuda import TileAppend
from .append_token_cuda import TokenAppend
from .cuda_target import compute_capability, dynamic_shared_memory, multiprocessors
from .dependent_launch_cuda import starts_early
from .knobs import chosen_knobs
from .tile_codes_cuda import supported

KNOBS: dict[str, tuple[int, ...]] = {"warps": (4, 8, 12, 16), "blocks_per_sm": (1, 2, 3), "single": (0, 1)}
"""Warps per block at most; blocks that a multiprocessor should hold; whether single tokens have their own launch."""
DEFAULTS = {"warps": 16, "blocks_per_sm": 1, "single": 1}
WARPS_OF_MANY, TILES_OF_MANY = 12, 4
"""More tiles than this per warp: so many warps per block at most. Fewer then ask memory for less at once, and more get
done (120 µs instead of 129 for 1,048,576 vectors on an H100); but while a warp has one tile, more warps are faster."""


PARAMETERS = 7
"""Of the definition, but for an attention's output that it may wait for."""


def append_cuda(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> tvm.tirx.PrimFunc | None:
    """The rule: the kernel for a definition that carries its ``SiteShape``; None for formats that it lacks."""
    shape = SiteShape.of(func)
    if shape is None:
        return None
    after = shape.heads if len(func.params) > PARAMETERS else 0
    return append_kernel(shape, target, after=after, **chosen_knobs(func))


def append_kernel(
    shape: SiteShape, target: tvm.target.Target, *, after: int = 0, **knobs: int
) -> tvm.tirx.PrimFunc | None:
    """Build the kernel with some of ``KNOBS`` set; parameters and results are those of ``ops.append``.

    Into a ring of tiles there is no launch of its own for single tokens.
    """
    codecs = shape.codecs()
    if compute_capability(target) < 80 or shape.dtype not in ("float16", "bfloat16", "float32"):
        return None
    if not all(supported(codec) for codec in codecs):
        return None
    chosen = {**DEFAULTS, **knobs}
    layout = TileLayout(codecs[0].format, codecs[1].format, shape.head_dim)
    resident = chosen["blocks_per_sm"]
    sizes = [chosen["warps"]]
    if sizes[0] > WARPS_OF_MANY and not shape.wraps:
        sizes.append(WARPS_OF_MANY)
    tiles_launch, *for_many = (
        TileAppend(
            layout,
            codecs,
            shape.dtype,
            warps=warps,
            blocks=multiprocessors(target) * resident,
            limit=dynamic_shared_memory(target),
            wraps=shape.wraps,
        )
        for warps in sizes
    )
    if not tiles_launch.possible:
        return None
    kv_heads, head_dim = shape.kv_heads, shape.head_dim
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("append")
        T.func_attr({OP_ATTR: "append", "tirx.noalias": True, "tirx.is_scheduled": True})
        cache = T.arg("cache", T.buffer((batch, kv_heads, tiles, layout.tile_bytes // 4), "uint32"))
        source = [T.arg(name, T.buffer((batch, kv_heads, seq, head_dim), shape.dtype)) for name in ("k", "v")]
        sizes = zip("kv", (codec.coefficients.size for codec in codecs), strict=True)
        rotations = [T.arg(f"rotation_{name}", T.buffer((size,), "float32")) for name, size in sizes]
        lengths = tuple(T.arg(name, T.buffer((batch,), "int32")) for name in ("lengths", "new_lengths"))
        if after:
            T.arg("seen", T.buffer((batch, seq, after, head_dim), shape.dtype))
        arguments = (cache, source, rotations, lengths)
        token_launch = TokenAppend(layout, codecs, shape.dtype, starts_early(target))

        def launch_tiles() -> None:
            if not for_many or for_many[0].warps == tiles_launch.warps:
                tiles_launch.launch(*arguments, resident)
                return
            with T.If(tiles_launch.tiles_per_warp(source[0]) <= TILES_OF_MANY):
                with T.Then():
                    tiles_launch.launch(*arguments, resident)
                with T.Else():
                    for_many[0].launch(*arguments, resident)

        if shape.wraps or not (chosen["single"] and token_launch.possible):
            launch_tiles()
        else:
            with T.If(seq == 1):
                with T.Then():
                    token_launch.launch(*arguments)
                with T.Else():
                    launch_tiles()
    return shape.attach(builder.get())
