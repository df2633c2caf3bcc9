"""A library without a model: its predictions are a table of the last tokens, so that every call's order shows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

VOCAB = 23


class FakeLibrary:
    """Predicts from a random table by (token, position); ``noise`` makes it differ from the 16-bit cache's."""

    def __init__(self, noise: float = 0.0) -> None:
        rng = np.random.default_rng(5)
        self.table = rng.standard_normal((VOCAB, 64, VOCAB)).astype(np.float32)
        self.table += np.float32(noise) * rng.standard_normal(self.table.shape).astype(np.float32)
        self.info = SimpleNamespace(vocab_size=VOCAB, max_position=64, document={})
        self.report = {"bits_per_element": 3.25}
        self.sessions = 0

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits [batch, tokens, vocab] after every token of ids [batch, tokens]."""
        return self.table[ids, np.arange(ids.shape[1])]

    def session(self, batch: int, capacity: int, chunk: int) -> FakeSession:
        self.sessions += 1
        return FakeSession(self, batch, capacity)


class FakeSession:
    """Holds the tokens that it was given."""

    def __init__(self, library: FakeLibrary, batch: int, capacity: int) -> None:
        self.library, self.capacity = library, capacity
        self.ids = np.zeros((batch, 0), np.int32)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.ids = np.concatenate([self.ids, np.asarray(ids)], axis=1)
        assert self.ids.shape[1] <= self.capacity
        return self.library.logits(self.ids)[:, -1]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        return self.prefill(np.asarray(ids)[:, None])


class FakeLibraries:
    """Hands out fake libraries and notes which; ``noise`` by the label of a configuration."""

    def __init__(self, **noise: float) -> None:
        self.loaded: dict[str, FakeLibrary] = {}
        self.noise = {"f16": 0.0} | noise
        self.asked: list[str] = []

    def load(self, candidate, *, every_logit=False, quantize_chunk=False):
        self.asked.append(candidate.label)
        return self.loaded.setdefault(candidate.label, FakeLibrary(self.noise[candidate.label]))
