"""RotQuantCache on a GPU: the CPU's numbers by the same code, in float32 and in 16 bits. ``verify`` there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import rotquant_tvm
from rotquant_tvm import RotQuantCache
from rotquant_tvm.integrations.compiled_generation import CompiledForCausalLM

from .tiny_models import POLICY, FakeQuantCache, logits_of, tiny, tokens

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


@pytest.fixture(scope="module", params=["f16", "hurwitz3", POLICY])
def library(request):
    """A library with logits after every token."""
    return rotquant_tvm.compile(tiny("wide"), request.param, "cuda", capacity=128, every_logit=True).library("cuda")


def test_verify_gives_what_decode_gives(library):
    past, draft = tokens(3, 3, 50).tolist(), tokens(4, 3, 5).tolist()
    past[0], past[2], draft[1] = past[0][:20], past[2][:3], []
    session = library.session(batch=3)
    session.prefill(past)
    stepwise, twin = session.fork(), session.fork()
    found = session.verify(draft)
    assert found.shape == (3, 5, 61) and np.isnan(found[1]).all()
    columns = np.array([draft[0], [0] * 5, draft[2]]).T
    expected = np.stack([stepwise.decode(column, np.array([True, False, True])) for column in columns], axis=1)
    error = np.abs(found - expected)[[0, 2]]
    assert np.median(error) < 2e-3 and error.max() < 0.1, (np.median(error), error.max())  # a code may flip
    session.crop([len(row) for row in past])
    np.testing.assert_array_equal(session.decode([9, 8, 7]), twin.decode([9, 8, 7]))


def test_assisted_generation_and_prompt_lookup(library):
    """What is made differs from greedy decoding only where two tokens are as good as each other."""
    model = CompiledForCausalLM(library, capacity=96)
    ids = torch.cat([tokens(7, 1, 12)] * 2, dim=1)
    for options in ({"assistant_model": copy.deepcopy(tiny("wide"))}, {"prompt_lookup_num_tokens": 3}):
        made = model.generate(ids, max_new_tokens=24, return_dict_in_generate=True, **options)
        assert made.past_key_values.session.lengths[0] == 47
        logits = CompiledForCausalLM(library, capacity=96)(made.sequences[:, :-1], logits_to_keep=24).logits[0]
        chosen = logits.gather(1, made.sequences[0, -24:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < 0.1
