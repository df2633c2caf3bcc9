"""FusePrefillRotation: prefill attention takes its operands as they are; what it cannot fuse stays; numbers stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.fuse_prefill_rotation import FusePrefillRotation
from rotquant_tvm.passes.kv_kernels import KernelLibrary, kernel_of, rotation_constant
from rotquant_tvm.schedules.gpu_kv_kernels import gpu_kernel
from tvm import relax

from rotquant_tvm.formats import TileLayout
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.ops.site_shape import SiteShape

from ..schedules.cuda_targets import target_of
from .cached_step import check_case, operators, stages
from .tiny_model import TinyModel


@pytest.mark.full
@pytest.mark.parametrize("case", ["plain", "policy", "policy-window", "mixed-window"])
def test_numbers_stay(case):
    check_case(case, "fuse", "fuse-prefill")


@pytest.mark.parametrize(
    ("formats", "before", "after"),
    [
        ("hurwitz3", 8, 0),  # query, keys, values and output of two layers; append rotates for itself
        ("iso4,sinks=2,recent=4,center=32", 8, 4),  # what enters the 16-bit segments is rotated for them
        ("hurwitz3/q8_0", 4, 0),
        ("q8_0/hurwitz3", 4, 0),
        ("q8_0", 0, 0),
        ("dense3/turbo2", 8, 0),
    ],
)
def test_rotations_that_stay(formats, before, after):
    made = stages(TinyModel(), KVCacheConfig.parse(formats))
    counts = [operators(made[stage], "prefill").count("rotate") for stage in ("fuse", "fuse-prefill")]
    assert counts == [before, after]
    assert operators(made["fuse-prefill"], "decode") == operators(made["fuse"], "decode")
    relax.analysis.well_formed(made["fuse-prefill"])


def test_operands_are_the_models_own_and_the_matrices_its_rotations():
    config = KVCacheConfig.parse("hurwitz3/planar2")
    made, model = stages(TinyModel(), config)["fuse-prefill"], TinyModel()
    values = [binding.value for block in made["prefill"].body.blocks for binding in block.bindings]
    calls = [value for value in values if (kernel_of(made, value) or [""])[0] == "attention_prefill"]
    assert len(calls) == model.layers
    for layer, call in enumerate(calls):
        assert SiteShape.of(made[call.args[0]]).rotated
        codecs = config.codecs(layer, model.layers, model.head_dim)
        for codec, matrix in zip(codecs, call.args[1].fields[-2:], strict=True):
            terms = matrix.value.numpy().astype(np.float64).reshape(-1, model.head_dim, model.head_dim)
            np.testing.assert_allclose(terms.sum(0), codec.rotation.matrix(), atol=1e-6)


def test_a_chunk_that_is_quantized_first_is_left_alone():
    made = stages(TinyModel(), replace(KVCacheConfig.parse("hurwitz3"), quantize_chunk=True))
    assert operators(made["fuse-prefill"], "prefill") == operators(made["fuse"], "prefill")


def spelled_out(shape: SiteShape, seeds=(1, 1, 2, 2)) -> tvm.IRModule:
    """One attention with launches for its rotations, which are drawn from seeds: query, key, value, output."""
    bb = relax.BlockBuilder()
    kernels = KernelLibrary(bb, target_of("sm_90a"))
    batch, seq, tiles = (tvm.tirx.Var(name, "int64") for name in ("batch", "seq", "tiles"))
    codecs, d = shape.codecs(), shape.head_dim
    words = TileLayout(codecs[0].format, codecs[1].format, d).tile_bytes // 4
    rows = relax.TensorType([batch, seq, shape.heads, d], shape.dtype)
    columns = relax.TensorType([batch, shape.kv_heads, seq, d], shape.dtype)
    counts = relax.TensorType([batch], "int32")
    types = [rows, columns, columns, relax.TensorType([batch, shape.kv_heads, tiles, words], "uint32"), counts, counts]
    inputs = [relax.Var(f"x{n}", kind) for n, kind in enumerate(types)]
    drawn = [codec.format.codec(d, seed) for codec, seed in zip((codecs[0], *codecs, codecs[1]), seeds, strict=True)]

    def turned(x, rotation):
        if rotation.identity:
            return x
        kernel = kernels.rotate(rotation.structure, d, shape.dtype)
        return bb.emit(relax.call_tir(kernel, [x, rotation_constant(rotation)], x.ty))

    with bb.function("prefill", inputs):
        with bb.dataflow():
            operands = [turned(x, codec.rotation) for x, codec in zip(inputs[:3], drawn[:3], strict=True)]
            call = relax.call_tir(kernels.attention_packed(shape, 1), [*operands, *inputs[3:]], rows)
            out = bb.emit_output(turned(bb.emit(call), drawn[3].inverse_rotation))
        bb.emit_func_output(out)
    return bb.get()


SHAPE = SiteShape("hurwitz3", "iso2", 4, 2, 64, 0.1, None, "float16", chunk=True)


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"v": "q8_0"}, True),
        ({"k": "dense3"}, True),
        ({"dtype": "float32"}, False),
        ({"softcap": 30.0}, False),
        ({"window": 100}, False),
        ({"k": "f16", "v": "f16"}, False),
    ],
)
def test_on_cuda_only_what_the_kernel_takes(changes, fused):
    mod = spelled_out(replace(SHAPE, **changes))
    result = FusePrefillRotation(target_of("sm_90a"))(mod)
    assert operators(result, "prefill") == (["attention_prefill"] if fused else operators(mod, "prefill"))
    if fused:
        call = result["prefill"].body.blocks[0].bindings[0].value
        operands = call.args[1].fields
        own = result["prefill"].params
        assert all(x.same_as(param) for x, param in zip(operands[:6], own, strict=True))
        assert gpu_kernel(result[call.args[0]], target_of("sm_90a")) is not None


@pytest.mark.parametrize("seeds", [(3, 1, 2, 2), (1, 1, 2, 3)])
def test_rotations_that_do_not_undo_each_other_stay(seeds):
    mod = spelled_out(SHAPE, seeds)
    assert operators(FusePrefillRotation(target_of("sm_90a"))(mod), "prefill") == operators(mod, "prefill")


def test_fusing_twice_is_fusing_once():
    made = stages(TinyModel(), KVCacheConfig.parse("hurwitz3"))
    again = FusePrefillRotation(tvm.target.Target("llvm"))(made["fuse-prefill"])
    assert operators(again, "prefill") == operators(made["fuse-prefill"], "prefill")
