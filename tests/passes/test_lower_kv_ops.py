"""LowerKVOps: attention reads the packed cache; nothing of the capacity's size is left; numbers stay."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.find_attention import FindAttention
from rotquant_tvm.passes.hoist_rotation import HoistRotation
from rotquant_tvm.passes.lower_kv_ops import SPLITS, LowerKVOps
from rotquant_tvm.passes.quantize_kv_cache import QuantizeKVCache
from tvm import relax, tirx
from tvm_ffi import structural_walk

from rotquant_tvm.errors import UsageError
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.site_shape import SiteShape

from ..sampling import sampled
from .cached_step import CASES, check_case, operators, stages
from .tiny_model import TinyModel

CONFIG = KVCacheConfig.parse("hurwitz3", "1=q8_0/iso3")
POLICY = KVCacheConfig.parse("hurwitz3,sinks=2,recent=5,center=32", "1=q8_0/iso3")


def capacity_tensors(mod: tvm.IRModule, name: str) -> list[str]:
    """Variables whose size grows with the capacity and which are no update in place."""
    found = []
    tiles = mod[name].params[1 if name == "decode" else 2].ty.shape[2]
    for var, value in relax.analysis.get_var2val(mod[name]).items():
        seen = []
        structural_walk(var.ty, (tirx.Var, seen.append))
        operator = getattr(value, "op", None)
        in_place = isinstance(value, relax.TupleGetItem) or getattr(operator, "name", "") == "relax.call_tir_inplace"
        if any(v.same_as(tiles) for v in seen) and not in_place:
            found.append(var.name)
    return found


def scratch_names(mod: tvm.IRModule) -> set[str]:
    """Names of the symbolic sizes of all buffers that kernels allocate."""
    names = set()

    def note(block):
        for buffer in block.alloc_buffers:
            structural_walk(list(buffer.shape), (tirx.Var, lambda var: names.add(var.name)))

    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            structural_walk(func.body, (tvm.s_tir.SBlock, note))
    return names


@pytest.mark.parametrize(("config", "dequantize"), [(CONFIG, "dequantize_cache"), (POLICY, "dequantize_segments")])
def test_attention_reads_the_packed_cache(config, dequantize):
    made = stages(TinyModel(), config)
    for name in ("prefill", "decode"):
        before, after = operators(made["hoist"], name), operators(made["lower"], name)
        assert {dequantize, "attention_dense"} <= set(before)
        wanted = [op for op in before if op != dequantize]
        assert after == [f"attention_{name}" if op == "attention_dense" else op for op in wanted]


@pytest.mark.parametrize("config", [CONFIG, POLICY])
def test_nothing_of_the_capacitys_size_is_allocated(config):
    made = stages(TinyModel(), config)
    for name in ("prefill", "decode"):
        assert capacity_tensors(made["hoist"], name)
        assert capacity_tensors(made["lower"], name) == []
    assert scratch_names(made["lower"]) <= {"batch"}


@pytest.mark.parametrize("config", [CONFIG, POLICY])
def test_unused_kernels_are_gone(config):
    lowered = stages(TinyModel(), config)["lower"]
    used = {op for name in ("prefill", "decode") for op in operators(lowered, name)}
    left = {str(f.attrs["rotquant.op"]) for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)}
    assert left == used


def test_kernels_carry_their_sites_shape():
    model = TinyModel(layers=1, heads=6, kv_heads=3, head_dim=64, window=9)
    lowered = stages(model, KVCacheConfig.parse("iso3/planar2"))["lower"]
    kernels = [f for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]
    shapes = [SiteShape.of(f) for f in kernels if str(f.attrs["rotquant.op"]).startswith("attention")]
    decode, prefill = sorted(shapes, key=lambda shape: shape.chunk)
    for shape in (decode, prefill):
        assert (shape.k, shape.v, shape.heads, shape.kv_heads, shape.head_dim) == ("iso3", "planar2", 6, 3, 64)
        assert (shape.window, shape.dtype, shape.scale) == (9, "float32", pytest.approx(0.3))
    assert prefill.chunk and not decode.chunk and decode.splits == SPLITS["llvm"] // 3


@pytest.mark.parametrize("case", sampled(CASES, ["policy-window"]))
def test_numbers_stay(case):
    check_case(case, "quantize", "lower")


def test_lowering_twice_is_lowering_once():
    lowered = stages(TinyModel(), CONFIG)["lower"]
    again = LowerKVOps()(lowered)
    for name in ("prefill", "decode"):
        tvm.ir.assert_structural_equal(again[name], lowered[name], map_free_vars=True)


def test_a_cache_that_is_still_unrotated_is_refused():
    quantized = stages(TinyModel(layers=1), KVCacheConfig.parse("hurwitz3"))["quantize"]
    with pytest.raises(UsageError, match="do not come straight from its packed cache"):
        LowerKVOps()(quantized)
    unrotated = stages(TinyModel(layers=1), KVCacheConfig.parse("f16"))["quantize"]
    assert operators(LowerKVOps()(unrotated), "decode") == ["advance", "append", "attention_decode"]


@pytest.mark.parametrize("kind", ["llvm", "cuda"])
def test_all_passes_in_a_sequence_for_a_target(kind):
    """The current target decides what the kernels' loops are."""
    target = {"cuda": {"kind": "cuda", "arch": "sm_80", "host": "llvm"}, "llvm": {"kind": "llvm"}}[kind]
    passes = [FindAttention(), QuantizeKVCache(CONFIG), HoistRotation(), LowerKVOps()]
    with tvm.target.Target(target):
        mod = tvm.transform.Sequential(passes)(TinyModel().module())
    relax.analysis.well_formed(mod)
    assert operators(mod, "decode") == operators(stages(TinyModel(), CONFIG)["lower"], "decode")
    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            tags = set()
            structural_walk(func.body, (tirx.For, lambda loop: tags.add(_tag(loop))))  # noqa: B023
            assert ("threadIdx.x" in tags) == (kind == "cuda")


def _tag(loop):
    return loop.thread_binding.thread_tag if loop.thread_binding is not None else None
