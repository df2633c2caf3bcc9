"""Codes that move as elements do: into the layout of rotated vectors and back."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.code_exchange_cuda import CodeExchange
from rotquant_tvm.schedules.cuda_ops import WARP, Registers
from rotquant_tvm.schedules.exchanged_rotation_cuda import ExchangedRotation
from rotquant_tvm.schedules.local_layers_cuda import Layout
from rotquant_tvm.schedules.vector_lanes_cuda import VectorLanes
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Rotation

from .simulated_gpu import SimulatedGPU
from .test_local_layers_cuda import CASES


@pytest.mark.parametrize(("family", "head_dim", "dtype", "elements"), CASES)
def test_codes_move_as_elements_do(family, head_dim, dtype, elements):
    lanes = VectorLanes.choose(head_dim, dtype, elements)
    rotation = ExchangedRotation(lanes, Rotation.draw(family, head_dim, 7).structure, budget=None)
    first, last, count = Layout.of(lanes), rotation.layers[-1].after, lanes.elements // 4
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("moves")
        x, y, z = (T.arg(name, T.buffer((WARP, count), "uint32")) for name in "xyz")
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", WARP) as thread:
            lane, _ = lanes.place(thread)
            words = Registers(count)
            for k in range(count):
                words[k] = x[thread, k]
            exchange = CodeExchange(rotation, lane)
            there = exchange.into(list(words))
            for target, values in ((y, there), (z, exchange.back(there))):
                for k, value in enumerate(values):
                    T.buffer_store(target, value, [thread, k])
    codes = np.random.default_rng(1).integers(0, 256, (lanes.groups, head_dim), np.uint8)
    x, y, z = (np.zeros((WARP, count), np.uint32) for _ in range(3))
    bytes_of = {id(words): words.view(np.uint8).reshape(WARP, -1) for words in (x, y, z)}
    for thread in range(WARP):
        for register in range(lanes.elements):
            dim = first.dim(thread % lanes.lanes | register << first.lane_bits)
            bytes_of[id(x)][thread, register] = codes[thread // lanes.lanes, dim]
    SimulatedGPU(builder.get())(x, y, z)
    for thread in range(WARP):
        for register in range(lanes.elements):
            dim = last.dim(thread % lanes.lanes | register << last.lane_bits)
            assert bytes_of[id(y)][thread, register] == codes[thread // lanes.lanes, dim]
    np.testing.assert_array_equal(z, x)
