"""What prefill attention kernels are run on in tests: their arguments but the output, and what NumPy says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.ops.rotation_matrices import rotation_arguments
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.cases import Case
from ..ops.reference import attention, filled_cache, stored_kv
from ..ops.segmented import SegmentedCache
from ..ops.test_attention_prefill import chunk

SCALE = 0.09


Explain = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Problem:
    """``wanted``: the output, zero in the padding; ``explain``: see ``check_output``."""

    shape: SiteShape
    arguments: list[np.ndarray]
    wanted: np.ndarray
    explain: Explain | None = None


def shape_of(case, dtype="float16", window=None, policy=NO_POLICY, rotated=False):
    """The site of a case."""
    k, v = (codec.format.name for codec in case.codecs)
    common = (k, v, case.heads, case.kv_heads, case.head_dim, SCALE, window, dtype)
    return SiteShape(*common, chunk=True, policy=policy.name, rotated=rotated)


def straight(rng, case: Case, steps, window=None, rotated=False) -> Problem:
    """Sequences of (past, new) ``steps`` over a cache that holds random bits past the past; the padding is NaN.

    ``rotated``: queries, keys, values and output are in the model's own basis.
    """
    past, new = (np.array(x, np.int32) for x in zip(*steps, strict=True))
    cache = filled_cache(rng, case.codecs, case.kv_heads, max(4, -(-int(past.max()) // 32)), past)
    q, k, v = chunk(rng, case, new, "float16")
    stored = stored_kv(case.codecs, cache)
    before = _own_basis(case, stored, rotated)
    wanted = _attention(q, before, (k, v), (past, new), window)
    shape = shape_of(case, window=window, rotated=rotated)

    def explain(b: int, token: int, head: int) -> float:
        kv_head, query = head * case.kv_heads // case.heads, q[b, token, head].astype(np.float64)
        own = slice(0, token + 1)  # of the chunk
        keys, values = (
            np.concatenate([x[b, kv_head, : past[b]], y[b, kv_head, own]]).astype(np.float64)
            for x, y in zip(before, (k, v), strict=True)
        )
        packed = stored[0][b, kv_head, : past[b]].astype(np.float64)
        codec = case.codecs[0]
        rounded = codec.format.gains_per_vector(case.head_dim) != 1, not codec.rotation.identity
        return rounding(query @ keys.T * SCALE, values, (packed, codec.rotation.apply(query)), rounded)

    arguments = [q, k, v, cache, past + new, new, *matrices(case, rotated)]
    return Problem(shape, arguments, wanted, explain if rotated and window is None else None)


def segmented(
    kernels, rng, case: Case, policy: CachePolicy, steps, counts, window=None, rotated=False
) -> Problem:
    """Chunks of ``counts`` tokens over a cache with a policy that ``steps`` filled, run by ``kernels``."""
    cache = SegmentedCache(kernels, rng, case, policy, len(counts), max(1, int(np.sum(steps, axis=0).max())), "float16")
    for step in steps:
        cache.append(cache.draw(max(step)), step)
    counts = np.array(counts, np.int32)
    k, v = cache.draw(int(counts.max()))
    q = rng.standard_normal((len(counts), k.shape[2], case.heads, case.head_dim)).astype(np.float16)
    seen = cache.seen()
    before = _own_basis(case, (seen[:, 0], seen[:, 1]), rotated)
    wanted = _attention(q, before, (k, v), (cache.lengths, counts), window)
    arguments = [q, k, v, *cache.arrays, cache.lengths + counts, counts, *matrices(case, rotated)]
    return Problem(shape_of(case, window=window, policy=policy, rotated=rotated), arguments, wanted)


def matrices(case: Case, rotated: bool) -> list[np.ndarray]:
    """The matrices of a case's rotations, as kernels take them."""
    rotations = [codec.rotation for codec in case.codecs]
    return rotation_arguments(case.codecs, rotations, "float16") if rotated else []


def check_output(actual, wanted, explain=None):
    """Assert outputs [..., d] to be the wanted ones, as far as keys, values and weights in float16 can tell.

    Rounding a key, or a query that is rotated, moves a score by 2^-12 of it: the scores of the longest keys reach 30
    here, and where two of them compete the output moves by a few thousandths. Such vectors are few.

    ``explain`` (b, token, head) says how long an error all roundings give a vector, those of a rotated query among them
    (``rounding``), and every vector that is off by more than most is held to that besides.
    """
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual.astype(np.float64) - wanted, axis=-1)
    size = np.linalg.norm(wanted, axis=-1) + 1e-6
    assert (error <= 1.5e-2 * size).all(), (error / size).max()
    for at in map(tuple, np.argwhere(error > 5e-3 * size) if explain is not None else ()):
        assert error[at] <= 5 * explain(*at), (at, error[at] / size[at], explain(*at) / size[at])
    assert np.mean(error <= 2e-3 * size) >= 0.98
    assert np.sqrt(np.mean((error / size) ** 2)) <= 1e-3


def rounding(scores, values, past, rounded):
    """How long an error of one output vector float16 operands give: a standard deviation, to first order.

    ``scores`` [n] and ``values`` [n, d]: of all tokens that it sees. ``past``: the packed keys [m, d] of the first
    ones, and the query [d], in the keys' basis. ``rounded``: whether those keys are, with their gains in them, and
    whether the query is. A rounding is uniform in half a unit of the last place either way.
    """
    keys, query = past
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    apart = (values - weights @ values)[: len(keys)]
    steps = weights[: len(keys)] * SCALE
    of_keys = (_variance(keys) @ query**2) @ (steps**2 * (apart**2).sum(1)) if rounded[0] else 0.0
    of_query = _variance(query) @ (((keys * steps[:, None]).T @ apart) ** 2).sum(1) if rounded[1] else 0.0
    return float(np.sqrt(of_keys + of_query))


def _variance(x):
    """Of what rounding x to float16 adds."""
    unit = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 11, -24))
    return unit**2 / 12


def _own_basis(case, pair, rotated):
    if not rotated:
        return pair
    with np.errstate(invalid="ignore"):
        return [codec.rotation.inverse().apply(x) for codec, x in zip(case.codecs, pair, strict=True)]


def _attention(q, before, new, lengths, window):
    wanted = np.zeros(q.shape)
    for b, (past, count) in enumerate(zip(*lengths, strict=True)):
        if count:
            k, v = (np.concatenate([x[b, :, :past], y[b, :, :count]], 1) for x, y in zip(before, new, strict=True))
            wanted[b, :count] = attention(q[b, :count], k, v, SCALE, first=past, window=window)
    return wanted
