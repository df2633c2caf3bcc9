"""Which row of the 16-bit segments a token enters, on CUDA."""

from __future__ import annotations

from typing import Any

import tvm.tirx as tir
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.cache_policy import CachePolicy

from .cuda_ops import Registers, i32, scalar

Expr = Any


def token_slot(policy: CachePolicy, place: Expr) -> Expr:
    """The slot of the token at position ``place`` of its sequence, int32."""
    if not policy.ring:
        return place
    behind = tir.max(place - policy.sinks, i32(0)) % policy.ring + policy.sinks
    return tir.Select(place < policy.sinks, place, behind)


def is_kept(policy: CachePolicy, place: Expr, packed: Expr) -> Expr:
    """Whether the token at ``place`` stays in 16 bits where ``packed`` tokens behind the sinks are in tiles."""
    kept = place < policy.sinks
    if policy.ring:
        kept = tir.any(kept, tir.all(place >= policy.sinks, place - policy.sinks >= packed))
    return kept


def row_and_slot(policy: CachePolicy, item: Expr, counts: tuple[Expr, Expr, Expr], seq: Expr) -> tuple[Expr, ...]:
    """(new token, slot, whether it is stored there) of item number ``item``: a token, or a slot if these are fewer.

    ``counts``: a sequence's tokens in tiles, its length with the new tokens, and how many of the ``seq`` are new.
    """
    packed, length, count = counts
    sinks, ring = policy.sinks, policy.ring
    start = scalar(length - count)
    row, slot = Registers(1, "int32"), Registers(1, "int32")
    with T.If(seq <= policy.slots):
        with T.Then():
            row[0] = item
            slot[0] = token_slot(policy, scalar(start + item))
        with T.Else():
            slot[0] = item
            row[0] = item - start
            if ring:
                last = scalar(length - 1 - sinks)
                # The newest token behind the sinks whose number is the slot's, modulo the ring's size.
                turned = (last + i32(ring)) % ring - (item - sinks)
                number = last - tir.Select(turned < 0, turned + ring, turned)
                number = scalar(number)
                behind = tir.Select(number >= 0, number + sinks - start, i32(-1))
                row[0] = tir.Select(item < sinks, item - start, behind)
    exists = tir.all(row[0] >= 0, row[0] < count)
    return row[0], slot[0], tir.all(is_kept(policy, start + row[0], packed), exists)
