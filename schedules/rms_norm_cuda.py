"""RMS norm on CUDA: y = round(x / rms(x)) · weight over the last axis of float16 rows; a thread block takes a row."""

from __future__ import annotations

import tvm.tirx as tir
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.ops.model_op import model_properties
from rotquant_tvm.ops.rms_norm import rms_norm_attrs

from .cuda_ops import WARP, Registers, across, block_sync, f32, half2, load_words, pack_half2, scalar, store_words
from .dependent_launch_cuda import let_next_start, starts_early, wait_for_inputs
from .knobs import chosen_knobs

KNOBS: dict[str, tuple[int, ...]] = {"threads": (64, 128, 256, 512, 1024)}
"""``threads`` of a block at most."""
LANE_VALUES = 8
"""Values of one access of 16 bytes."""
MOST_THREADS = 512
"""By default."""


def rms_norm_cuda(func: tir.PrimFunc, target: Target) -> tir.PrimFunc | None:
    """Build the kernel with the knobs that a definition (``ops.rms_norm``) chose; None for odd rows."""
    found = model_properties(func)
    size = (int(found["features"]), float(found["epsilon"]), int(found["leading"]))
    if not takes_features(size[0]):
        return None
    return rms_norm(*size, target, chosen_knobs(func).get("threads", MOST_THREADS))


def takes_features(features: int) -> bool:
    """Whether there is a kernel for rows of so many values."""
    return features % LANE_VALUES == 0


def rms_norm(
    features: int, epsilon: float, leading: int, target: Target, most_threads: int = MOST_THREADS
) -> tir.PrimFunc:
    """Build ``rms_norm(x, weight, y)``: x and y float16 [..., features] with ``leading`` symbolic sizes before.

    Sums and products are float32; x / rms(x) is rounded to float16 before it is multiplied by the weight, as the
    models' own code does.
    """
    parts = features // LANE_VALUES
    threads = min(most_threads, -(-parts // WARP) * WARP)
    with IRBuilder() as builder, T.prim_func(s_tir=False, is_private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        T.func_attr(rms_norm_attrs(features, epsilon, leading))
        sizes = [tir.Var(f"d{i}", "int64") for i in range(leading)]
        x = T.arg("x", T.buffer((*sizes, features), "float16"))
        weight = T.arg("weight", T.buffer((features,), "float16"))
        y = T.arg("y", T.buffer((*sizes, features), "float16"))
        rows = tir.const(1, "int64")
        for size in sizes:
            rows = rows * size
        flat = [T.decl_buffer((rows, features), "float16", data=each.data) for each in (x, y)]
        with T.launch_thread("blockIdx.x", rows) as row, T.launch_thread("threadIdx.x", threads) as thread:
            thread = scalar(thread.astype("int32"))
            _row((flat[0], weight, flat[1]), (row, thread), (parts, threads, epsilon), starts_early(target))
    return builder.get()


def _row(buffers: tuple, place: tuple, sizes: tuple[int, int, float], early: bool) -> None:
    (x, weight, y), (row, thread), (parts, threads, epsilon) = buffers, place, sizes
    turns = -(-parts // threads)
    values, factors = Registers(4 * turns), Registers(4 * turns)
    total = Registers(1, "float32")
    values.fill(tir.const(0, "uint32"))

    def each_part(turn: int, body) -> None:
        part = thread + turn * threads
        if (turn + 1) * threads <= parts:
            body(part)
        else:
            with T.If(part < parts), T.Then():
                body(part)

    let_next_start(early)
    wait_for_inputs(early)  # for the weight too: it may have been worked out just before (1 + weight)
    for turn in range(turns):
        each_part(turn, lambda part, at=4 * turn: load_words(factors, at, weight, (part * LANE_VALUES,), 4, "global"))
    for turn in range(turns):
        each_part(turn, lambda part, at=4 * turn: load_words(values, at, x, (row, part * LANE_VALUES), 4, "global"))
    total[0] = f32(0)
    for word in values:
        for value in half2(word):
            total[0] = total[0] + value * value
    scale = scalar(tir.rsqrt(_sum_of_block(total[0], thread, threads) / f32(float(parts * LANE_VALUES)) + f32(epsilon)))
    for turn in range(turns):
        products = [_normalized(values[4 * turn + k], factors[4 * turn + k], scale) for k in range(4)]
        each_part(turn, lambda part, words=products: store_words(y, (row, part * LANE_VALUES), words))


def _normalized(word, factor, scale):
    """Two values of the result, rounded after each of the two products."""
    low, high = half2(scalar(pack_half2(*(value * scale for value in half2(word)))))
    first, second = half2(factor)
    return pack_half2(low * first, high * second)


def _sum_of_block(value, thread, threads: int):
    value = across(value, lambda a, b: a + b, (16, 8, 4, 2, 1))
    warps = threads // WARP
    if warps == 1:
        return value
    shared = T.alloc_buffer((warps,), "float32", scope="shared")
    with T.If(thread % WARP == 0), T.Then():
        T.buffer_store(shared, value, [thread // WARP])
    block_sync()
    total = Registers(1, "float32")
    total[0] = shared[0]
    for warp in range(1, warps):
        total[0] = total[0] + shared[warp]
    return total[0]
