"""Rotations whose vectors move between layers: the rotation and its inverse, wherever weights are kept."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.cuda_ops import WARP
from rotquant_tvm.schedules.exchanged_rotation_cuda import ExchangedRotation
from rotquant_tvm.schedules.local_layers_cuda import Layout
from rotquant_tvm.schedules.vector_lanes_cuda import VectorLanes
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Rotation

from ..sampling import sampled
from .simulated_gpu import SimulatedGPU
from .test_local_layers_cuda import CASES

WARPS = 2


def there_and_back(rotation, dtype, elements, budget):
    """y = R x in the order of registers, z = Rᵀ y, and the same of the inverse's own coefficients."""
    head_dim = rotation.head_dim
    lanes = VectorLanes.choose(head_dim, dtype, elements)
    rows = lanes.groups * WARPS
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("there_and_back")
        x = T.arg("x", T.buffer((rows, head_dim), dtype))
        y, z, v = (T.arg(name, T.buffer((rows, head_dim), "float32")) for name in "yzv")
        data = [T.arg(name, T.buffer((rotation.data.size,), "float32")) for name in ("rotation", "inverse")]
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", WARP * WARPS) as thread:
            lane, group = lanes.place(thread)
            raw, row = lanes.raw(), thread // WARP * lanes.groups + group
            lanes.load(raw, x, [row], lane)
            both = [ExchangedRotation(lanes, rotation.structure, budget=budget, inverse=k == 1) for k in range(2)]
            for exchanged, coefficients in zip(both, data, strict=True):
                exchanged.load(coefficients, lane, thread, WARPS)
            there = both[0].apply([lanes.unpack(raw)])
            results = there[0], both[0].apply_inverse(there)[0], both[1].apply_inverse(there)[0]
            for target, registers in zip((y, z, v), results, strict=True):
                for r, value in enumerate(registers):
                    T.buffer_store(target, value, [row, lane * lanes.elements + r])
    x = np.random.default_rng(0).standard_normal((rows, head_dim)).astype(dtype)
    y, z, v = (np.full((rows, head_dim), np.nan, np.float32) for _ in range(3))
    SimulatedGPU(builder.get())(x, y, z, v, rotation.data, rotation.inverse().data)
    return lanes, both[0], (x, y, z, v)


def in_order(values, lanes, layout):
    """Values [rows, lanes · registers] by dim."""
    ordered = np.full_like(values, np.nan)
    for lane in range(lanes.lanes):
        for register in range(lanes.elements):
            place = layout.dim(lane | register << layout.lane_bits)
            ordered[:, place] = values[:, lane * lanes.elements + register]
    return ordered


@pytest.mark.parametrize("budget", sampled([None, 0, 64, 10_000], [None, 0]))
@pytest.mark.parametrize(("family", "head_dim", "dtype", "elements"), CASES)
def test_the_rotation_and_back(family, head_dim, dtype, elements, budget):
    rotation = Rotation.draw(family, head_dim, 7)
    lanes, exchanged, (x, y, z, v) = there_and_back(rotation, dtype, elements, budget)
    first = Layout.of(lanes)
    rotated = in_order(y, lanes, exchanged.layers[-1].after)
    np.testing.assert_allclose(rotated, rotation.apply(x.astype(float)), atol=2e-5)
    for back in (z, v):
        np.testing.assert_allclose(in_order(back, lanes, first), x, atol=2e-5)


def test_layers_beyond_the_budget_are_in_shared_memory():
    lanes = VectorLanes.choose(256, "float16")
    structure = Rotation.draw("hurwitz", 256, 0).structure
    held = {budget: ExchangedRotation(lanes, structure, budget=budget) for budget in (None, 0, 128)}
    assert {budget: rotation.register_weights for budget, rotation in held.items()} == {None: 64, 0: 0, 128: 128}
    assert held[128].resident and not held[None].resident
