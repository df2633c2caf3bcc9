"""Models whose attention and MLP are added to one residual, and full rotation where a part is usual, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import rotquant_tvm

from ..sampling import sampled

SIZES = {"vocab_size": 61, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FULL_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
# model, config overrides, how much of a head rotates
CASES = {
    "gpt-neox": ("GPTNeoX", {}, 0.25),
    "gpt-neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}, 0.25),
    "gpt-neox-full-rotary": ("GPTNeoX", FULL_ROTARY, 1.0),
    "phi": ("Phi", {"num_key_value_heads": 2}, 0.5),
}
PROMPTS, STEPS = (11, 7), 4


def random_model(kind: str, overrides: dict, rotary: float) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | overrides)
    assert config.rope_parameters["partial_rotary_factor"] == rotary
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.12).add_(0.5 if parameter.ndim == 1 else 0.0)
    return model


@pytest.mark.parametrize("case", sampled(CASES, []))
def test_logits_are_those_of_torch(case):
    model = random_model(*CASES[case])
    session = rotquant_tvm.compile(model, "f16").session(batch=2, capacity=32)
    ids = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 20)).astype("int32")
    steps = [session.prefill([row[:n] for row, n in zip(ids, PROMPTS, strict=True)])]
    for t in range(STEPS):
        steps.append(session.decode([row[n + t] for row, n in zip(ids, PROMPTS, strict=True)]))
    for row, n in enumerate(PROMPTS):
        with torch.no_grad():
            expected = model(torch.tensor(ids[row : row + 1]).long()).logits[0].numpy()[n - 1 : n + STEPS]
        actual = np.stack([logits[row] for logits in steps])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
