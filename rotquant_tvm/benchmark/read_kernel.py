"""Kernels that only read, or only copy: what the memory of a device can give."""

from __future__ import annotations

from typing import Any

import tvm
import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.schedules.cuda_ops import Registers, load_words, u32

NEVER = 0x9E3779B9
"""A thread stores what it read only if it is this, which the memory does not hold; else nothing would be read."""


def read_cuda(threads: int, loads: int) -> tvm.tirx.PrimFunc:
    """Build ``read(x, sink)`` for CUDA: every thread makes ``loads`` 16-byte loads.

    Shapes: x uint32 [n], n a multiple of 4 · threads · loads; sink uint32 [1].
    """
    n = tir.Var("n", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("read")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        x = T.arg("x", T.buffer((n,), "uint32"))
        sink = T.arg("sink", T.buffer((1,), "uint32"))
        blocks = n // (4 * threads * loads)
        with T.launch_thread("blockIdx.x", blocks) as block, T.launch_thread("threadIdx.x", threads) as thread:
            words, seen = Registers(4 * loads), Registers(1)
            for index in range(loads):
                place = ((block.astype("int64") * loads + index) * threads + thread) * 4
                load_words(words, 4 * index, x, [place], 4, "global.nc")
            seen[0] = u32(0)
            for word in words:
                seen[0] = seen[0] ^ word
            with T.If(seen[0] == u32(NEVER)), T.Then():
                T.buffer_store(sink, seen[0], [0])
    return builder.get()


def read_llvm(lanes: int = 16, unrolled: int = 8) -> tvm.tirx.PrimFunc:
    """Build ``read(x, sink)`` for CPUs: vectors of ``lanes`` words, in as many pieces as sink has rows.

    Shapes: x uint32 [pieces, n], n a multiple of lanes · unrolled; sink uint32 [pieces, lanes].
    """
    return _llvm("read", lanes, unrolled)


def copy_llvm(lanes: int = 16, unrolled: int = 8) -> tvm.tirx.PrimFunc:
    """Build ``copy(x, y)`` for CPUs, shapes as ``read_llvm``'s x."""
    return _llvm("copy", lanes, unrolled)


def _llvm(what: str, lanes: int, unrolled: int) -> tvm.tirx.PrimFunc:
    pieces, n = (tir.Var(name, "int64") for name in ("pieces", "n"))
    step = lanes * unrolled
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(what)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        x = T.arg("x", T.buffer((pieces, n), "uint32"))
        y = T.arg("y", T.buffer((pieces, n if what == "copy" else lanes), "uint32"))
        with T.parallel(0, pieces) as piece:
            totals: Any = None
            if what == "read":
                totals = T.sblock_alloc_buffer((step,), "uint32", scope="local")
                for index in range(unrolled):
                    zero = tir.Broadcast(tir.const(0, "uint32"), lanes)
                    T.buffer_store(totals, zero, [tir.Ramp(index * lanes, 1, lanes)])
            with T.serial(0, n // step) as outer:
                for index in range(unrolled):
                    here = tir.Ramp(outer * step + index * lanes, tir.const(1, "int64"), lanes)
                    value = tir.BufferLoad(x, [piece, here])
                    if what == "copy":
                        T.buffer_store(y, value, [piece, here])
                    else:
                        at = tir.Ramp(index * lanes, 1, lanes)
                        T.buffer_store(totals, tir.BufferLoad(totals, [at]) ^ value, [at])
            if what == "read":
                total = tir.BufferLoad(totals, [tir.Ramp(0, 1, lanes)])
                for index in range(1, unrolled):
                    total = total ^ tir.BufferLoad(totals, [tir.Ramp(index * lanes, 1, lanes)])
                T.buffer_store(y, total, [piece, tir.Ramp(0, 1, lanes)])
    return builder.get()
