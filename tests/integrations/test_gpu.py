"""RotQuantCache on a GPU: the CPU's numbers by the same code, in float32 and in 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from rotquant_tvm import RotQuantCache

from .tiny_models import FakeQuantCache, logits_of, tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

IDS, SPLITS = tokens(1, 2, 90), (40, 67)


ERRORS = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("kv_cache", ["f16", "rq3"])
def test_f16_and_sixteen_bit_rows_are_dynamic_cache(dtype, kv_cache):
    """Of 70 tokens a policy keeps all in 16 bits: the first block of 64 leaves later."""
    model = copy.deepcopy(tiny()).to("cuda", dtype)
    ids = IDS[:, :70].cuda()
    expected = logits_of(model, "eager", DynamicCache(config=model.config), ids, SPLITS)
    found = logits_of(model, RotQuantCache.attention, RotQuantCache(kv_cache, model.config), ids, SPLITS)
    assert found.is_cuda and (found - expected).abs().max() < ERRORS[dtype]


def test_quantized_is_what_a_cpu_makes_of_it():
    expected = logits_of(tiny(), "eager", FakeQuantCache("hurwitz3"), IDS, SPLITS)
    model = copy.deepcopy(tiny()).to("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        cache = RotQuantCache("hurwitz3", model.config)
        found = logits_of(model, RotQuantCache.attention, cache, IDS.cuda(), SPLITS).cpu()
    error = (found - expected).abs()
    assert (error < 2e-3).float().mean() > 0.9 and error.max() < 0.3  # a code may flip
