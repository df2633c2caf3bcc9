"""Where a rotation's weights are kept, and that inverses share them."""

from __future__ import annotations

import numpy as np
import pytest
from rotquant_tvm.schedules.cuda_ops import WARP, block_sync
from rotquant_tvm.schedules.held_rotation_cuda import HeldRotation, load_rotations
from rotquant_tvm.schedules.vector_lanes_cuda import VectorLanes
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import Rotation

from .simulated_gpu import SimulatedGPU

WARPS = 2


def there_and_back(rotation, budget, staged):
    """y = R x and z = Rᵀ y, of one vector per group of lanes."""
    head_dim = rotation.head_dim
    lanes = VectorLanes.choose(head_dim, "float32")
    held = HeldRotation(lanes, rotation.structure, budget=budget, staged=staged)
    inverse = held.inverse(budget)
    rows = lanes.groups * WARPS
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("there_and_back")
        x, y, z = (T.arg(name, T.buffer((rows, head_dim), "float32")) for name in "xyz")
        data = [T.arg(name, T.buffer((rotation.data.size,), "float32")) for name in ("rotation", "inverse")]
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", WARP * WARPS) as thread:
            lane, group = lanes.place(thread)
            held.place(lane)
            inverse.place(lane)
            if load_rotations(list(zip((held, inverse), data, strict=True)), thread, WARPS):
                block_sync()
            raw, row = lanes.raw(), thread // WARP * lanes.groups + group
            lanes.load(raw, x, [row], lane)
            there = held.apply([lanes.unpack(raw)])
            lanes.store(list(there[0]), y, [row], lane)
            lanes.store(list(held.apply_inverse(there, inverse)[0]), z, [row], lane)
    x = np.random.default_rng(0).standard_normal((rows, head_dim)).astype(np.float32)
    y, z = np.full_like(x, np.nan), np.full_like(x, np.nan)
    SimulatedGPU(builder.get())(x, y, z, rotation.data, rotation.inverse().data)
    return held, inverse, (x, y, z)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("budget", [0, 64, 10_000])
@pytest.mark.parametrize(("family", "head_dim"), [("turbo", 128), ("hurwitz", 80), ("rotor", 64), ("iso", 96)])
def test_weights_anywhere_give_the_same(family, head_dim, budget, staged):
    rotation = Rotation.draw(family, head_dim, 7)
    held, inverse, (x, y, z) = there_and_back(rotation, budget, staged)
    np.testing.assert_allclose(y, rotation.apply(x.astype(float)), atol=1e-5)
    np.testing.assert_allclose(z, x, atol=1e-5)
    several = len(held.layers) > 1
    assert held.uses_shared == (several and budget < 10_000)
    assert inverse.uses_shared == (several and budget < 10_000)


def test_the_inverse_of_local_layers_has_no_weights_of_its_own():
    lanes = VectorLanes.choose(128, "float16")
    assert HeldRotation(lanes, [(4, 1)]).inverse().register_weights() == 0
    turbo = HeldRotation(lanes, [(4, 1), (4, 4), (4, 16), (2, 64)], budget=10_000)
    assert turbo.register_weights() == 8 * (4 + 4 + 4 + 2)
    assert turbo.inverse(10_000).register_weights() == 8 * (4 + 4 + 2)
