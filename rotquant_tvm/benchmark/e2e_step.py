"""One compiled form of the benchmark's model: its caches filled, its steps and prompts timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from rotquant_tvm.formats import TOKENS
from rotquant_tvm.runtime import CompiledLibrary, Session
from rotquant_tvm.runtime.decode_graph import DecodeGraph

from .settings import BatchShape

FILL_TOKENS = 2048
"""Tokens of the prompt that a cache is filled with; the others are copies of them."""
CHUNK_TOKENS = 8192
"""Most tokens of all sequences together that one call of prefill takes."""
ROOM = 128
"""Tokens that a cache has room for beyond the context: the timed steps append theirs."""
REPLAYS = 4
"""Steps of one timing."""
FREE_BYTES = 1 << 30
"""Memory that is left to activations."""


def context(library: CompiledLibrary, shape: BatchShape) -> int:
    """Tokens per sequence before a step: the shape's, or what leaves room at the end of the model's positions."""
    return min(shape.tokens, library.info.max_position - ROOM)


def filled_session(library: CompiledLibrary, shape: BatchShape) -> Session:
    """A session whose sequences hold the shape's tokens: a prompt's, over and over."""
    tokens = context(library, shape)
    prompt = min(tokens, FILL_TOKENS)
    chunk = max(1, min(prompt, CHUNK_TOKENS // shape.batch))
    session = library.session(shape.batch, tokens + ROOM, chunk)
    session.prefill(_prompt(session, prompt))
    _repeat(session)
    session.cache.assume(np.full(shape.batch, tokens))
    return session


def decode_seconds(session: Session, samples: int) -> float:
    """Median seconds of a decode step over a filled session, as replays of its CUDA graph."""
    lengths = session.lengths
    tokens = np.zeros(session.batch, np.int64)
    session.decode(tokens)
    graph = DecodeGraph(session.library, session.cache)

    def steps() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    times = []
    for _ in range(samples):
        session.cache.assume(lengths)
        times.append(timed(steps) / REPLAYS)
    session.cache.assume(lengths)
    return statistics.median(times)


def prefill_seconds(library: CompiledLibrary, shape: BatchShape, samples: int) -> float:
    """Median seconds of a whole prompt of the shape, from token ids to logits, chunk by chunk."""
    session = library.session(shape.batch, shape.tokens, max(1, CHUNK_TOKENS // shape.batch))
    prompt = _prompt(session, shape.tokens)
    times = []
    for number in range(samples + 1):
        session.reset()
        seconds = timed(lambda: session.prefill(prompt))
        times += [seconds] if number else []
    return statistics.median(times)


def timed(run: Callable[[], object]) -> float:
    """Seconds that the device takes for ``run``."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def largest_batch(library: CompiledLibrary, tokens: int, free_bytes: int) -> int:
    """How many sequences of ``tokens`` tokens ``free_bytes`` hold, by the bytes of their cache."""
    return max(0, (free_bytes - FREE_BYTES) // library.info.cache_bytes(1, tokens))


def _prompt(session: Session, tokens: int) -> np.ndarray:
    shape = (session.batch, tokens)
    return np.random.default_rng(0).integers(0, session.info.vocab_size, shape)


def _repeat(session: Session) -> None:
    """Copy the packed tiles, and the centres of blocks, of the tokens held to all places behind them."""
    policy, arrays = session.cache.policy, iter(session.cache.layers)
    for layer in session.info.layers:
        held = session.lengths[:1]
        if layer.policy.segmented:
            held = policy.packed_after(np.zeros(1, np.int32), held, True)
        _repeat_entries(next(arrays), int(held[0]) // TOKENS)
        if layer.policy.center:
            _repeat_entries(next(arrays), int(held[0]) // layer.policy.center)
        if layer.policy.segmented:
            next(arrays)  # the 16-bit tokens, which are the last ones


def _repeat_entries(array: Any, whole: int) -> None:
    """Fill [batch, kv_heads, entries, words] with its first ``whole`` entries."""
    import torch

    values = torch.from_dlpack(array).view(torch.int32)  # type: ignore[attr-defined]
    for start in range(whole, values.shape[2], max(1, whole)):
        count = min(whole, values.shape[2] - start)
        values[:, :, start : start + count] = values[:, :, :count]
