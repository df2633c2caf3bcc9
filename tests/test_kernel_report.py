"""The kernels of each layer: by the cache arrays that they take, not by names or order."""

from __future__ import annotations

import pytest
import tvm
from rotquant_tvm.passes.kv_kernels import kernel_of
from rotquant_tvm.schedules.vector_kv_kernels import VectorKVKernels
from tvm import relax

from rotquant_tvm.kernel_report import kv_kernels, layer_kernels
from rotquant_tvm.kv_cache_config import KVCacheConfig
from rotquant_tvm.target import host_target

from .passes.cached_step import stages
from .passes.tiny_model import TinyModel

LAYERS = 3


@pytest.fixture(scope="module")
def made():
    """A model whose middle layer has other formats, after each pass."""
    return stages(TinyModel(layers=LAYERS), KVCacheConfig.parse("iso3/planar3", "1=q8_0"))


def test_each_layer_has_its_kernels(made):
    found = layer_kernels(made["lower"], LAYERS)
    names = [{kernel["operator"]: kernel["kernel"] for kernel in layer} for layer in found]
    assert all(set(layer) == {"append", "attention_prefill", "attention_decode"} for layer in names)
    assert names[0] == names[2] and not set(names[0].values()) & set(names[1].values())
    functions = {kernel["operator"]: kernel["functions"] for kernel in found[1]}
    assert functions["append"] == ["prefill", "decode"]
    assert functions["attention_prefill"] == ["prefill"] and functions["attention_decode"] == ["decode"]
    for layer in found:
        for kernel in layer:
            assert kernel_of(made["lower"], _any_call(made["lower"], kernel["kernel"]))[0] == kernel["operator"]


def _any_call(mod, name):
    for function in ("prefill", "decode"):
        for value in relax.analysis.get_var2val(mod[function]).values():
            if isinstance(value, relax.Call) and value.args and getattr(value.args[0], "name_hint", "") == name:
                return value
    raise AssertionError(f"nothing calls {name}")


def test_the_explicit_form_dequantizes(made):
    operators = {kernel["operator"] for kernel in layer_kernels(made["quantize"], LAYERS)[0]}
    assert operators == {"append", "dequantize_cache"}  # dense attention takes no cache


def test_sources(made):
    def sources(mod):
        return {kernel["operator"]: kernel["source"] for kernel in layer_kernels(mod, LAYERS)[0]}

    assert set(sources(made["lower"]).values()) == {"rule: definition"}
    replaced = sources(VectorKVKernels(host_target())(made["lower"]))
    assert replaced["append"] == "rule: definition"
    for step in ("decode", "prefill"):
        assert replaced[f"attention_{step}"] == f"rule: vector kernel attention_{step}_llvm"


def test_names_of_all_kernels(made):
    names = kv_kernels(made["lower"])
    assert {"kv_advance", "kv_rotate"} <= set(names) and "kv_cache_info" not in names
    assert {kernel["kernel"] for layer in layer_kernels(made["lower"], LAYERS) for kernel in layer} <= set(names)


def test_a_module_without_the_functions_has_none():
    assert layer_kernels(tvm.IRModule(), 2) == [[], []] and kv_kernels(tvm.IRModule()) == []
