"""Sessions of real architectures with their rotations folded into weights, and without: the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import rotquant_tvm
from rotquant_tvm.frontend import from_torch
from rotquant_tvm.pass_hooks import PassHooks

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **ENDS, attention_bias=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=2, n_positions=256, **ENDS),
    "glm": lambda: transformers.GlmConfig(**SIZES, **ENDS),
}
ALL_FOLDED = {"k": "W_q, b_q, W_k, b_k", "v": "W_v, b_v, W_o"}
V_FOLDED = ALL_FOLDED | {"k": "not folded: RoPE"}


def model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.15).add_(0.5 if parameter.ndim == 1 else 0.0)
    return made


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "kv_cache", "folded"),
    [
        ("llama", "rq3", V_FOLDED),
        ("gpt2", "rq3", ALL_FOLDED),
        ("gpt2", "hurwitz3", ALL_FOLDED),
        ("glm", "planar3", ALL_FOLDED),
    ],
)
def test_folding_changes_nothing(name, kv_cache, folded):
    imported = from_torch(model(name))
    on, off = (
        rotquant_tvm.compile(imported, kv_cache, capacity=160, hooks=PassHooks(disabled=disabled))
        for disabled in ((), ("FoldRotation",))
    )
    assert [layer["folded"] for layer in on.report["layers"]] == [folded] * 2
    assert [layer["folded"] for layer in off.report["layers"]] == [None] * 2
    assert on.info["layers"] == off.info["layers"]
    sessions = [compiled.session(batch=2) for compiled in (on, off)]
    rng = np.random.default_rng(0)
    for step in range(14):
        shape = (2, 60) if step in (0, 7) else (2, 1)
        ids = rng.integers(3, 61, shape)
        first, second = (s.prefill(ids) if shape[1] > 1 else s.decode(ids) for s in sessions)
        np.testing.assert_allclose(first, second, rtol=0, atol=5e-3 * np.abs(second).max())
        if not step:  # no code has been read yet
            np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(second).max())
    words = [(a.numpy(), b.numpy()) for a, b in zip(*(s.cache.tensors for s in sessions), strict=True)]
    packed = [(a, b) for a, b in words if a.dtype == np.uint32]
    different = sum(int((a != b).sum()) for a, b in packed)
    assert different <= 0.01 * sum(a.size for a, _ in packed), f"{different} words differ"
