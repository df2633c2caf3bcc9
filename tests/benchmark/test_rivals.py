from __future__ import annotations

import math

import numpy as np
import pytest

from rotquant_tvm.benchmark import rivals
from rotquant_tvm.benchmark.contender import Outcome
from rotquant_tvm.benchmark.library_rivals import PAGE, _pages
from rotquant_tvm.benchmark.rivals import BEST, Rivals, decode_rivals, prefill_rivals
from rotquant_tvm.benchmark.settings import BatchShape

torch = pytest.importorskip("torch")


def test_the_best_form_of_a_rival_counts_and_the_best_rival_leads():
    raced = Rivals(100)
    for name, form in (("a", ""), ("a", "folded"), ("b", ""), ("c", "")):
        raced.add(name, form, [])
    times = {"a": Outcome(3.0), "a (folded)": Outcome(2.0), "b": Outcome(5.0), "c": Outcome(None, "failed: no GPU")}
    best, a, b, c = raced.outcomes(times)
    assert (best.name, best.seconds) == (BEST, 2.0) and best.nbytes == 100
    assert (a.name, a.seconds) == ("a", 2.0) and (b.name, b.seconds) == ("b", 5.0)
    assert (c.seconds, c.note) == (None, "failed: no GPU")


def test_one_rival_needs_no_best():
    raced = Rivals(100)
    raced.add("a", "", [])
    assert [rival.name for rival in raced.outcomes({"a": Outcome(1.0)})] == ["a"]


def test_both_forms_of_decode_are_one_attention(host, small):
    shape = BatchShape(2, 50)
    raced = decode_rivals(host, small("decode"), shape)
    assert raced.nbytes == 2 * 32 * 4 * (2 * 50 * 2 + 2 * 4)
    grouped, folded = (contender.calls[0]() for contender in raced.contenders)
    assert grouped.shape == folded.shape == (2, 4, 1, 32)
    np.testing.assert_allclose(grouped.numpy(), folded.numpy(), atol=1e-5)


def test_prefill_is_causal(host, small):
    raced = prefill_rivals(host, small("prefill"), BatchShape(1, 7))
    (contender,) = raced.contenders
    q, k, v = torch.randn(1, 4, 7, 32), torch.randn(1, 2, 7, 32), torch.randn(1, 2, 7, 32)
    out = rivals._causal(q, k, v)
    np.testing.assert_allclose(out[0, 3, 0], v[0, 1, 0], atol=1e-6)
    weights = torch.softmax(q[0, 3, 6] @ k[0, 1].T / math.sqrt(32), -1)
    np.testing.assert_allclose(out[0, 3, 6], weights @ v[0, 1], atol=1e-5)
    assert contender.calls[0]().shape == (1, 4, 7, 32)


def test_a_library_that_fails_to_prepare_fails_when_it_is_called():
    def prepare(*_):
        raise RuntimeError("needs another GPU")

    (call,) = rivals._prepared(prepare, [(1, 2, 3)])
    with pytest.raises(RuntimeError, match="another GPU"):
        call()


def test_pages_hold_the_tokens_in_order():
    x = torch.randn(2, 3, PAGE + 5, 8)
    paged = _pages(x, 2)
    assert paged.shape == (4, PAGE, 3, 8)
    rows = paged.view(2, 2 * PAGE, 3, 8)[:, : PAGE + 5].transpose(1, 2)
    assert torch.equal(rows, x) and not paged.view(2, 2 * PAGE, 3, 8)[:, PAGE + 5 :].any()
