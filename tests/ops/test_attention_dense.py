"""Dense attention, the plain form: with the chunk apart, and with the new tokens already in the past."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm import ops

from .reference import attention, check_output

SCALE = 0.2
RAGGED = [(0, 0), (0, 1), (0, 33), (1, 32), (31, 2), (32, 31), (33, 33), (63, 1), (64, 0)]
SHAPES = [(64, 4, 4), (80, 6, 2), (96, 3, 1), (256, 2, 1)]


def inputs(rng, heads, kv_heads, head_dim, dtype="float32"):
    """(q, k_past, v_past, k, v) for RAGGED, NaN where no token is."""
    past, new = np.array(RAGGED).T
    q = rng.standard_normal((len(new), new.max(), heads, head_dim))
    k, v = (rng.standard_normal((len(new), kv_heads, new.max(), head_dim)) for _ in "kv")
    capacity = int((past + new).max()) + 5
    pasts = [rng.standard_normal((len(new), kv_heads, capacity, head_dim)).astype("float32") for _ in "kv"]
    for b, (p, n) in enumerate(RAGGED):
        for x in pasts:
            x[b, :, p:] = np.nan
        q[b, n:], k[b, :, n:], v[b, :, n:] = np.nan, np.nan, np.nan
    return q.astype(dtype), *pasts, k.astype(dtype), v.astype(dtype)


def dense(kernels, poisoned, arguments, chunk, **options):
    """Run ``attention_dense`` on what ``inputs`` returns."""
    q, k_past, v_past, k, v = arguments
    heads, head_dim = q.shape[2:]
    past, new = (np.array(x, np.int32) for x in zip(*RAGGED, strict=True))
    shape = (heads, k_past.shape[1], head_dim, SCALE, str(q.dtype))
    kernel = kernels.build(ops.attention_dense, *shape, chunk=chunk, **options)
    apart = (k, v) if chunk else ()
    out = poisoned(q.shape, q.dtype)
    return kernels.run(kernel, q, k_past, v_past, *apart, past + new, new, out, writes=(-1,))


def expected(arguments, **options):
    """Float64 attention over the past and the new tokens."""
    q, k_past, v_past, k, v = arguments
    out = np.zeros(q.shape)
    for b, (p, n) in enumerate(RAGGED):
        if n:
            whole = [np.concatenate([x[b, :, :p], y[b, :, :n]], 1) for x, y in ((k_past, k), (v_past, v))]
            out[b, :n] = attention(q[b, :n], *whole, SCALE, first=p, **options)
    return out


def joined(arguments):
    """The same inputs with the new tokens in the past, as an append leaves them."""
    q, k_past, v_past, k, v = arguments
    for b, (p, n) in enumerate(RAGGED):
        k_past[b, :, p : p + n], v_past[b, :, p : p + n] = k[b, :, :n], v[b, :, :n]
    return q, k_past, v_past, k, v


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("chunk", [True, False])
def test_ragged_batches(kernels, rng, poisoned, head_dim, heads, kv_heads, chunk):
    arguments = inputs(rng, heads, kv_heads, head_dim)
    reference = expected(arguments)
    check_output(dense(kernels, poisoned, arguments if chunk else joined(arguments), chunk), reference)


@pytest.mark.parametrize("chunk", [True, False])
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 7}, {"window": 32}, {"window": 40}, {"window": 40, "softcap": 0.7}], ids=str
)
def test_sliding_windows_and_soft_caps(kernels, rng, poisoned, chunk, options):
    arguments = inputs(rng, 6, 2, 80)
    reference = expected(arguments, **options)
    actual = dense(kernels, poisoned, arguments if chunk else joined(arguments), chunk, **options)
    check_output(actual, reference)


@pytest.mark.parametrize("chunk", [True, False])
def test_half_precision(kernels, rng, poisoned, chunk):
    arguments = inputs(rng, 4, 4, 64, "float16")
    reference = expected(arguments)
    check_output(dense(kernels, poisoned, arguments if chunk else joined(arguments), chunk), reference)
