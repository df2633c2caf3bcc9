"""transformers' generate over a compiled library: the library's own tokens, and transformers' options."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from rotquant_tvm.errors import KVCacheFull, UsageError
from rotquant_tvm.integrations.compiled_generation import CompiledForCausalLM, SessionCache

from .tiny_models import padded, tiny, tokens

IDS, MASK = padded(tokens(7, 2, 30), (30, 17))


@pytest.fixture(scope="module")
def model(compiled):
    return CompiledForCausalLM(compiled.library(), capacity=64)


def test_greedy_tokens_are_those_of_our_own_generate(model):
    made = model.generate(IDS[:1], max_new_tokens=20)
    own = model.library.session(capacity=64).generate(IDS[0].tolist(), max_tokens=20)
    assert made[0, 30:].tolist() == list(own.ids)


def test_padded_batches_are_each_alone(model):
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    made = model.generate(IDS, attention_mask=MASK, **options)
    for row, real in zip(made, MASK.bool(), strict=True):
        alone = model.generate(row[:30][real][None], **options)
        assert row[30:].tolist() == alone[0, int(real.sum()) :].tolist()


def test_beams_and_sampling_follow_the_seed(model):
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 7, "temperature": 0.7}):
        made = []
        for _ in range(2):
            torch.manual_seed(3)
            made.append(model.generate(IDS, attention_mask=MASK, max_new_tokens=12, **options))
        assert torch.equal(*made)
    torch.manual_seed(4)
    assert not torch.equal(model.generate(IDS, attention_mask=MASK, max_new_tokens=12, **options), made[0])


def test_a_cache_goes_on_where_it_was(model):
    whole = model.generate(IDS[:1], max_new_tokens=12, return_dict_in_generate=True)
    first = model.generate(IDS[:1], max_new_tokens=5, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 34 and cache.get_max_length() == 64
    cache.crop(-3)
    assert cache.session.lengths.tolist() == [31]
    rest = model.generate(whole.sequences[:, :32], past_key_values=cache, max_new_tokens=10)
    assert torch.equal(rest, whole.sequences)
    cache.reset()
    assert torch.equal(model.generate(IDS[:1], past_key_values=cache, max_new_tokens=12), whole.sequences)


@pytest.mark.parametrize("kept", [torch.tensor([False, True]), torch.tensor([1])])
def test_some_sequences_are_kept(model, kept):
    both = model.generate(IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    cache = both.past_key_values
    length = int(cache.session.lengths[1])
    cache.batch_select_indices(kept)
    assert cache.session.lengths.tolist() == [length] != [int(both.sequences.shape[1] - 1)]


def test_what_is_refused(model):
    with pytest.raises(UsageError, match="a DynamicCache"):
        model(IDS, past_key_values=DynamicCache(config=tiny().config))
    for keep in (0, 2):
        with pytest.raises(UsageError, match="after the last token only; compile the model with every_logit=True"):
            model(IDS, logits_to_keep=keep)
    with pytest.raises(UsageError, match="logits_to_keep is -1"):
        model(IDS, logits_to_keep=-1)
    with pytest.raises(UsageError, match="holds 1 sequences and was given 2"):
        model(IDS, past_key_values=SessionCache(model.library.session()))
    with pytest.raises(KVCacheFull):
        model.generate(IDS, attention_mask=MASK, max_new_tokens=40, min_new_tokens=40)
    with pytest.raises(UsageError, match=r"tvmc compile --every-logit"):
        model.generate(IDS[:1], prompt_lookup_num_tokens=3, max_new_tokens=5)
