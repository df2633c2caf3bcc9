"""Scores against a direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rotquant_tvm.evaluation import scores
from rotquant_tvm.evaluation.scores import Score, compare, log_softmax, total

SHAPE = (2, 7, 19)


def _naive(reference, logits, targets):
    """Sums over tokens, one token at a time in Python's floats."""
    nll, kls, same = 0.0, [], 0
    for r, x, target in zip(reference, logits, targets, strict=True):
        p, q = ([math.exp(float(v)) for v in row] for row in (r, x))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        nll -= math.log(q[target])
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same += p.index(max(p)) == q.index(max(q))
    return nll, sum(kls), sum(kl**2 for kl in kls), same


@pytest.mark.parametrize("block_bytes", [1, 2 * 8 * 19, 1 << 20])
def test_scores_are_those_of_a_direct_computation(rng, monkeypatch, block_bytes):
    monkeypatch.setattr(scores, "_BLOCK_BYTES", block_bytes)
    reference, logits = (3 * rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    logits[0, :3] = reference[0, :3] + 0.01
    targets = rng.integers(0, SHAPE[-1], SHAPE[:2])
    for row, score in enumerate(compare(reference, logits, targets)):
        expected = _naive(reference[row], logits[row], targets[row])
        assert score.tokens == SHAPE[1] and score.agreements == expected[3]
        assert [score.nll, score.kl, score.kl_squares] == pytest.approx(expected[:3], rel=1e-5, abs=1e-9)


def test_the_reference_itself_has_no_divergence(rng):
    logits = rng.standard_normal(SHAPE).astype(np.float32)
    targets = rng.integers(0, SHAPE[-1], SHAPE[:2])
    score = total(compare(logits, logits, targets))
    assert (score.kl, score.agreements, score.tokens) == (0, 14, 14)
    assert score.nll == pytest.approx(total(compare(logits.copy(), logits, targets)).nll)


def test_summaries():
    score = Score(2, 2 * math.log(5), 0.3, 0.05, 1, 1.5) + Score(2, 2 * math.log(5), 0.1, 0.01, 2, 0.5)
    assert score.perplexity == pytest.approx(5) and score.mean_kl == pytest.approx(0.1) and score.seconds == 2
    kls = [0.2, 0.1, 0.1, 0.0]
    assert score.kl_standard_error == pytest.approx(np.std(kls, ddof=1) / 2)
    assert Score(**score.document()) == score
    assert Score(1, 1e6).perplexity == math.inf and math.isnan(Score(1, 1.0).kl_standard_error)


def test_log_softmax_of_large_logits():
    logits = np.array([[1e4, 1e4 - 1, -1e4]], np.float32)
    assert log_softmax(logits)[0, :2] == pytest.approx([-math.log(1 + math.exp(-1)), -1 - math.log(1 + math.exp(-1))])
