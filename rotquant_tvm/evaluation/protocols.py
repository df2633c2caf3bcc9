"""Protocols: how a text goes through a cache, and which predictions are scored.

A protocol has a ``name`` and a ``definition`` for people, and says how its libraries are compiled: ``every_logit`` (as
of ``import_model``) and ``quantize_chunk`` (as of ``KVCacheConfig``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rotquant_tvm.errors import UsageError

if TYPE_CHECKING:
    from rotquant_tvm.runtime import CompiledLibrary

WINDOW_BYTES = 640 << 20  # of one call's logits; two caches' are held at a time


@dataclass(frozen=True)
class Predictions:
    """Logits float32 [batch, n, vocab] which predict tokens ``first`` … ``first + n - 1`` of their rows."""

    first: int
    logits: np.ndarray
    seconds: float


@dataclass(frozen=True)
class EveryToken:
    """Every token is quantized before anything attends to it."""

    name: str = field(default="every-token", init=False)
    definition: str = field(
        default=(
            "Each window is one prefill in which every key and value is quantized and dequantized before any attention "
            "reads it, its own token's included; of a cache policy, sinks and centring hold, recent tokens are "
            "quantized. Scored: every token of a window but the first."
        ),
        init=False,
    )
    every_logit: bool = field(default=True, init=False)
    quantize_chunk: bool = field(default=True, init=False)

    def parameters(self) -> dict[str, Any]:
        """Return what, beside the windows, decides the result: nothing."""
        return {}

    def batch(self, batch: int, context: int, vocab_size: int) -> int:
        """Return how many of ``batch`` windows to send at a time: as many as ``WINDOW_BYTES`` of logits allow.

        Raises UsageError if not even one fits.
        """
        window = 4 * context * vocab_size
        if window > WINDOW_BYTES:
            raise UsageError(
                f"{self.name}: the logits of a window of {context} tokens take {window >> 20} MiB; "
                f"use a context of {WINDOW_BYTES // (4 * vocab_size)} or less"
            )
        return min(batch, WINDOW_BYTES // window)

    def predictions(self, library: CompiledLibrary, ids: np.ndarray) -> Iterator[Predictions]:
        """Send windows int32 [batch, context] through an empty cache, in one call, and yield their predictions."""
        # Nothing here holds on to the logits: they may go as soon as they were compared.
        yield self._verify(library, ids)

    def _verify(self, library: CompiledLibrary, ids: np.ndarray) -> Predictions:
        batch, context = ids.shape
        session = library.session(batch, context, chunk=context)
        since = time.perf_counter()
        logits = session.verify(ids)
        return Predictions(1, logits[:, :-1], time.perf_counter() - since)


@dataclass(frozen=True)
class Generation:
    """The cache as generation uses it: ``prefill`` tokens at once, then one token at a time."""

    prefill: int
    name: str = field(default="generation", init=False)
    every_logit: bool = field(default=False, init=False)
    quantize_chunk: bool = field(default=False, init=False)

    @property
    def definition(self) -> str:
        """What is done and scored."""
        return (
            f"The first {self.prefill} tokens of each window are prefilled, the others are fed one by one through "
            "decode, as generation does, whatever the model would have said (teacher forcing). Scored: what each "
            "decode step predicts."
        )

    def parameters(self) -> dict[str, Any]:
        """Return what, beside the windows, decides the result."""
        return {"prefill": self.prefill}

    def batch(self, batch: int, context: int, vocab_size: int) -> int:
        """Return how many of ``batch`` windows to send at a time: all, as only one token's logits are held."""
        return batch

    def predictions(self, library: CompiledLibrary, ids: np.ndarray) -> Iterator[Predictions]:
        """Send windows int32 [batch, context] through an empty cache and yield their predictions.

        One part per decode step; the first one's seconds include the prefill's.
        """
        batch, context = ids.shape
        session = library.session(batch, context, chunk=self.prefill)
        since = time.perf_counter()
        session.prefill(ids[:, : self.prefill])
        for position in range(self.prefill, context - 1):
            logits = session.decode(ids[:, position])
            yield Predictions(position + 1, logits[:, None], time.perf_counter() - since)
            since = time.perf_counter()


TextProtocol: TypeAlias = EveryToken | Generation
