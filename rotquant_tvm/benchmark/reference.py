"""What attention over a cache should give, in float64: for one sequence and kv head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotquant_tvm.formats import TOKENS
from rotquant_tvm.formats.centre import decode_centre

from .cache_data import CacheSpec

Array = NDArray[Any]


def packed_rows(spec: CacheSpec, arrays: Sequence[Array], packed: int) -> tuple[Array, Array]:
    """Return the keys and values [packed, head_dim] that tiles hold of one sequence and head; see ``stored_rows``."""
    tiles = np.ascontiguousarray(arrays[0][: -(-packed // TOKENS)]).view(np.uint8)
    encoded = spec.layout.unpack(tiles)
    keys, values = (
        codec.decode_rotated(part).reshape(-1, spec.head_dim)[:packed]
        for codec, part in zip(spec.codecs, encoded, strict=True)
    )
    if spec.policy.center:
        centres = decode_centre(arrays[1]).astype(np.float64)
        keys = keys + np.repeat(centres, spec.policy.center, axis=0)[:packed]
    return keys, values


def stored_rows(
    spec: CacheSpec, arrays: Sequence[Array], length: int, packed: int, tiles: tuple[Array, Array] | None = None
) -> tuple[Array, Array]:
    """Return the keys and values [length, head_dim] of one sequence and head, in their rotated bases.

    ``arrays``: the cache's arrays at that sequence and head, without the counts. ``tiles``: ``packed_rows`` of at least
    as many tokens, if they are known.
    """
    policy, rows = spec.policy, []
    for role, known in enumerate(tiles or packed_rows(spec, arrays, packed)):
        values = known[:packed]
        if policy.segmented:
            plain, sinks = arrays[-1][role].astype(np.float64), min(policy.sinks, length)
            newest = np.arange(packed, max(packed, length - policy.sinks)) % max(1, policy.ring) + policy.sinks
            values = np.concatenate([plain[:sinks], values, plain[newest]])
        rows.append(values)
    return rows[0], rows[1]


def decode_output(spec: CacheSpec, rows: tuple[Array, Array], q: Array, scale: float) -> Array:
    """Return the attention output [group, head_dim] of queries [group, head_dim], both un-rotated, in float64."""
    keys, values = rows
    scores = spec.codec_k.rotate(q.astype(np.float64)) @ keys.T * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output: Array = spec.codec_v.unrotate(weights @ values / weights.sum(-1, keepdims=True))
    return output


def causal_output(q: Array, k: Array, v: Array, positions: Sequence[int], scale: float) -> Array:
    """Return [positions, head_dim]: causal attention of the queries q [positions, head_dim] to k, v [n, head_dim]."""
    keys, values, rows = k.astype(np.float64), v.astype(np.float64), []
    for query, position in zip(q.astype(np.float64), positions, strict=True):
        scores = keys[: position + 1] @ query * scale
        weights = np.exp(scores - scores.max())
        rows.append(weights @ values[: position + 1] / weights.sum())
    return np.stack(rows)


def relative_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖; infinite if anything is not finite."""
    difference = np.linalg.norm(found.astype(np.float64) - expected)
    error = float(difference / np.linalg.norm(expected))
    return error if np.isfinite(error) else float("inf")
