"""Scores of configurations in step: what they are, what is kept, and what runs again."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.evaluation.libraries import BASELINE, Candidate
from rotquant_tvm.evaluation.protocols import Generation
from rotquant_tvm.evaluation.result_store import ResultStore
from rotquant_tvm.evaluation.scores import compare, total
from rotquant_tvm.evaluation.text_scores import TextEvaluation
from rotquant_tvm.evaluation.windows import Windows

from .fakes import VOCAB, FakeLibraries

NEAR, FAR = Candidate.parse("iso4"), Candidate.parse("iso2")
PROTOCOL = Generation(prefill=4)


@pytest.fixture
def windows(rng):
    return Windows(rng.integers(0, VOCAB, (5, 13)).astype(np.int32), None)


def _evaluation(windows, folder, libraries=None, **identity):
    libraries = libraries or FakeLibraries(iso4=0.1, iso2=0.5)
    return TextEvaluation(libraries, windows, ResultStore(folder), {"model": "m"} | identity)


def _direct(libraries, candidate, windows):
    """Scores of tokens 5 … 12: what the decode steps of tokens 4 … 11 predict."""
    reference, ours = (libraries.load(c).logits(windows.ids)[:, 4:12] for c in (BASELINE, candidate))
    return total(compare(reference, ours, windows.ids[:, 5:]))


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_scores_are_those_of_each_cache_against_the_16_bit_one(windows, tmp_path, batch):
    evaluation = _evaluation(windows, tmp_path)
    scores = evaluation.scores(PROTOCOL, [BASELINE, NEAR, FAR], batch)
    for candidate, score in zip((NEAR, FAR), scores[1:], strict=True):
        expected = _direct(evaluation.libraries, candidate, windows)
        assert (score.tokens, score.agreements) == (expected.tokens, expected.agreements) and score.tokens == 40
        assert [score.nll, score.kl, score.kl_squares] == pytest.approx(
            [expected.nll, expected.kl, expected.kl_squares]
        )
        assert score.seconds > 0
    assert scores[0].kl == 0 and scores[0].agreements == 40
    assert scores[0].nll == pytest.approx(_direct(evaluation.libraries, BASELINE, windows).nll, rel=1e-6)
    assert 0 < scores[1].kl < scores[2].kl


def test_what_is_kept_does_not_run_again(windows, tmp_path):
    scores = _evaluation(windows, tmp_path).scores(PROTOCOL, [BASELINE, NEAR], 2)
    again = FakeLibraries()
    assert _evaluation(windows, tmp_path, again).scores(PROTOCOL, [BASELINE, NEAR], 3) == scores
    assert again.asked == []


def test_only_what_is_missing_runs_and_the_baseline_beside_it(windows, tmp_path):
    _evaluation(Windows(windows.ids[:3], None), tmp_path).scores(PROTOCOL, [BASELINE, NEAR], 2)
    libraries = FakeLibraries(iso4=0.1, iso2=0.5)
    _evaluation(windows, tmp_path, libraries).scores(PROTOCOL, [BASELINE, NEAR], 1)
    assert [libraries.loaded[label].sessions for label in ("f16", "iso4")] == [2, 2]
    libraries = FakeLibraries(iso4=0.1, iso2=0.5)
    _evaluation(windows, tmp_path, libraries).scores(PROTOCOL, [BASELINE, NEAR, FAR], 5)
    assert sorted(libraries.loaded) == ["f16", "iso2"]


def test_an_interrupted_run_keeps_the_finished_windows(windows, tmp_path):
    class Stopping(FakeLibraries):
        def load(self, candidate, **options):
            library = super().load(candidate, **options)
            if library.sessions == 2 and candidate.label == "iso4":
                raise KeyboardInterrupt
            return library

    with pytest.raises(KeyboardInterrupt):
        _evaluation(windows, tmp_path, Stopping(iso4=0.1)).scores(PROTOCOL, [NEAR], 2)
    libraries = FakeLibraries(iso4=0.1)
    _evaluation(windows, tmp_path, libraries).scores(PROTOCOL, [NEAR], 2)
    assert libraries.loaded["iso4"].sessions == 1


@pytest.mark.parametrize("change", ["identity", "prefill", "policy", "window"])
def test_another_question_is_not_answered_from_the_store(windows, tmp_path, change):
    _evaluation(windows, tmp_path).scores(PROTOCOL, [NEAR], 5)
    libraries = FakeLibraries(**{"iso4": 0.1, "iso4,sinks=4": 0.1})
    protocol = Generation(5) if change == "prefill" else PROTOCOL
    candidate = Candidate.parse("iso4,sinks=4") if change == "policy" else NEAR
    if change == "window":
        windows = Windows((windows.ids + 1) % VOCAB, None)
    identity = {"model": "other"} if change == "identity" else {}
    _evaluation(windows, tmp_path, libraries, **identity).scores(protocol, [candidate], 5)
    assert libraries.loaded[candidate.label].sessions == 1
