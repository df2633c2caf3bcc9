"""``examples/decode_cache.py`` over caches of many formats; ``test_policy_session`` has the case of every run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import rotquant_tvm
from rotquant_tvm.frontend import from_torch

from .decoded_cache import check

LENGTHS = (101, 37)
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kv_cache", "layers"),
    [
        ("rq3", "1=f16"),
        ("rq2", None),
        ("iso3/q8_0", None),
        ("turbo2.5/q4_0", None),
        ("planar4,recent=5", None),
        ("bf16/rotor1", None),
        ("hurwitz3,sinks=2", "0=iso4"),
    ],
)
def test_it_finds_what_the_packages_codecs_find(kv_cache, layers, tmp_path):
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    compiled = rotquant_tvm.compile(from_torch(model), kv_cache, kv_layers=layers, capacity=128)
    session = compiled.library().session(batch=len(LENGTHS))
    ids = np.random.default_rng(5).integers(3, 61, (len(LENGTHS), max(LENGTHS)))
    session.prefill([row[: length - 3] for row, length in zip(ids, LENGTHS, strict=True)])
    for back in (3, 2, 1):
        session.decode(np.array([row[length - back] for row, length in zip(ids, LENGTHS, strict=True)]))
    check(compiled, session, tmp_path)
