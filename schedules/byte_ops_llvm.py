"""Vectors of 64 bytes on x86 CPUs: dot products with int8 weights, and lookups in tables of sixteen bytes.

A vector is kept as sixteen 32-bit lanes of four bytes. CPUs with registers of half its length take it in two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm.tirx as tir
from tvm.target.codegen import target_has_features

from .vector_ops import LANES

Expr = Any
BYTES = 4 * LANES


def has_byte_dot(target: tvm.target.Target) -> bool:
    """Whether the CPU adds four products of uint8 and int8 to an int32 in one instruction (VNNI)."""
    wide = all(target_has_features(name, target) for name in ("avx512vnni", "avx512bw"))
    return wide or bool(target_has_features("avxvnni", target))


def has_byte_permutes(target: tvm.target.Target) -> bool:
    """Whether bytes of a 64-byte register can be permuted freely (VBMI)."""
    return bool(target_has_features("avx512vbmi", target))


def as_bytes(word: Expr) -> Expr:
    """The lanes of 32 bits as int8."""
    return tir.reinterpret(f"int8x{BYTES}", word)


def as_words(value: Expr, dtype: str = "uint32") -> Expr:
    """Bytes as lanes of 32 bits."""
    return tir.reinterpret(f"{dtype}x{LANES}", value)


def pick_bytes(word: Expr, index: Callable[[int], int]) -> Expr:
    """Lanes of 32 bits whose byte k is byte ``index(k)`` of ``word``."""
    return as_words(tir.Shuffle([as_bytes(word)], [tir.const(index(k), "int32") for k in range(BYTES)]))


def byte_dot(total: Expr, values: Expr, weights: Expr, target: tvm.target.Target) -> Expr:
    """``total`` (int32) plus, by lane, the sum of the four products of ``values`` (uint8) and ``weights`` (int8)."""
    name = "llvm.x86.avx512.vpdpbusd"
    values, weights = as_bytes(values), as_bytes(weights)
    if _whole_registers(target):
        return tir.call_llvm_pure_intrin(f"int32x{LANES}", f"{name}.512", total, values, weights)
    arguments = ((total, LANES), (values, BYTES), (weights, BYTES))
    return _in_halves(f"{name}.256", f"int32x{LANES // 2}", arguments)


def look_up_bytes(codes: Expr, values: Sequence[int], target: tvm.target.Target) -> Expr:
    """The ``values`` (uint8, at most sixteen, a power of two of them) that codes in bytes stand for.

    Bits above a code's own may be anything with byte permutes; else those above the fourth must be 0.
    """
    table = [tir.const(int(part), "int64") for part in np.resize(np.asarray(values, np.uint8), BYTES).view(np.int64)]
    whole = tir.Shuffle(table, [tir.const(k, "int32") for k in range(len(table))])
    entries, codes = tir.reinterpret(f"int8x{BYTES}", whole), as_bytes(codes)
    if not _whole_registers(target):
        pairs = ((entries, BYTES), (codes, BYTES))
        return as_words(_in_halves("llvm.x86.avx2.pshuf.b", f"int8x{BYTES // 2}", pairs))
    name = "permvar.qi" if has_byte_permutes(target) else "pshuf.b"
    return as_words(tir.call_llvm_pure_intrin(f"int8x{BYTES}", f"llvm.x86.avx512.{name}.512", entries, codes))


def _whole_registers(target: tvm.target.Target) -> bool:
    return bool(target_has_features("avx512bw", target))


def _in_halves(name: str, result: str, arguments: Sequence[tuple[Expr, int]]) -> Expr:
    """Call an intrinsic on the two halves of arguments, given with how many lanes they have."""
    parts = []
    for first in range(2):
        halves = [
            tir.Shuffle([value], [tir.const(first * (lanes // 2) + k, "int32") for k in range(lanes // 2)])
            for value, lanes in arguments
        ]
        parts.append(tir.call_llvm_pure_intrin(result, name, *halves))
    both = 2 * int(result.split("x")[1])
    return tir.Shuffle(parts, [tir.const(k, "int32") for k in range(both)])
