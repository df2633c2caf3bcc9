"""Train the trellis tables: Lloyd's iteration on the trellis, for isotropic vectors, then an int8 grid.

``python -m rotquant_tvm.formats.trellis_generator`` prints ``trellis_tables.py`` (it takes some minutes). The tables
are frozen: packed caches depend on them, so they change only together with the layout version.
"""

from __future__ import annotations

import textwrap

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

BITS = (2, 3, 4)
SEED = 1
HEAD_DIM = 128
VECTORS = 2048
ITERATIONS = 200
GRID_LIMIT = 127


def samples(count: int, head_dim: int, seed: int) -> Float64Array:
    """Return isotropic vectors [count, head_dim] of norm √head_dim."""
    x = np.random.default_rng(seed).standard_normal((count, head_dim))
    scaled: Float64Array = x * np.sqrt(head_dim) / np.linalg.norm(x, axis=-1, keepdims=True)
    return scaled


def lloyd_step(x: Float64Array, table: Float64Array, bits: int) -> tuple[Float64Array, float]:
    """Encode x [n, d] with ``table`` [256] and return the mean of what went to each state, and D.

    State 255 − s stands for the negative of state s; states that nothing went to keep their value.
    """
    from .trellis import STATES, ring_codes, states

    state = states(ring_codes(x.astype(np.float32), table.astype(np.float32), bits), bits).reshape(-1)
    flat = x.reshape(-1)
    error = float(((flat - table[state]) ** 2).sum() / (flat**2).sum())
    total, count = (np.bincount(state, weights, STATES) for weights in (flat, None))
    total, count = total - total[::-1], count + count[::-1]
    return np.where(count > 0, total / np.maximum(count, 1), table), error


def train(bits: int, seed: int) -> Float64Array:
    """Return the table [256], for coordinates of variance 1, that Lloyd's iteration reaches from a random one."""
    half = np.random.default_rng(seed).standard_normal(128)
    table = np.concatenate([half, -half[::-1]])
    x = samples(VECTORS, HEAD_DIM, seed + 1000)
    best, least = table, np.inf
    for _ in range(ITERATIONS):
        updated, error = lloyd_step(x, table, bits)
        if error < least:
            best, least = table, error
        table = updated
    return best


def int8_grid(table: Float64Array) -> tuple[np.float32, tuple[int, ...]]:
    """Return the scale and the 128 integers, none of them 0, of the table's first half."""
    scale = np.float32(np.abs(table).max() / GRID_LIMIT)
    half = np.rint(table[:128] / scale)
    half = np.where(half == 0, np.where(table[:128] < 0, -1, 1), half)
    return scale, tuple(int(value) for value in half)


def source() -> str:
    """Return the text of ``trellis_tables.py``."""
    lines = [
        '"""Frozen trellis tables, by ``trellis_generator``: bits -> (scale for variance 1, grid of states < 128)."""',
        "",
        "TABLES: dict[int, tuple[float, tuple[int, ...]]] = {",
    ]
    for bits in BITS:
        scale, half = int8_grid(train(bits, SEED))
        numbers = textwrap.fill(", ".join(map(str, half)), 108, initial_indent=" " * 12, subsequent_indent=" " * 12)
        lines += [f"    {bits}: (", f"        {scale!s},", "        (", f"{numbers},", "        ),", "    ),"]
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    print(source(), end="")
