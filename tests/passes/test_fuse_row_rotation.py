"""FuseRowRotation: the kernel that stores a step's rows rotates them; what it does not take stays, as numbers do."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.find_attention import FindAttention
from rotquant_tvm.passes.fuse_decode_rotation import FuseDecodeRotation
from rotquant_tvm.passes.fuse_row_rotation import FuseRowRotation
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.kv_kernels import kernel_of
from rotquant_tvm.passes.lower_kv_ops import LowerKVOps
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache
from tvm import relax

from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.append_plain import row_rotations

from ..schedules.cuda_targets import target_of
from .cached_step import CachedStep, check_case, check_replay, operators, stages
from .tiny_model import TinyModel

POLICY = ",sinks=3,recent=2,center=32"


@pytest.mark.full
@pytest.mark.parametrize("case", ["policy", "policy-window"])
def test_numbers_of_other_formats_stay(case):
    check_case(case, "fuse-prefill", "fuse-rows")


def test_numbers_stay():
    """With a ring that is flushed between steps, keys of one rotation and values of another."""
    model = TinyModel()
    made = stages(model, KVCacheConfig.parse("hurwitz3/iso4" + POLICY))
    before, after = (CachedStep(model, made[name]) for name in ("fuse-prefill", "fuse-rows"))
    calls = before.conversation
    assert sum(call.decode for call in calls) > 2
    check_replay(calls, after.replay(calls))


@pytest.mark.parametrize("formats", ["rq3", "hurwitz3,recent=1", "iso3/turbo2" + POLICY])
def test_rotations_of_rows_are_gone_from_decode_and_stay_in_prefill(formats):
    made = stages(TinyModel(), KVCacheConfig.parse(formats))
    assert operators(made["fuse-prefill"], "decode").count("rotate") == 4
    kept = [op for op in operators(made["fuse-prefill"], "decode") if op != "rotate"]
    assert operators(made["fuse-rows"], "decode") == kept
    assert operators(made["fuse-rows"], "prefill") == operators(made["fuse-prefill"], "prefill")


def appends(mod, name="decode"):
    """The rotations of the appends that a function calls."""
    values = [binding.value for block in mod[name].body.blocks for binding in block.bindings]
    kernels = [kernel for value in values if (kernel := kernel_of(mod, value)) is not None]
    return [row_rotations(func) for operator, func in kernels if operator == "append_plain"]


def test_keys_or_values_without_a_rotation_are_stored_as_they_are():
    made = stages(TinyModel(), KVCacheConfig.parse("q8_0/iso3" + POLICY, "1=planar2/q8_0"))
    fused, before = (operators(made[name], "decode").count("rotate") for name in ("fuse-rows", "fuse-prefill"))
    assert appends(made["fuse-rows"]) == [((), ((4, 1),)), (((2, 1),), ())]
    assert appends(made["fuse-rows"], "prefill") == [None, None]
    assert fused == before - 2


@pytest.mark.parametrize("formats", ["q8_0/q4_0" + POLICY, "f16", "hurwitz3"])
def test_what_is_not_rotated_before_is_left_alone(formats):
    made = stages(TinyModel(), KVCacheConfig.parse(formats))
    assert operators(made["fuse-rows"], "decode") == operators(made["fuse-prefill"], "decode")
    assert set(appends(made["fuse-rows"])) <= {None}


@pytest.mark.parametrize("formats", ["iso3,sinks=4", "iso3,center=32", "iso3,defer=40"])
def test_a_flush_that_may_take_the_newest_token_keeps_it_rotated(formats):
    made = stages(TinyModel(), KVCacheConfig.parse(formats))
    assert operators(made["fuse-rows"], "decode") == operators(made["fuse-prefill"], "decode")


def test_rows_that_something_else_reads_stay_rotated():
    """Here the model's output: the rotated keys of the last layer, beside the logits."""
    mod = stages(TinyModel(), KVCacheConfig.parse("iso3" + POLICY))["fuse-prefill"]
    again = FuseRowRotation(tvm.target.Target("llvm"))(_returning_rotated_keys(mod))
    quartets = ((4, 1),)
    assert appends(again) == [(quartets, quartets), None]
    assert operators(again, "decode").count("rotate") == 2


def _returning_rotated_keys(mod):
    """The module, whose decode returns the first rotated rows of its last layer too."""
    func = mod["decode"]
    (block,) = func.body.blocks
    rotated = [b.var for b in block.bindings if (found := kernel_of(mod, b.value)) is not None and found[0] == "rotate"]
    builder = relax.BlockBuilder(tvm.IRModule({g: f for g, f in mod.functions_items() if g.name_hint != "decode"}))
    with builder.function("decode", list(func.params), attrs=dict(func.attrs)):
        with builder.dataflow():
            for binding in block.bindings:
                builder.emit_normalized(binding)
            output = builder.emit_output(relax.Tuple([func.body.body, rotated[-2]]))
        builder.emit_func_output(output)
    return builder.finalize()


CUDA_CASES = [("rq3", 0), ("hurwitz2+tcq" + POLICY, 0), ("dense3/iso3" + POLICY, 2), ("rq3,recent=0", 2)]


@pytest.mark.parametrize(("formats", "rotations"), CUDA_CASES)
def test_on_cuda_only_what_the_kernel_takes(formats, rotations):
    """The rotations of rows, per layer, that keep launches of their own."""
    with target_of("sm_90a"):
        mod = TinyModel(heads=4, kv_heads=2, head_dim=64).module()
        for step in (FindAttention(), QuantizeKVCache(KVCacheConfig.parse(formats)), HoistRotation(), LowerKVOps()):
            mod = step(mod)
        mod = FuseDecodeRotation(tvm.target.Target.current())(mod)
        fused = FuseRowRotation(tvm.target.Target.current())(mod)
    relax.analysis.well_formed(fused)
    gone = operators(mod, "decode").count("rotate") - operators(fused, "decode").count("rotate")
    assert gone == 2 * (2 - rotations)


def test_fusing_twice_is_fusing_once():
    made = stages(TinyModel(), KVCacheConfig.parse("rq3"))["fuse-rows"]
    again = FuseRowRotation(tvm.target.Target("llvm"))(made)
    assert operators(again, "decode") == operators(made, "decode")
