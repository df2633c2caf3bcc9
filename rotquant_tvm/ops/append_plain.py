"""Append to the 16-bit segments: new tokens enter the sinks and the ring, in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from ..cache_policy import CachePolicy
from .axes import Axes
from .vector_code import Structure, emit_rotation, f32, rotation_size, sanitize

Expr = Any
Load = Callable[[Expr], Expr]
RowRotations = tuple[Structure, Structure]
"""The structures of the keys' rotation and of the values'."""
ROTATIONS_ATTR = "rotquant.rotations"
"""Function attribute of a definition that rotates: the structures of the keys' rotation and of the values', as JSON."""


def append_plain(
    kv_heads: int,
    head_dim: int,
    words: int,
    dtype: str,
    policy: CachePolicy,
    axes: Axes,
    *,
    rotations: RowRotations | None = None,
) -> tvm.tirx.PrimFunc:
    """Build ``append_plain(plain, k, v[, rotation_k, rotation_v], packed, lengths, new_lengths, cache)``.

    ``plain`` is updated in place. Shapes: plain float16 [batch, kv_heads, 2, sinks + ring, head_dim]; k, v ``dtype``
    [batch, kv_heads, seq, head_dim], rotated; packed int32 [batch], the tokens behind the sinks that are in tiles after
    this call's flush; lengths int32 [batch] with the new tokens, new_lengths int32 [batch] of them. Values are stored
    as 16-bit formats store them. ``cache`` uint32 [batch, kv_heads, tiles, words] is not read: it says that the flush,
    which reads the ring, comes first.

    ``rotations``: the structures of K's and V's rotation, () where there is none. Then k and v come as they are, of one
    token (seq = 1), and are rotated here by rotation_k and rotation_v (float32, ``Rotation.data``, or one unused
    element). What is stored is what ``ops.rotate`` and an append of its results store, but that these are not rounded
    to ``dtype`` in between.
    """
    batch, seq, tiles = (tir.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    slots, sizes = policy.slots, [rotation_size(structure, head_dim) for structure in rotations or ()]
    if rotations is not None:
        seq = tir.const(1, "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("append_plain")
        T.func_attr({"rotquant.op": "append_plain", "tirx.noalias": True, **_attributes(rotations)})
        plain = T.arg("plain", T.buffer((batch, kv_heads, 2, slots, head_dim), "float16"))
        new = [T.arg(n, T.buffer((batch, kv_heads, seq, head_dim), dtype)) for n in ("k", "v")]
        data = [T.arg(f"rotation_{n}", T.buffer((size,), "float32")) for n, size in zip("kv", sizes, strict=False)]
        packed, lengths, new_lengths = (
            T.arg(n, T.buffer((batch,), "int32")) for n in ("packed", "lengths", "new_lengths")
        )
        T.arg("cache", T.buffer((batch, kv_heads, tiles, words), "uint32"))
        with axes.blocks(batch * kv_heads * seq) as index, T.sblock("append_plain"):
            piece = T.axis.spatial(batch * kv_heads * seq, index)
            rows = [x[0:batch, 0:kv_heads, 0:seq, 0:head_dim] for x in new]
            T.reads(*rows, *(array[0:size] for array, size in zip(data, sizes, strict=True)))
            T.writes(plain[0:batch, 0:kv_heads, 0:2, 0:slots, 0:head_dim])
            b, head = T.Bind(piece // (kv_heads * seq)), T.Bind(piece // seq % kv_heads)
            row = T.Bind(piece % seq)
            place = T.Bind((lengths[b] - new_lengths[b]).astype("int64") + row)
            slot, kept = _slot(policy, place, packed[b])
            kept = tir.all(kept, row < new_lengths[b].astype("int64"))
            rotate = None if rotations is None else _RowRotation(axes, head_dim, rotations, data)
            for role, x in enumerate(new):
                load: Load = partial(_element, x, (b, head, row))
                if rotate is not None:
                    load = rotate(role, load)
                with axes.lanes(head_dim) as dim, T.If(kept), T.Then():
                    T.buffer_store(plain, sanitize(load(dim)).astype("float16"), [b, head, role, slot, dim])
    return builder.get()


def _element(x: Any, place: tuple[Expr, ...], dim: Expr) -> Expr:
    return x[(*place, dim)]


class _RowRotation:
    """Rotates one row at a time, whether it is kept or not: the compiler puts no barrier inside a condition."""

    def __init__(self, axes: Axes, head_dim: int, rotations: RowRotations, data: list[Any]) -> None:
        self.axes, self.head_dim, self.rotations, self.data = axes, head_dim, rotations, data
        self.buffers = [T.sblock_alloc_buffer((head_dim,), "float32", scope=axes.scratch) for _ in range(2)]

    def __call__(self, role: int, load: Load) -> Load:
        """The elements of a key (role 0) or a value, rotated."""
        with self.axes.lanes(self.head_dim) as dim:
            T.buffer_store(self.buffers[0], f32(load(dim)), [dim])
        structure, data = self.rotations[role], self.data[role]
        result = emit_rotation(self.axes, structure, self.head_dim, data, *self.buffers)
        return partial(_element, result, ())


def _attributes(rotations: RowRotations | None) -> dict[str, str]:
    return {} if rotations is None else {ROTATIONS_ATTR: json.dumps([list(map(list, layers)) for layers in rotations])}


def row_rotations(func: tvm.tirx.PrimFunc) -> RowRotations | None:
    """The ``rotations`` that a definition was built with, if any."""
    text = func.attrs.get(ROTATIONS_ATTR) if func.attrs is not None else None
    if text is None:
        return None
    k, v = (tuple((int(block), int(stride)) for block, stride in layers) for layers in json.loads(str(text)))
    return k, v


def _slot(policy: CachePolicy, place: Expr, packed: Expr) -> tuple[Expr, Expr]:
    """(slot of the token at position ``place``, whether it is kept there), int64."""
    number, sink = place - policy.sinks, place < policy.sinks
    if not policy.ring:
        return place, sink
    behind = tir.max(number, tir.const(0, "int64")) % policy.ring + policy.sinks
    return tir.if_then_else(sink, place, behind), tir.any(sink, number >= packed.astype("int64"))
