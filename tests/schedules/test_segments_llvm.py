"""The vector attention kernels over caches with a policy, against float64 attention over what each token has become."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.attention_decode_llvm import attention_decode_llvm
from rotquant_tvm.schedules.attention_prefill_llvm import attention_prefill_llvm
from rotquant_tvm.schedules.integer_stream_llvm import has_integer_core
from tvm.target import Target

from rotquant_tvm.cache_policy import CachePolicy
from rotquant_tvm.ops.site_shape import SiteShape
from rotquant_tvm.target import host_target

from ..ops.cases import Case
from ..ops.conftest import Kernels
from ..ops.reference import attention
from ..ops.segmented import SegmentedCache
from ..sampling import sampled

SCALE, SOFTCAP = 0.07, 1.5
AVX2 = {"kind": "llvm", "mcpu": "x86-64-v3"}
CASES = [
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=8, center=64), None),
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=8, center=64), AVX2),
    (Case("iso4/planar2", 80, 8, 2), CachePolicy(sinks=5, center=32), None),
    (Case("q8_0/hurwitz3", 96, 7, 1), CachePolicy(recent=9), None),
    (Case("rotor3/f16", 80, 3, 3), CachePolicy(sinks=40), None),
    (Case("turbo2", 128, 4, 2), CachePolicy(sinks=4, recent=3, center=96, defer=50), None),
]
ORDINARY = [pytest.param(*case, marks=pytest.mark.full) if n in (1, 2, 4) else case for n, case in enumerate(CASES)]
STEPS = ([70, 0, 3, 33], [130, 40, 1, 0], [1, 1, 1, 1], [64, 65, 1, 200])


def filled(rng, case, policy):
    """A cache of ragged sequences, one of them shorter than the sinks."""
    cache = SegmentedCache(Kernels("llvm"), rng, case, policy, 4, 600)
    for counts in STEPS:
        cache.append(cache.draw(max(counts)), counts)
    return cache


def run(kernel, case, policy, target, arrays, out, **options):
    """Run a kernel on a poisoned output and return it."""
    k, v = (codec.format.name for codec in case.codecs)
    shape = SiteShape(
        k, v, case.heads, case.kv_heads, case.head_dim, SCALE, dtype="float32", policy=policy.name, **options
    )
    target = host_target() if target is None else Target(target)
    mod = tvm.IRModule({"kernel": kernel(shape, target).with_attr("global_symbol", "kernel")})
    result = tvm.runtime.tensor(np.full_like(out, np.nan))
    compiled = tvm.compile(mod, target)["kernel"]
    compiled(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays), result)
    return result.numpy().astype(np.float64)


def check(actual, expected, most=5e-6):
    error = np.linalg.norm(actual - expected, axis=-1)
    assert (error <= most * np.linalg.norm(expected, axis=-1) + 1e-9).all(), error.max()


@pytest.mark.parametrize(("splits", "window"), [(5, 50), pytest.param(1, None, marks=pytest.mark.full)])
@pytest.mark.parametrize(("case", "policy", "target"), ORDINARY, ids=str)
def test_decode(case, policy, target, splits, window):
    rng = np.random.default_rng(5)
    cache = filled(rng, case, policy)
    cache.append(cache.draw(1), np.ones(4), chunk=False)
    q = rng.standard_normal((4, 1, case.heads, case.head_dim)).astype(np.float32)
    arrays = [q, *cache.arrays, cache.lengths]
    options = {"window": window, "softcap": SOFTCAP if window else None}
    actual = run(attention_decode_llvm, case, policy, target, arrays, q, splits=splits, **options)
    seen = cache.seen()
    expected = [
        attention(q[b], seen[b, 0, :, :n], seen[b, 1, :, :n], SCALE, first=n - 1, **options)
        for b, n in enumerate(cache.lengths)
    ]
    cpu = host_target() if target is None else Target(target)
    check(actual, np.stack(expected), 5e-4 if has_integer_core(case.codecs, cpu) else 5e-6)


@pytest.mark.parametrize("window", sampled([None, 50], [50]))
@pytest.mark.parametrize(("case", "policy", "target"), ORDINARY, ids=str)
def test_prefill(case, policy, target, window):
    rng = np.random.default_rng(6)
    cache = filled(rng, case, policy)
    counts, seq = np.array([40, 7, 0, 21], np.int32), 40
    new = cache.draw(seq)
    q = rng.standard_normal((4, seq, case.heads, case.head_dim)).astype(np.float32)
    arrays = [q, *new, *cache.arrays, cache.lengths + counts, counts]
    options = {"window": window, "softcap": SOFTCAP if window else None}
    actual = run(attention_prefill_llvm, case, policy, target, arrays, q, chunk=True, **options)
    seen, expected = cache.seen(), np.zeros(q.shape)
    for b, (past, count) in enumerate(zip(cache.lengths, counts, strict=True)):
        k, v = (np.concatenate([seen[b, role, :, :past], new[role][b, :, :count]], axis=1) for role in range(2))
        if count:
            expected[b, :count] = attention(q[b, :count], k, v, SCALE, first=past, **options)
    check(actual, expected)
