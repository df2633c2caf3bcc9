"""The placement of vectors over lanes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm.tirx as tir
from hypothesis import given
from hypothesis import strategies as st
from rotquant_tvm.schedules.cuda_ops import Registers, f32
from rotquant_tvm.schedules.vector_lanes_cuda import VectorLanes
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from rotquant_tvm.formats import HEAD_DIMS

from .simulated_gpu import SimulatedGPU

DTYPES = pytest.mark.parametrize("dtype", ["float16", "float32"])


@DTYPES
@given(head_dim=st.sampled_from(HEAD_DIMS), elements=st.sampled_from([4, 8, 16, 32]))
def test_every_dim_has_one_place(dtype, head_dim, elements):
    lanes = VectorLanes.choose(head_dim, dtype, elements)
    dims = [lanes.dim(lane, r) for lane in range(lanes.lanes) for r in range(lanes.elements)]
    assert sorted(dim for dim in dims if dim < head_dim) == list(range(head_dim))
    idle = [c for c in range(lanes.chunks) if any(not lanes.active(n, c * 1) for n in range(lanes.lanes))]
    assert idle == [c for c in range(lanes.chunks) if lanes.idle(c)] and set(idle) <= {lanes.chunks - 1}
    assert lanes.groups * lanes.lanes == 32 and lanes.access * np.dtype(dtype).itemsize == 16


@pytest.mark.parametrize(
    ("head_dim", "dtype", "lanes"),
    [(128, "float16", 16), (256, "float16", 32), (512, "float16", 32), (128, "float32", 16), (96, "float32", 16)],
)
def test_eight_elements_to_a_lane_where_they_fit(head_dim, dtype, lanes):
    assert VectorLanes.choose(head_dim, dtype).lanes == lanes


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96])
def test_what_is_loaded_is_stored_and_summed(head_dim, dtype):
    """One vector per group of lanes, doubled; its lanes' sum of squares goes to ``total``."""
    lanes = VectorLanes.choose(head_dim, dtype)
    with IRBuilder() as builder, T.prim_func(s_tir=False):
        T.func_name("double")
        x, y = (T.arg(name, T.buffer((lanes.groups, head_dim), dtype)) for name in "xy")
        total = T.arg("total", T.buffer((lanes.groups,), "float32"))
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", 32) as thread:
            lane, group = lanes.place(thread)
            raw = lanes.raw()
            lanes.load(raw, x, [group], lane)
            values = lanes.unpack(raw)
            (square,) = lanes.square_norms([values])
            doubled = Registers(lanes.elements, "float32")
            for r, value in enumerate(values):
                doubled[r] = value * f32(2.0)
            lanes.store(list(doubled), y, [group], lane)
            T.buffer_store(total, square[0], [group])
    x = np.random.default_rng(1).standard_normal((lanes.groups, head_dim)).astype(dtype)
    x[-1, :3] = np.nan, np.inf, -np.inf
    y, total = np.full_like(x, np.nan), np.full(lanes.groups, np.nan, np.float32)
    SimulatedGPU(builder.get())(x, y, total)
    clipped = np.clip(np.nan_to_num(x.astype(float), nan=0), -65504, 65504)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y, (2 * clipped).astype(dtype))
    np.testing.assert_allclose(total, (clipped**2).sum(-1), rtol=1e-6)


def test_lanes_beyond_the_dims_are_told_apart():
    lanes = VectorLanes(80, "float16", 16)
    lane = tir.Var("lane", "int32")
    assert lanes.chunks == 1 and lanes.idle(0) and not VectorLanes(64, "float16", 8).idle(0)
    assert [bool(lanes.active(n, 0)) for n in (9, 10)] == [True, False]
    value = tir.Var("value", "float32")
    assert VectorLanes(64, "float16", 8).where_active(lane, 0, value).same_as(value)
