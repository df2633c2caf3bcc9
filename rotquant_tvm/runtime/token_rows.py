"""Rows of token ids as users pass them: checked, and cut into rectangular chunks for the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rotquant_tvm.errors import UsageError


def token_row(ids: object, vocab_size: int, row: int = 0) -> np.ndarray:
    """Return one row of token ids as int32 [n]; n may be 0.

    Raises UsageError naming the offending token if ``ids`` is not a flat sequence of integers in
    0 … vocab_size-1; ``row`` is its number in the batch, for the message.
    """
    try:
        values = np.asarray(ids)
    except ValueError:
        values = np.empty((0, 0))
    if values.size == 0 and values.ndim == 1:
        return np.empty(0, np.int32)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UsageError(f"row {row}: token ids must be a flat sequence of integers")
    outside = np.flatnonzero((values < 0) | (values >= vocab_size))
    if len(outside):
        place = int(outside[0])
        raise UsageError(
            f"row {row}: token id {int(values[place])} at position {place} is outside the vocabulary "
            f"(0 to {vocab_size - 1})"
        )
    return values.astype(np.int32)


def token_rows(ids: object, batch: int, vocab_size: int) -> list[np.ndarray]:
    """Return ``batch`` rows of int32 token ids from an array [batch, s] or ragged lists.

    A flat row is taken as it is when ``batch`` is 1. Raises UsageError for another number of rows and as
    ``token_row`` does.
    """
    if isinstance(ids, str | bytes):
        raise UsageError("expected token ids, not text")
    rows: Sequence[object] | np.ndarray = ids if isinstance(ids, Sequence) else np.atleast_1d(np.asarray(ids))
    if batch == 1 and is_flat(rows):
        rows = [rows]
    if len(rows) != batch:
        raise UsageError(f"{len(rows)} rows of token ids for a session of {batch}")
    return [token_row(row, vocab_size, index) for index, row in enumerate(rows)]


def is_flat(ids: Sequence[object] | np.ndarray) -> bool:
    """Whether ``ids`` is one row of numbers and not a sequence of rows; an empty sequence is one row."""
    if isinstance(ids, np.ndarray):
        return ids.ndim == 1
    return all(isinstance(entry, int | float | np.number) for entry in ids)


def chunks(rows: Sequence[np.ndarray], width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut ragged rows into (ids int32 [batch, w], new_lengths int32 [batch]) with w <= width.

    Rows are padded on the right with token 0; a row that has ended has new length 0.
    """
    longest = max(len(row) for row in rows)
    for start in range(0, longest, width):
        parts = [row[start : start + width] for row in rows]
        ids = np.zeros((len(rows), max(len(part) for part in parts)), np.int32)
        for index, part in enumerate(parts):
            ids[index, : len(part)] = part
        yield ids, np.array([len(part) for part in parts], np.int32)


def joined_logits(parts: Sequence[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Join chunks' logits [batch, w, vocab]; the first ``lengths[i]`` of row i are real.

    What lies behind these is NaN, and so is what follows a NaN in its row: of a NaN 0 is stored, and later chunks do
    not show it. A single chunk is changed in place.
    """
    logits = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    absent = np.isnan(logits.max(axis=2)) | (np.arange(logits.shape[1]) >= lengths[:, None])
    logits[np.logical_or.accumulate(absent, axis=1)] = np.nan
    return logits
