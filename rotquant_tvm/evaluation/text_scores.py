"""Scores of cache configurations on windows of a text, every configuration in step with the 16-bit cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rotquant_tvm.evaluation.libraries import BASELINE, Candidate, Libraries
from rotquant_tvm.evaluation.protocols import TextProtocol
from rotquant_tvm.evaluation.result_store import ResultStore
from rotquant_tvm.evaluation.scores import Score, compare, total
from rotquant_tvm.evaluation.windows import Windows

Key = dict[str, Any]
Progress = Callable[[str], None]


class TextEvaluation:
    """Runs protocols over windows, and keeps and reuses the score of every (configuration, window).

    ``identity``: what beside configuration, protocol and window decides a score (model, target, versions).
    """

    def __init__(
        self,
        libraries: Libraries,
        windows: Windows,
        store: ResultStore,
        identity: Key,
        progress: Progress = lambda _step: None,
    ) -> None:
        self.libraries, self.windows, self.store = libraries, windows, store
        self.identity, self.progress = identity, progress

    def scores(self, protocol: TextProtocol, candidates: Sequence[Candidate], batch: int) -> list[Score]:
        """Return the score of every candidate, whatever is not in the store computed now.

        ``batch``: most windows to send through a cache at a time. The 16-bit cache runs beside any configuration that
        runs, and only then; one that is a candidate itself is scored too.
        """
        vocab_size = self._library(protocol, BASELINE).info.vocab_size if self._missing(protocol, candidates) else 1
        size = protocol.batch(batch, self.windows.context, vocab_size)
        for start in range(0, len(self.windows), size):
            group = range(start, min(start + size, len(self.windows)))
            pending = [c for c in candidates if any(self._stored(protocol, c, w) is None for w in group)]
            if pending:
                self.progress(f"{protocol.name}: windows {start + 1}–{group.stop} of {len(self.windows)}")
                self._run(protocol, pending, group)
        return [total(self._required(protocol, c, w) for w in range(len(self.windows))) for c in candidates]

    def _missing(self, protocol: TextProtocol, candidates: Sequence[Candidate]) -> bool:
        every = range(len(self.windows))
        return any(self._stored(protocol, c, window) is None for c in candidates for window in every)

    def _run(self, protocol: TextProtocol, pending: Sequence[Candidate], group: range) -> None:
        """Score the windows of a group with every pending configuration."""
        ids = self.windows.ids[group.start : group.stop]
        reference = protocol.predictions(self._library(protocol, BASELINE), ids)
        others = {
            index: protocol.predictions(self._library(protocol, candidate), ids)
            for index, candidate in enumerate(pending)
            if not _is_baseline(candidate)
        }
        scores = _lockstep(reference, others, len(pending), ids)
        for candidate, rows in zip(pending, scores, strict=True):
            for window, score in zip(group, rows, strict=True):
                if self._stored(protocol, candidate, window) is None:
                    self.store.put(self._key(protocol, candidate, window), score.document())

    def _library(self, protocol: TextProtocol, candidate: Candidate) -> Any:
        return self.libraries.load(candidate, every_logit=protocol.every_logit, quantize_chunk=protocol.quantize_chunk)

    def _key(self, protocol: TextProtocol, candidate: Candidate, window: int) -> Key:
        parameters = {"protocol": protocol.name, **protocol.parameters(), "window": self.windows.digest(window)}
        return self.identity | candidate.key() | parameters

    def _stored(self, protocol: TextProtocol, candidate: Candidate, window: int) -> Score | None:
        found = self.store.get(self._key(protocol, candidate, window))
        return None if found is None else Score(**found)

    def _required(self, protocol: TextProtocol, candidate: Candidate, window: int) -> Score:
        score = self._stored(protocol, candidate, window)
        assert score is not None
        return score


def _is_baseline(candidate: Candidate) -> bool:
    return candidate.key() == BASELINE.key()


def _lockstep(
    reference: Iterator[Any], others: dict[int, Iterator[Any]], count: int, ids: np.ndarray
) -> list[list[Score]]:
    """Advance all caches together; only two caches' logits are held at a time.

    Returns ``count`` lists of one score per window; the numbers missing in ``others`` are the reference's own.
    """
    scores = [[Score()] * len(ids) for _ in range(count)]
    for part in reference:
        for index in range(count):
            mine = part if index not in others else next(others[index])
            targets = ids[:, mine.first : mine.first + mine.logits.shape[1]]
            seconds = Score(seconds=mine.seconds / len(ids))
            for row, compared in enumerate(compare(part.logits, mine.logits, targets)):
                scores[index][row] += compared + seconds
            del mine
    return scores
