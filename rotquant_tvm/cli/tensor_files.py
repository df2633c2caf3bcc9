"""The inputs of a run: read from an .npz file, checked, and filled in where they are missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rotquant_tvm.errors import ModelError

FILLED_TOKENS = 32
NAMES = ("ids", "new_lengths")


def read_inputs(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an input file: ``ids`` integers [batch, seq], ``new_lengths`` integers [batch].

    Either may be missing. Raises ModelError for a file that is not an .npz, or that holds other arrays or
    arrays that do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not hasattr(stored, "files"):
                raise ValueError("it holds a single array")
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise ModelError(f"--inputs: {path} does not exist") from error
    except Exception as error:  # the reader raises whatever its zip and header parsers do
        raise ModelError(f"--inputs: {path} is not an .npz file of plain arrays ({error})") from error
    for name, array in arrays.items():
        if name not in NAMES:
            raise ModelError(f"--inputs: {path} holds '{name}'; a run takes {' and '.join(NAMES)}")
        rank = 2 if name == "ids" else 1
        if array.ndim != rank or array.dtype.kind not in "iu" or not array.size:
            wanted = "[batch, seq]" if rank == 2 else "[batch]"
            given = f"{array.dtype} {list(array.shape)}"
            raise ModelError(f"--inputs: '{name}' in {path} is {given}; it must be integers {wanted}")
    _check_fit(path, arrays)
    return arrays


def _check_fit(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    lengths = arrays.get("new_lengths")
    if lengths is None:
        return
    if lengths.min() < 0 or not lengths.any():
        raise ModelError(f"--inputs: 'new_lengths' in {path} must be 0 or more, and not all 0")
    ids = arrays.get("ids")
    if ids is None:
        return
    if len(ids) != len(lengths):
        raise ModelError(f"--inputs: 'ids' in {path} has {len(ids)} rows and 'new_lengths' {len(lengths)} entries")
    if lengths.max() > ids.shape[1]:
        raise ModelError(
            f"--inputs: 'new_lengths' in {path} asks for {lengths.max()} tokens and a row of 'ids' has {ids.shape[1]}"
        )


def token_rows(
    arrays: Mapping[str, np.ndarray], fill_mode: str, vocab_size: int, batch: int = 1
) -> list[np.ndarray]:
    """Return one int row of token ids per sequence; ids that are missing are filled as ``fill_mode`` says.

    ``batch``: how many rows are filled in if ``arrays`` do not tell. Raises ModelError for ids outside the vocabulary.
    """
    ids, lengths = arrays.get("ids"), arrays.get("new_lengths")
    if ids is None:
        counts = np.full(batch, FILLED_TOKENS) if lengths is None else lengths
        ids = _filled((len(counts), int(counts.max())), fill_mode, vocab_size)
        lengths = counts
    if lengths is None:
        lengths = np.full(len(ids), ids.shape[1])
    rows = [row[:count] for row, count in zip(ids, lengths, strict=True)]
    for index, row in enumerate(rows):
        outside = row[(row < 0) | (row >= vocab_size)]
        if len(outside):
            raise ModelError(
                f"--inputs: token id {int(outside[0])} in row {index} is outside the vocabulary (0 to {vocab_size - 1})"
            )
    return rows


def _filled(shape: tuple[int, int], fill_mode: str, vocab_size: int) -> np.ndarray:
    if fill_mode == "random":
        return np.random.default_rng(0).integers(0, vocab_size, shape)
    return np.full(shape, 0 if fill_mode == "zeros" else min(1, vocab_size - 1))
