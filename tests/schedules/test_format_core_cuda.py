"""Which core encodes which format, and where it holds vectors."""

from __future__ import annotations

import pytest
from rotquant_tvm.schedules.format_core_cuda import format_core
from rotquant_tvm.schedules.linear_core_cuda import HalfCore, LinearCore
from rotquant_tvm.schedules.vector_core_cuda import VectorCore

from rotquant_tvm.formats import HEAD_DIMS, LINEAR_BLOCK
from rotquant_tvm.ops.codec_shape import CodecShape

from .vector_cases import codec_of


@pytest.mark.parametrize(
    ("text", "core"),
    [("rotor3", VectorCore), ("turbo1:ip", VectorCore), ("q8_0", LinearCore), ("q4_0", LinearCore), ("bf16", HalfCore)],
)
def test_every_format_has_its_core(text, core):
    for dtype in ("float16", "float32"):
        assert isinstance(format_core(CodecShape.describe(codec_of(text, 64), dtype), 8, codes=True), core)


@pytest.mark.parametrize("text", ["dense3", "turbo3+qjl", "turbo2.5", "rq2", "qjl1"])
def test_what_has_none(text):
    assert format_core(CodecShape.describe(codec_of(text, 64), "float16"), 8, codes=True) is None


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_linear_block_lies_in_neighbouring_lanes(head_dim):
    for dtype in ("float16", "float32"):
        for elements in (4, 8, 16, 32):
            core = format_core(CodecShape.describe(codec_of("q4_0", head_dim), dtype), elements, codes=True)
            assert core is not None and LinearCore.possible(core.shape, core.lanes)
            width = LINEAR_BLOCK // core.lanes.access
            for lane in range(core.lanes.lanes):
                first = core.lanes.dim(lane // width * width, 0)
                assert core.lanes.dim(lane, 0) // LINEAR_BLOCK == first // LINEAR_BLOCK
