"""Comparing two caches' predictions token by token, and summing the comparison up."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import numpy as np

_BLOCK_BYTES = 8 << 20  # of float64 log-probabilities that one thread works on
_POOL = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "rotquant-scores")


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens.

    ``tokens``; ``nll``: −log p of the token that follows, in nats; ``kl``: KL(p_f16 ‖ p) in nats, and ``kl_squares``
    its squares; ``agreements``: tokens whose likeliest successor is the 16-bit cache's; ``seconds`` in the library.
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    kl_squares: float = 0.0
    agreements: int = 0
    seconds: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def perplexity(self) -> float:
        """Exp of the mean −log p; infinite where it overflows."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return self.kl / self.tokens

    @property
    def kl_standard_error(self) -> float:
        """Of ``mean_kl``, tokens counted as independent; NaN for a single token."""
        if self.tokens < 2:
            return math.nan
        variance = max(self.kl_squares / self.tokens - self.mean_kl**2, 0.0)
        return math.sqrt(variance / (self.tokens - 1))

    def document(self) -> dict[str, float]:
        """Return the sums as plain data."""
        return asdict(self)


def total(scores: Iterable[Score]) -> Score:
    """Sum scores up."""
    return sum(scores, Score())


def compare(reference: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> list[Score]:
    """Score predictions against the 16-bit cache's, row by row of a batch.

    ``reference`` and ``logits``: float32 [batch, tokens, vocab], the same array for the 16-bit cache itself;
    ``targets``: int [batch, tokens], the tokens that follow. Computed in float64 on all cores, a bounded number of
    tokens at a time.
    """
    batch, tokens, vocab_size = logits.shape
    width = max(1, _BLOCK_BYTES // (8 * vocab_size))
    places = [(row, slice(start, start + width)) for row in range(batch) for start in range(0, tokens, width)]
    same = reference is logits

    def score(place: tuple[int, slice]) -> Score:
        return _compare_block(None if same else reference[place], logits[place], targets[place])

    scores = [Score()] * batch
    for (row, _), part in zip(places, _POOL.map(score, places), strict=True):
        scores[row] += part
    return scores


def _compare_block(reference: np.ndarray | None, logits: np.ndarray, targets: np.ndarray) -> Score:
    ours = log_softmax(logits)
    nll = -float(ours[np.arange(len(targets)), targets].sum())
    if reference is None:
        return Score(len(targets), nll, agreements=len(targets))
    theirs = log_softmax(reference)
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    agreements = int((logits.argmax(-1) == reference.argmax(-1)).sum())
    return Score(len(targets), nll, float(kl.sum()), float((kl**2).sum()), agreements)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float64 [tokens, vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
