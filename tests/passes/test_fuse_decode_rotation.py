"""FuseDecodeRotation: one call rotates, attends and un-rotates; what a kernel does not take stays; numbers stay."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.find_attention import FindAttention
from rotquant_tvm.passes.fuse_decode_rotation import FuseDecodeRotation
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.lower_kv_ops import LowerKVOps
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache
from tvm import relax, tirx

from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.site_shape import SiteShape

from ..schedules.cuda_targets import target_of
from .cached_step import check_case, operators, stages
from .tiny_model import TinyModel


@pytest.mark.full
@pytest.mark.parametrize("case", ["policy"])
def test_numbers_stay(case):
    check_case(case, "lower", "fuse")


def test_rotations_are_gone_from_decode_and_stay_in_prefill():
    made = stages(TinyModel(), KVCacheConfig.parse("hurwitz3"))
    assert operators(made["lower"], "decode").count("rotate") == 4
    assert operators(made["fuse"], "decode") == [op for op in operators(made["lower"], "decode") if op != "rotate"]
    assert operators(made["fuse"], "prefill") == operators(made["lower"], "prefill")
    shapes = [SiteShape.of(f) for f in made["fuse"].functions.values() if isinstance(f, tirx.PrimFunc)]
    assert {shape.rotated for shape in shapes if shape is not None and not shape.chunk} == {True}


def test_a_cache_without_rotations_is_left_alone():
    made = stages(TinyModel(), KVCacheConfig.parse("f16"))
    assert operators(made["fuse"], "decode") == operators(made["lower"], "decode")


@pytest.mark.parametrize(("formats", "rotations"), [("iso3/hurwitz2", 0), ("dense3/iso3", 4), ("hurwitz3/q8_0", 2)])
def test_on_cuda_only_what_the_kernel_takes(formats, rotations):
    """Dense rotations, and formats that the kernel lacks, keep launches of their own."""
    with target_of("sm_90a"):
        mod = TinyModel(heads=4, kv_heads=2, head_dim=64).module()
        for step in (FindAttention(), QuantizeKVCache(KVCacheConfig.parse(formats)), HoistRotation(), LowerKVOps()):
            mod = step(mod)
        fused = FuseDecodeRotation(tvm.target.Target.current())(mod)
    relax.analysis.well_formed(fused)
    assert operators(fused, "decode").count("rotate") == rotations
    assert ("attention_decode" in operators(fused, "decode")) == ("attention_decode" in operators(mod, "decode"))


def test_fusing_twice_is_fusing_once():
    made = stages(TinyModel(), KVCacheConfig.parse("hurwitz3"))
    again = FuseDecodeRotation(tvm.target.Target("llvm"))(made["fuse"])
    assert operators(again, "decode") == operators(made["fuse"], "decode")
