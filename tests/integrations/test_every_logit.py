"""Libraries with logits after every token: ``verify`` against decode, and transformers' speculative decoding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import rotquant_tvm
from rotquant_tvm.errors import KVCacheFull, UsageError
from rotquant_tvm.frontend import from_torch
from rotquant_tvm.integrations.compiled_generation import CompiledForCausalLM
from rotquant_tvm.runtime import load_library

from ..sampling import sampled
from .tiny_models import POLICY, padded, tiny, tokens

PAST = [row[:length].tolist() for row, length in zip(tokens(3, 3, 50), (20, 50, 3), strict=True)]
DRAFT = [row[:length].tolist() for row, length in zip(tokens(4, 3, 5), (5, 0, 3), strict=True)]
FORMATS = ["iso3", POLICY]


@pytest.fixture(scope="module", params=sampled(FORMATS, FORMATS[:1]))
def library(request):
    return rotquant_tvm.compile(tiny(), request.param, capacity=128, every_logit=True).library()


@pytest.fixture(scope="module")
def model(library):
    return CompiledForCausalLM(library, capacity=96)


@pytest.fixture
def session(library):
    made = library.session(batch=3)
    made.prefill(PAST)
    return made


def decoded(session, row: int, ids) -> np.ndarray:
    """Logits after each of ``ids``, fed one by one to one sequence."""
    active = np.arange(session.batch) == row
    return np.array([session.decode(np.full(session.batch, token), active)[row] for token in ids])


def test_verify_gives_what_decode_gives(session):
    """Tokens of one call see each other as decode stores them, or in more than the 16 bits of the ring."""
    found = session.fork().verify(DRAFT)
    assert found.shape == (3, 5, 61) and found.dtype == np.float32
    for row, ids in enumerate(DRAFT):
        if ids:
            np.testing.assert_allclose(found[row, : len(ids)], decoded(session.fork(), row, ids), atol=2e-3)
        assert np.isnan(found[row, len(ids) :]).all()


def test_a_rejected_draft_leaves_no_trace(session):
    twin = session.fork()
    session.verify(DRAFT)
    session.crop([len(row) for row in PAST])
    np.testing.assert_array_equal(decoded(session, 0, [9, 8, 7]), decoded(twin, 0, [9, 8, 7]))


@pytest.mark.full
def test_other_calls_are_those_of_a_library_without(compiled):
    """Prefill to the bit, and verify where the chunk is unquantized in both; a saved cache serves either."""
    plain, every = compiled.library(), rotquant_tvm.compile(tiny(), POLICY, capacity=128, every_logit=True).library()
    sessions = [made.session(batch=3, chunk=16) for made in (plain, every, every)]
    first, second = (session.prefill(PAST) for session in sessions[:2])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(sessions[2].verify(PAST)[range(3), [19, 49, 2]], first)
    assert plain.identity == every.identity


def test_generation_and_saved_caches_work(library, compiled, tmp_path):
    prompt = PAST[0]
    plain = library.session(capacity=64).generate(prompt, max_tokens=12).ids
    session = library.session(capacity=64)
    session.prefill([prompt])
    session.save(tmp_path / "prefix.kv")
    restored = library.restore(tmp_path / "prefix.kv", capacity=64)
    made = [int(np.argmax(library.session(capacity=64).prefill([prompt])))]
    while len(made) < len(plain):
        made.append(int(np.argmax(restored.decode(made[-1:]))))
    assert made == list(plain)
    with pytest.raises(UsageError, match="compile the model with every_logit=True"):
        compiled.library().session().verify([1])


def test_assisted_generation_and_prompt_lookup_are_greedy_decoding(model, monkeypatch):
    widths = []
    verify = type(model.library.session()).verify
    monkeypatch.setattr("rotquant_tvm.runtime.Session.verify", lambda *given: widths.append(1) or verify(*given))
    ids = torch.cat([tokens(7, 1, 12)] * 2, dim=1)
    plain = model.generate(ids, max_new_tokens=24, min_new_tokens=24)
    drafter = copy.deepcopy(tiny())
    for options in ({"assistant_model": drafter}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        widths.clear()
        made = model.generate(ids, max_new_tokens=24, min_new_tokens=24, return_dict_in_generate=True, **options)
        assert torch.equal(made.sequences, plain), options
        assert widths and made.past_key_values.get_seq_length() == made.past_key_values.session.lengths[0] == 47


def test_logits_of_the_last_columns(model):
    """Padding has none; a row's are those of the row alone."""
    ids, mask = padded(tokens(5, 2, 9), (9, 6))
    every = model(ids, attention_mask=mask, logits_to_keep=0).logits
    assert every.shape == (2, 9, 61) and torch.isnan(every[1, :3]).all() and not torch.isnan(every[1, 3:]).any()
    alone = model(ids[1:, 3:], logits_to_keep=0).logits
    torch.testing.assert_close(every[1, 3:], alone[0])
    kept = model(ids, attention_mask=mask, logits_to_keep=4)
    assert kept.past_key_values.session.lengths.tolist() == [9, 6]
    apart = model.library.session(batch=2)
    first = apart.prefill([ids[0, :6].tolist(), ids[1, 3:6].tolist()])
    np.testing.assert_allclose(kept.logits[:, 0], first, atol=1e-4)
    np.testing.assert_allclose(kept.logits[:, 1:], apart.verify(ids[:, 6:].numpy()), atol=1e-4)
    single = model(ids[:, :1], attention_mask=mask[:, :1], logits_to_keep=0).logits  # nothing but padding in one row
    assert single.shape == (2, 1, 61) and torch.isnan(single).all(dim=2).tolist() == [[False], [True]]


def test_what_does_not_fit_is_refused_before_anything_runs(model):
    cache = model(tokens(5, 1, 90)).past_key_values
    with pytest.raises(KVCacheFull):
        model(tokens(6, 1, 9), past_key_values=cache, logits_to_keep=3)
    assert cache.get_seq_length() == cache.session.lengths[0] == 90


def test_an_imported_model_says_itself_which_logits_it_has():
    with pytest.raises(UsageError, match=r"import_model\(source, every_logit=True\)"):
        rotquant_tvm.compile(from_torch(tiny()), every_logit=True)
    assert from_torch(tiny(), every_logit=True).every_logit


def test_artifacts_keep_it(library, tmp_path):
    made = rotquant_tvm.compile(from_torch(tiny(), every_logit=True), "iso3", capacity=64)
    loaded = load_library(made.save(tmp_path / "a.rq").path)
    assert loaded.every_logit and loaded.report["every_logit"]
    assert loaded.session().verify([1, 2]).shape == (1, 2, 61)
