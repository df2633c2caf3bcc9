"""What has been written into the rings of layers with a window, which decides how far a sequence can be taken back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rotquant_tvm.window_ring import WindowRing


class WrittenTokens:
    """The most tokens that each of ``batch`` sequences has had since it was last empty: at all, and in tiles.

    ``rings``: those of the cache's layers. A layer with a policy is written to when tokens go into tiles, another one
    when they come.
    """

    def __init__(self, rings: Sequence[WindowRing], batch: int) -> None:
        self.rings = tuple(rings)
        self._most, self._packed = np.zeros(batch, np.int32), np.zeros(batch, np.int32)

    def note(self, lengths: np.ndarray, packed: np.ndarray) -> None:
        """Note that sequences have had ``lengths`` tokens, ``packed`` of them in tiles, int [batch] each."""
        self._most, self._packed = np.maximum(self._most, lengths), np.maximum(self._packed, packed)

    def restart(self, lengths: np.ndarray, packed: np.ndarray) -> None:
        """Forget what was written of sequences that hold nothing, or nothing in tiles, any more."""
        self._most, self._packed = np.where(lengths > 0, self._most, 0), np.where(packed > 0, self._packed, 0)

    def counts(self) -> list[np.ndarray]:
        """Copies of what ``note`` takes, int32 [batch] each; none without rings."""
        return [self._most.astype(np.int32), self._packed.astype(np.int32)] if self.rings else []

    def select(self, order: Sequence[int]) -> WrittenTokens:
        """Return the same of sequences ``order[i]``."""
        chosen = WrittenTokens(self.rings, len(order))
        chosen._most, chosen._packed = self._most[list(order)], self._packed[list(order)]
        return chosen

    def possible(self, lengths: np.ndarray) -> np.ndarray:
        """Whether sequences can go on with their first ``lengths`` tokens alone, bool [batch]."""
        allowed = np.ones(len(lengths), bool)
        for ring in self.rings:
            allowed &= (lengths <= ring.policy.sinks) | (lengths >= ring.shortest(self._written(ring)))
        return allowed

    def shortest(self) -> np.ndarray:
        """Return the least lengths, int [batch], with which sequences can go on; few or no tokens at all aside."""
        shortest = np.zeros(len(self._most), np.int64)
        for ring in self.rings:
            shortest = np.maximum(shortest, ring.shortest(self._written(ring)))
        return shortest

    @property
    def always(self) -> int:
        """The length up to which a sequence can always be taken back: that of the sinks that all layers keep."""
        return min((ring.policy.sinks for ring in self.rings), default=0)

    def _written(self, ring: WindowRing) -> np.ndarray:
        return self._packed if ring.policy.segmented else self._most
