"""Shares retrieved, by length and depth, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rotquant_tvm.errors import UsageError
from rotquant_tvm.evaluation import needle_scores
from rotquant_tvm.evaluation.libraries import Candidate
from rotquant_tvm.evaluation.needle_scores import NeedleTest
from rotquant_tvm.evaluation.result_store import ResultStore

TEXT = " ".join(f"number{i % 7} of sentence {i}." for i in range(900))
GOOD, BAD = Candidate.parse("iso4"), Candidate.parse("iso2")


class FakeLibraries:
    """Libraries that are only names."""

    def __init__(self):
        self.asked = []

    def load(self, candidate):
        self.asked.append(candidate.label)
        return candidate.label


@pytest.fixture
def measure(tmp_path, tokenizers, monkeypatch):
    """Measure with caches of which one answers all, the other only what lies at the end."""
    baseline = SimpleNamespace(tokenizer=tokenizers(opens=False), info=SimpleNamespace(max_position=1000))
    batches = []

    def answers(library, prompts):
        batches.append(len(prompts))
        return [f" {p.key}." if library == "iso4" or p.depth == 1.0 else " 12." for p in prompts]

    monkeypatch.setattr(needle_scores, "answers", answers)

    def run(libraries, lengths=(500, 700), candidates=(GOOD, BAD)):
        test, store = NeedleTest(lengths, trials=2, batch=4), ResultStore(tmp_path)
        return test.document(libraries, candidates, TEXT, store, {"model": "m"}, baseline, lambda _step: None)

    return run, batches


def test_shares_are_counted_by_length_and_depth(measure):
    run, batches = measure
    document = run(FakeLibraries())
    good, bad = document["rows"]
    assert good["retrieved"] == {"500": 1.0, "700": 1.0} and bad["retrieved"] == {"500": 0.2, "700": 0.2}
    assert bad["by_depth"] == {"500": [0, 0, 0, 0, 1], "700": [0, 0, 0, 0, 1]}
    assert document["prompts_per_length"] == 10 and batches == [4, 4, 2] * 4
    assert document["lengths"] == [500, 700] and "4 digits" in document["definition"]


def test_what_is_kept_is_not_asked_again(measure):
    run, batches = measure
    first = run(FakeLibraries(), lengths=(500,))
    batches.clear()
    libraries = FakeLibraries()
    assert run(libraries, lengths=(500,)) == first and libraries.asked == [] and batches == []
    run(libraries, candidates=(BAD,))
    assert set(libraries.asked) == {"iso2"} and batches == [4, 4, 2]


def test_a_length_beyond_the_models_positions_is_refused():
    library = SimpleNamespace(info=SimpleNamespace(max_position=1000))
    NeedleTest((988,), 1, 1).check(library)
    with pytest.raises(UsageError, match="at most 988"):
        NeedleTest((100, 989), 1, 1).check(library)
