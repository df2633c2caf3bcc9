"""Models in bfloat16 and float16: numbers, artifacts, and code for GPUs.

On CPUs the weights stay as they are and the arithmetic is float32, so logits are those of torch in float32 over the
rounded weights. torch in the model's own dtype rounds after every operator; its logits lie about as far from ours as
from its own in float32.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

import numpy as np
import pytest
import torch

import rotquant_tvm
from rotquant_tvm.frontend import from_torch
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ..sampling import sampled
from ..schedules.cuda_targets import target_of
from .architectures import ARCHITECTURES
from .fake_quantized import converse, replay

FORMATS = ("hurwitz3", "0=f16")
STEP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Largest relative error of one rounding to the dtype."""
CASES = [("mistral", "bfloat16"), ("llama", "float16"), ("gemma2", "bfloat16"), ("phi", "bfloat16")]


@cache
def compiled(name: str, dtype: str) -> rotquant_tvm.CompiledModel:
    model = ARCHITECTURES[name].model(getattr(torch, dtype))
    return rotquant_tvm.compile(from_torch(model), KVCacheConfig.parse(*FORMATS))


def distances(case: tuple[str, str]) -> tuple[float, float, float, float]:
    """Largest distance of our logits from torch's in float32 and in the dtype, and between these two.

    In parts of the largest logit; the last number is how far from a boundary values are that torch in float32, over
    the same weights, codes otherwise.
    """
    architecture, config = ARCHITECTURES[case[0]], KVCacheConfig.parse(*FORMATS)
    turns = converse(compiled(*case).session(2, 128), config, architecture.head_dim)
    model = architecture.model(getattr(torch, case[1]))
    own, _, _ = replay(model, turns, config, architecture.windows)
    exact, _, furthest = replay(model.float(), turns, config, architecture.windows)
    ours = [turn.logits for turn in turns]
    size = max(np.abs(logits).max() for logits in exact)
    pairs = ((ours, exact), (ours, own), (own, exact))
    found = [max(np.abs(x - y).max() for x, y in zip(*pair, strict=True)) / size for pair in pairs]
    print(case, *(f"{number:.1e}" for number in (*found, furthest)))
    return *found, furthest


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled(CASES, []), ids="-".join)
def test_a_conversation_is_computed_in_float32_over_the_models_own_weights(case):
    """Numbers in a model's code, as of an approximate GELU, are in its dtype; where there are none all is float32."""
    step = STEP[case[1]]
    from_exact, from_own, between, furthest = distances(case)
    limit = step / 16 if case[0] == "phi" else 2e-4  # what decode steps over packed codes may differ by
    assert from_exact <= limit and furthest <= limit
    assert from_own <= 6 * step
    assert between > step / 4  # the dtype does show
    folded = compiled(*case).report["layers"][1]["folded"]["v"]
    assert folded.startswith("not folded: ") and f"its weight is {case[1]}" in folded


@pytest.mark.full
@pytest.mark.parametrize("case", CASES[:2], ids="-".join)
def test_an_artifact_keeps_the_weights_dtype(case, tmp_path):
    model, dtype = compiled(*case), case[1]
    model.save(tmp_path / "model.rq")
    written = rotquant_tvm.runtime.read_artifact(tmp_path / "model.rq")
    assert {str(weight.dtype) for _, weight in written.weights()} == {dtype}
    ids = np.arange(3, 40)
    session = rotquant_tvm.load(tmp_path / "model.rq", batch=1, capacity=64)
    logits = [session.prefill(ids), session.decode([5])]
    here = model.session(1, 64)
    np.testing.assert_array_equal(logits, [here.prefill(ids), here.decode([5])])


def test_weights_share_the_models_memory():
    model = ARCHITECTURES["gpt2"].model(torch.bfloat16)
    imported = from_torch(model)
    parameters = dict(model.named_parameters())
    assert {str(weight.dtype) for weight in imported.weights} == {"bfloat16"}
    for name, weight in zip(imported.weight_names, imported.weights, strict=True):
        assert np.shares_memory(weight, parameters[name].detach().view(torch.int16).numpy())


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("name", "dtype", "kv_cache"), [("llama", "bfloat16", "rq3"), ("gemma2", "float16", "hurwitz3")]
)
def test_code_for_a_gpu_compiles(name, dtype, kv_cache):
    model = ARCHITECTURES[name].model(getattr(torch, dtype))
    library = rotquant_tvm.compile(from_torch(model), kv_cache, target_of("sm_90a"))
    assert {kind for _, kind in library.weight_types} == {dtype}
    device = [part for part in _parts(library.executable.mod) if part.kind == "cuda"]
    assert device
    for part in device:
        command = ["nvcc", "-arch=sm_90a", "-cubin", "--use_fast_math", "-x", "cu", "-o", "/dev/null", "-"]
        result = subprocess.run(command, input=part.inspect_source().encode(), capture_output=True, check=False)
        assert result.returncode == 0, result.stderr.decode()[-2000:]


def _parts(module):
    yield module
    for part in module.imports:
        yield from _parts(part)
