"""The simulator that stands in for a GPU: what it computes, and that it finds what it should."""

from __future__ import annotations

import numpy as np
import pytest
import tvm.tirx as tir
from rotquant_tvm.schedules.cuda_ops import (
    WARP,
    Registers,
    across,
    any_lane,
    block_sync,
    f32,
    load_words,
    pack_half2,
    prmt,
    ptx,
    shuffle_xor,
    store_words,
    u32,
)
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .simulated_gpu import SimulatedGPU

THREADS = 64


def kernel(emit, *, blocks=2):
    """``emit(x, y, block, thread)`` as a kernel on x, y float32 [n]."""
    n = tir.Var("n", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("kernel")
        x, y = (T.arg(name, T.buffer((n,), "float32")) for name in "xy")
        with T.launch_thread("blockIdx.x", blocks) as block, T.launch_thread("threadIdx.x", THREADS) as thread:
            emit(x, y, block, thread)
    return SimulatedGPU(builder.get())


def run(emit, size=512, **options):
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    y = np.full(size, np.nan, np.float32)
    kernel(emit, **options)(x, y)
    return x, y


def test_blocks_threads_wide_accesses_and_conditions():
    def emit(x, y, block, thread):
        words = Registers(4, "float32")
        at = (block * THREADS + thread) * 4
        load_words(words, 0, x, [at], 4, "global.nc")
        with T.If(thread % 2 == 0), T.Then():
            words[0] = words[1] * words[2] + words[3]
        store_words(y, [at], list(words))

    x, y = run(emit)
    expected = x.copy().reshape(-1, 4)
    expected[::2, 0] = expected[::2, 1] * expected[::2, 2] + expected[::2, 3]
    np.testing.assert_array_equal(y, expected.ravel())


def test_shuffles_votes_and_shared_memory():
    def emit(x, y, block, thread):
        at = block * THREADS + thread
        shared = T.alloc_buffer((THREADS,), "float32", scope="shared")
        T.buffer_store(shared, across(x[at], lambda a, b: tir.max(a, b), (16, 8, 4, 2, 1)), [thread])
        block_sync()
        mirrored = shared[THREADS - 1 - thread]
        T.buffer_store(y, tir.Select(any_lane(x[at] > f32(2.0)), -mirrored, mirrored), [at])

    x, y = run(emit, size=128)
    warps = x.reshape(2, 2, WARP)
    highest, marked = warps.max(-1)[:, ::-1], (warps > 2.0).any(-1)
    assert marked.any() and not marked.all()
    expected = np.repeat(np.where(marked, -highest, highest)[..., None], WARP, -1)
    np.testing.assert_array_equal(y.reshape(2, 2, WARP), expected)


def test_bytes_and_halves():
    def emit(x, y, block, thread):
        at = block * THREADS + thread
        packed = pack_half2(x[at], -x[at])
        low = prmt(packed, u32(0), u32(0x4410))
        T.buffer_store(y, tir.reinterpret("float16", low.astype("uint16")).astype("float32"), [at])

    x, y = run(emit, size=128)
    np.testing.assert_array_equal(y, x.astype(np.float16).astype(np.float32))


def test_rounding_up_and_saturation():
    def emit(x, y, block, thread):
        cell = Registers(1, "float32")
        ptx("fma.rp.ftz.f32", cell[0], x[thread], f32(1.0), f32(1.5 * 2.0**23))
        with T.If(thread >= WARP), T.Then():
            ptx("fma.rn.ftz.sat.f32", cell[0], x[thread], f32(1.0), f32(0.5))
        T.buffer_store(y, cell[0], [thread])

    x, y = run(emit, size=64, blocks=1)
    np.testing.assert_array_equal(y[:WARP] - 1.5 * 2.0**23, np.ceil(x[:WARP]))
    np.testing.assert_array_equal(y[WARP:], np.clip(x[WARP:] + np.float32(0.5), 0, 1))


@pytest.mark.parametrize(
    ("emit", "message"),
    [
        (lambda x, y, block, thread: T.buffer_store(y, x[thread * 100], [thread]), "elements"),
        (lambda x, y, block, thread: load_words(Registers(4, "float32"), 0, x, [thread], 4, "global.nc"), "unaligned"),
    ],
)
def test_bad_accesses_are_found(emit, message):
    with pytest.raises(AssertionError, match=message):
        run(emit)


def test_a_shuffle_without_all_lanes_is_found():
    def emit(x, y, block, thread):
        with T.If(thread % 2 == 0), T.Then():
            T.buffer_store(y, shuffle_xor(x[thread], 1), [thread])

    with pytest.raises(AssertionError, match="missing"):
        run(emit)


def test_an_unknown_instruction_is_named():
    def emit(x, y, block, thread):
        cell = Registers(1, "float32")
        ptx("ex2.approx.ftz.f32", cell[0], x[thread])

    with pytest.raises(NotImplementedError, match="ex2"):
        run(emit)
