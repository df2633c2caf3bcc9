"""A small random model compiled for CUDA against the same model compiled for the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

import rotquant_tvm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tvm.cuda(0).exist, reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
    )
    return rotquant_tvm.from_torch(transformers.AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("kv_cache", ["f16", "rq3", "iso4/q8_0"])
def test_cuda_equals_cpu(model, kv_cache):
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 512, n).tolist() for n in (70, 33, 1)]
    sessions = [
        rotquant_tvm.compile(model, kv_cache, target).session(batch=3, capacity=160, device=device)
        for target, device in (("llvm", "cpu"), ("cuda", "cuda"))
    ]
    steps = [[session.prefill(rows)] for session in sessions]
    for _ in range(20):
        tokens = rng.integers(0, 512, 3)
        for session, logits in zip(sessions, steps, strict=True):
            logits.append(session.decode(tokens))
    cpu, gpu = (np.stack(logits) for logits in steps)
    # The prefill sees its own chunk unquantized, so that rounding decides nothing; later a code may fall either way.
    np.testing.assert_allclose(gpu[0], cpu[0], atol=2e-3)
    assert np.linalg.norm(gpu - cpu) / np.linalg.norm(cpu) < 2e-2
    for one, other in zip(*([array.numpy() for array in s.cache.layers] for s in sessions), strict=True):
        if one.dtype == np.float16 or kv_cache == "f16":  # whose last bits may differ
            one, other = (array.view(np.float16).astype(np.float32) for array in (one, other))
            assert np.linalg.norm(one - other) < 2e-2 * np.linalg.norm(one)
        else:
            assert np.mean(one.view(np.uint8) != other.view(np.uint8)) < 5e-3
    fork = sessions[1].fork()
    np.testing.assert_array_equal(fork.decode(np.array([1, 2, 3])), sessions[1].decode(np.array([1, 2, 3])))
