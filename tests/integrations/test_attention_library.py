"""Compiled attentions: rotations are parameters, libraries are kept, and code for CUDA is made of the same module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm_ffi import structural_walk

from rotquant_tvm.errors import DeviceError, FormatError, ModelError, UsageError
from rotquant_tvm.integrations import attention_library as home
from rotquant_tvm.integrations.attention_geometry import AttentionGeometry, layer_rotations
from rotquant_tvm.integrations.attention_library import AttentionLibrary, attention_library
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.pass_hooks import PassHooks
from rotquant_tvm.pipeline import pass_context
from rotquant_tvm.target import resolve_target

from ..sampling import sampled

H100 = {"kind": "cuda", "arch": "sm_90a", "max_threads_per_block": 1024, "max_shared_memory_per_block": 232448}
H100 |= {"thread_warp_size": 32, "host": "llvm"}
SHAPE = AttentionGeometry(4, 2, 32, float(np.float32(32**-0.5)), None, None, "float32", "hurwitz3", "")
"""The attention of ``tiny_models``, so that their tests find it compiled."""


def passed(geometry: AttentionGeometry, target) -> tvm.IRModule:
    """The module after the KV passes, with rotations as parameters."""
    with pass_context(PassHooks()):
        return home._functions(geometry, target)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("llvm", "float32"), (H100, "float32"), (H100, "float16")],
    ids=["llvm", "cuda", "cuda-float16"],
)
@pytest.mark.parametrize("formats", ["hurwitz3", "iso4/f16", "turbo2.5/q8_0", "f16"])
def test_rotations_become_parameters(formats, target, dtype):
    """No layer's rotation is a constant, in whatever form: one library serves all layers."""
    geometry = AttentionGeometry(4, 2, 64, 0.25, None, None, dtype, formats, "")
    target = resolve_target(tvm.target.Target(target) if isinstance(target, dict) else target)
    mod = passed(geometry, target)
    names = list(layer_rotations(geometry.config(), 0, 1, 64))
    for step in ("prefill", "decode"):
        constants: list[tvm.ir.GenericConst] = []
        structural_walk(mod[step].body, (tvm.ir.GenericConst, constants.append))
        assert all(constant.value.numpy().size == 1 for constant in constants)
        params = [param.name for param in mod[step].params]
        assert params[:3] == ["q", "k", "v"] and params[len(params) - len(names) :] == names
    relax.analysis.well_formed(mod)


def test_layers_draw_what_a_compile_draws():
    config = KVCacheConfig.parse("hurwitz3/f16", "0=iso4", seed=5)
    rotations = layer_rotations(config, 1, 3, 64)
    assert list(rotations) == ["rotation_k", "inverse_k"]
    codec = config.layer(1, 3).k.codec(64, seed=(5, 1, 0))
    np.testing.assert_array_equal(rotations["rotation_k"].data, codec.rotation.data)
    assert len(layer_rotations(config, 0, 3, 64)) == 4


@pytest.fixture(scope="module")
def compiled(cache_home):
    """A library compiled now, and what made it."""
    attention_library.cache_clear()
    made = home._compile(SHAPE, resolve_target("llvm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "_compile", lambda *_: made)
        library = attention_library(SHAPE, "cpu")
    attention_library.cache_clear()
    return made, library


def attended(library: AttentionLibrary) -> torch.Tensor:
    """Something computed with it."""
    arrays = library.create(1, 64)
    rotations = layer_rotations(SHAPE.config(), 0, 1, 32)
    data = [tvm.runtime.tensor(np.asarray(rotation.data, np.float32)) for rotation in rotations.values()]
    q, k, v = torch.ones(1, 5, 4, 32), torch.eye(32)[None, None, :5].repeat(1, 2, 1, 1), torch.ones(1, 2, 5, 32)
    return library.run("prefill", q, k, v, torch.tensor([5], dtype=torch.int32), *arrays.tensors, *data)


def test_a_library_is_found_in_the_compile_cache(compiled, cache_home, monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(home, "_compile", refuse)
    again = attention_library(SHAPE, "cpu")
    assert again is attention_library(SHAPE, "cpu") and again is not compiled[1]
    assert torch.equal(attended(again), attended(compiled[1]))
    assert len(list((cache_home / "rotquant_tvm" / home.FOLDER).iterdir())) >= 1
    attention_library.cache_clear()


@pytest.mark.parametrize("error", [UsageError("the cache cannot be written"), DeviceError("no compiler")])
def test_without_a_cache_it_is_compiled_for_this_process(compiled, monkeypatch, error):
    made, library = compiled

    def entry(*_):
        raise error

    monkeypatch.setattr(home, "_compile", lambda *_: made)
    monkeypatch.setattr(home.CompileCache, "entry", entry)
    attention_library.cache_clear()
    assert torch.equal(attended(attention_library(SHAPE, "cpu")), attended(library))
    attention_library.cache_clear()


def test_what_cannot_be_compiled_is_refused_before():
    with pytest.raises(ModelError, match="3 query heads"):
        attention_library(AttentionGeometry(3, 2, 32, 1.0, None, None, "float32", "f16", ""), "cpu")
    with pytest.raises(FormatError):
        attention_library(AttentionGeometry(2, 2, 24, 1.0, None, None, "float32", "hurwitz3", ""), "cpu")


CASES = [("hurwitz3", "sinks=4,recent=8,center=64", None), ("f16", "", None), ("iso3", "", 64)]


@pytest.mark.parametrize("case", sampled(CASES, []), ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_code_for_a_gpu_is_generated_without_one(case, dtype):
    formats, policy, window = case
    geometry = AttentionGeometry(8, 2, 128, 0.1, window, None, dtype, formats, policy, window is None)
    executable, info = home._compile(geometry, tvm.target.Target(H100))
    assert info["weights"] == []
    modules = [*executable.mod.imports, *(code for mod in executable.mod.imports for code in mod.imports)]
    source = "\n".join(code.inspect_source() for code in modules if code.kind == "cuda")
    assert "attention_decode" in source and "attention_prefill" in source
