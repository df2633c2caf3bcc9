"""What is timed: calls that do one thing on several sets of buffers, and what came of timing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

REASON_LENGTH = 200
"""Of an error's text, so much is kept."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    calls    the same work on different buffers, run in turn so that no call finds its data in a cache.
    outputs  float tensors that the calls overwrite entirely; a graph that leaves one unwritten did not hold the work.
    default_stream  it launches on the default stream of its thread, whatever torch's current stream is.
    """

    name: str
    calls: Sequence[Call]
    outputs: Sequence[Any] = ()
    default_stream: bool = False


@dataclass(frozen=True)
class Outcome:
    """Median seconds per call, or None and why there are none."""

    seconds: float | None
    note: str = ""


def failure(error: Exception) -> Outcome:
    """The outcome of a contender that raised: the end of what it said."""
    return Outcome(None, f"failed: {reason(error)}")


def reason(error: Exception) -> str:
    """The end of what an error says, as one line; compilers put their context before it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON_LENGTH else "…" + text[-REASON_LENGTH:]


def sets_past_cache(nbytes: int, rotated_bytes: int, most: int = 1024) -> int:
    """How many sets of buffers of ``nbytes`` make a round of calls that touches ``rotated_bytes``; at least 1."""
    return max(1, min(most, -(-rotated_bytes // max(1, nbytes))))
