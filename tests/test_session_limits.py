"""What sessions are told of a module's GPU kernels."""

from __future__ import annotations

import pytest
from rotquant_tvm.passes.fuse_decode_rotation import FuseDecodeRotation
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.hoist_scratch import HoistScratch
from rotquant_tvm.passes.lower_kv_ops import LowerKVOps
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache
from rotquant_tvm.schedules.gpu_kv_kernels import GPUKVKernels
from tvm.target import Target

from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.session_limits import session_limits

from .passes.tiny_model import TinyModel
from .schedules.cuda_targets import target_of


def decode_module(formats):
    """The KV operators of a small model's decode on a GPU."""
    target = target_of("sm_90a")
    with target:
        mod = TinyModel(heads=36, kv_heads=2, head_dim=64).module()
        passes = [QuantizeKVCache(KVCacheConfig.parse(formats)), HoistRotation(), LowerKVOps()]
        for step in (*passes, FuseDecodeRotation(target), GPUKVKernels(target), HoistScratch()):
            mod = step(mod)
    del mod["prefill"]
    return mod, target


def test_a_kernel_with_counters_bounds_the_batch():
    """36 query heads on 2 kv heads are three streams each."""
    limits = session_limits(*decode_module("hurwitz3"))
    assert limits["max_batch"] == 65536 // 6


@pytest.mark.parametrize(("formats", "recordable"), [("hurwitz3", True), ("bf16", False)])
def test_only_steps_without_memory_of_their_own_are_recorded(formats, recordable):
    """The generic definition, which bf16 falls back to, takes its partial results from a pool."""
    mod, target = decode_module(formats)
    kernels = {gvar: func for gvar, func in mod.functions_items() if "attention_decode" in gvar.name_hint}
    others = [gvar for gvar in mod.get_global_vars() if gvar not in kernels and "decode" not in gvar.name_hint]
    for gvar in others:
        del mod[gvar]
    assert session_limits(mod, target)["recordable"] == recordable


def test_cpus_have_no_limits():
    mod, _ = decode_module("hurwitz3")
    assert session_limits(mod, Target("llvm")) == {}
