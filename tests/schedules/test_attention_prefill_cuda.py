"""The tensor-core prefill kernel against float64 attention over the cache's own decoded keys and values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from rotquant_tvm.schedules.attention_prefill_cuda import KNOBS, attention_prefill_cuda, prefill_kernel
from rotquant_tvm.schedules.knobs import with_knobs
from rotquant_tvm.schedules.prefill_tiling_cuda import prefill_tiling

from rotquant_tvm import ops
from rotquant_tvm.cache_policy import NO_POLICY, CachePolicy
from rotquant_tvm.codegen import compile_module
from rotquant_tvm.ops.site_shape import SiteShape

from ..ops.cases import CASES as FORMAT_CASES
from ..ops.cases import Case
from ..ops.conftest import Kernels, has_gpu
from ..ops.reference import attention, filled_cache
from ..ops.segmented import SegmentedCache
from ..ops.test_attention_prefill import RAGGED, chunk, expected
from .cuda_targets import ARCHITECTURES, cubin, target_of

SCALE = 0.09
CASES = [
    *(Case(f"hurwitz{bits}", head_dim, 8, 2) for bits in (1, 2, 3, 4) for head_dim in (64, 80, 96, 128, 256)),
    *FORMAT_CASES,
    Case("hurwitz3", 32, 3, 1),
    Case("iso3/planar4", 112, 6, 2),
    Case("hurwitz2/planar4", 160, 10, 2),
    Case("q8_0", 128, 8, 2),
    Case("q4_0", 128, 8, 2),
    Case("f16", 128, 32, 8),
    Case("bf16", 256, 4, 1),
    Case("rq2", 128, 8, 2),
]
SEGMENTED = [
    (Case("hurwitz3", 128, 8, 2), CachePolicy(sinks=4, recent=64, center=64)),
    (Case("hurwitz3", 64, 9, 3), CachePolicy(sinks=4, recent=32, center=64)),
    (Case("iso4/planar2", 80, 8, 2), CachePolicy(sinks=5, center=32)),
    (Case("q8_0/hurwitz3", 96, 7, 1), CachePolicy(recent=9)),
    (Case("rotor3/f16", 80, 3, 3), CachePolicy(sinks=40)),
    (Case("turbo2", 128, 4, 2), CachePolicy(sinks=4, recent=3, center=96, defer=50)),
    (Case("hurwitz4", 256, 4, 2), CachePolicy(sinks=4, recent=64, center=64)),
]
STEPS = ([70, 0, 3, 33], [130, 40, 1, 0], [1, 1, 1, 1], [64, 65, 1, 200])
KNOB_CASES = [
    {"tokens": 64, "stages": 1},
    {"tokens": 64, "stages": 2},
    {"row_tiles": 1},
    {"warps": 8},
    {"warps": 2, "row_tiles": 1},
    {"warps": 8, "row_tiles": 1, "tokens": 128, "stages": 1},
]
LONG = [(0, 300), (129, 257), (517, 64), (1000, 1), (65, 0), (63, 131)]

requires_gpu = pytest.mark.skipif(not has_gpu(), reason="no CUDA device")


def shape_of(case, dtype="float16", window=None, policy=NO_POLICY):
    k, v = (codec.format.name for codec in case.codecs)
    return SiteShape(
        *(k, v, case.heads, case.kv_heads, case.head_dim, SCALE, window, dtype), chunk=True, policy=policy.name
    )


@pytest.fixture
def rng(request):
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.fixture(scope="module")
def gpu():
    return Kernels("cuda")


@pytest.fixture(scope="module")
def cpu():
    return Kernels("llvm")


def check_output(actual, wanted):
    """Assert outputs [..., d] to be the wanted ones, as far as keys, values and weights in float16 can tell.

    A key's rounding moves its score by 2^-12 of it: the scores of the longest keys reach 30 here, and where two of them
    compete the output moves by a few thousandths. Such vectors are few.
    """
    assert np.isfinite(actual).all()
    error = np.linalg.norm(actual.astype(np.float64) - wanted, axis=-1)
    size = np.linalg.norm(wanted, axis=-1) + 1e-6
    assert (error <= 1.5e-2 * size).all(), (error / size).max()
    assert np.mean(error <= 2e-3 * size) >= 0.98
    assert np.sqrt(np.mean((error / size) ** 2)) <= 1e-3


def compiled(gpu, shape, **knobs):
    kernel = prefill_kernel(shape, gpu.target, **knobs)
    return compile_module(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), gpu.target)["kernel"]


def check(gpu, rng, case, steps, window=None, **knobs):
    """Compare over a cache that holds random bits past the past; keys and values of the padding are NaN."""
    past, new = (np.array(x, np.int32) for x in zip(*steps, strict=True))
    cache = filled_cache(rng, case.codecs, case.kv_heads, max(4, -(-int(past.max()) // 32)), past)
    q, k, v = chunk(rng, case, new, "float16")
    kernel = compiled(gpu, shape_of(case, window=window), **knobs)
    actual = gpu.run(kernel, q, k, v, cache, past + new, new, np.full_like(q, np.nan), writes=(6,))
    check_output(actual, expected(case, q, k, v, cache, past, new, window=window))
    for b, count in enumerate(new):
        assert (actual[b, count:] == 0).all()


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_chunks(gpu, rng, case):
    check(gpu, rng, case, RAGGED + LONG[:3])


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("window", [1, 7, 32, 40, 200])
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("iso4/planar2", 80, 5, 5)], ids=str)
def test_sliding_windows(gpu, rng, case, window):
    check(gpu, rng, case, RAGGED + LONG, window=window)


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("knobs", KNOB_CASES, ids=str)
@pytest.mark.parametrize("case", [Case("hurwitz3", 128, 8, 2), Case("q8_0/iso3", 80, 7, 1)], ids=str)
def test_every_tiling_gives_the_same(gpu, rng, case, knobs):
    check(gpu, rng, case, RAGGED + LONG, **knobs)


@pytest.mark.gpu
@requires_gpu
def test_a_past_beyond_the_capacity_is_not_read(gpu, rng):
    case, past, new = CASES[2], np.array([64, 70, 100_000], np.int32), np.array([3, 3, 3], np.int32)
    cache = filled_cache(rng, case.codecs, case.kv_heads, 2, [64, 64, 64])
    q, k, v = chunk(rng, case, new, "float16")
    kernel = compiled(gpu, shape_of(case))
    actual = gpu.run(kernel, q, k, v, cache, past + new, new, np.full_like(q, np.nan), writes=(6,))
    check_output(actual, expected(case, q, k, v, cache, [64, 64, 64], new))


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("window", [None, 50, 230])
@pytest.mark.parametrize(("case", "policy"), SEGMENTED, ids=str)
def test_policies(gpu, cpu, rng, case, policy, window):
    cache = SegmentedCache(cpu, rng, case, policy, 4, 600, dtype="float16")
    for counts in STEPS:
        cache.append(cache.draw(max(counts)), counts)
    counts, seq = np.array([40, 7, 0, 200], np.int32), 200
    new = cache.draw(seq)
    q = rng.standard_normal((4, seq, case.heads, case.head_dim)).astype(np.float16)
    kernel = compiled(gpu, shape_of(case, window=window, policy=policy))
    arguments = (q, *new, *cache.arrays, cache.lengths + counts, counts, np.full_like(q, np.nan))
    actual = gpu.run(kernel, *arguments, writes=(-1,))
    seen, wanted = cache.seen(), np.zeros(q.shape)
    for b, (past, count) in enumerate(zip(cache.lengths, counts, strict=True)):
        k, v = (np.concatenate([seen[b, role, :, :past], new[role][b, :, :count]], axis=1) for role in range(2))
        if count:
            wanted[b, :count] = attention(q[b, :count], k, v, SCALE, first=past, window=window)
    check_output(actual, wanted)


@pytest.mark.gpu
@requires_gpu
def test_large_scores_do_not_overflow(gpu, rng):
    """Peaks move late and far: keys grow along the sequence."""
    case, n = Case("f16", 128, 4, 1), 300
    q, k, v = chunk(rng, case, [n], "float16")
    k *= np.linspace(0, 12, n, dtype=np.float16)[:, None]
    cache = filled_cache(rng, case.codecs, 1, 1, [0])
    lengths = np.array([n], np.int32)
    kernel = compiled(gpu, shape_of(case))
    actual = gpu.run(kernel, q, k, v, cache, lengths, lengths, np.full_like(q, np.nan), writes=(6,))
    check_output(actual[0], attention(q[0], k[0], v[0], SCALE))


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "case",
    [Case("hurwitz3", 128, 32, 8), Case("q8_0/bf16", 80, 7, 1), Case("hurwitz4/f16", 256, 4, 4)],
    ids=str,
)
def test_kernels_compile(case, arch):
    for policy in (NO_POLICY, CachePolicy(sinks=4, recent=64, center=64)):
        shape = shape_of(case, window=100, policy=policy)
        assert len(cubin(lambda target, shape=shape: prefill_kernel(shape, target), arch)) > 0


@pytest.mark.parametrize("shared", [49152, 101376, 166912, 232448])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_blocks_fit_the_shared_memory_there_is(head_dim, shared):
    tiling = prefill_tiling(head_dim, (25 * head_dim, 0, 0), shared, {})
    if (head_dim, shared) == (256, 49152):
        assert tiling is None
    else:
        assert tiling is not None and 2 * tiling.size <= shared
    wide = prefill_tiling(head_dim, (25 * head_dim, 0, 0), shared, {"warps": 8, "tokens": 128, "stages": 2})
    assert wide is None or (2 * wide.size <= shared and (wide.warps, wide.tokens) == (8, 128))


def definition(case, dtype="float16"):
    shape = shape_of(case, dtype)
    func = ops.attention_prefill(*case.codecs, case.heads, case.kv_heads, SCALE, dtype, ops.Axes("cuda"))
    return shape.attach(func)


def test_the_rule_declines_what_it_has_no_kernel_for():
    case = Case("hurwitz3", 128, 8, 2)
    assert attention_prefill_cuda(definition(case), target_of("sm_90a")) is not None
    assert attention_prefill_cuda(definition(case, "float32"), target_of("sm_90a")) is None
    assert attention_prefill_cuda(definition(case), target_of("sm_75")) is None
    capped = replace(shape_of(case), softcap=30.0).attach(definition(case))
    assert attention_prefill_cuda(capped, target_of("sm_90a")) is None


def test_knobs_on_the_definition_replace_the_rules_choice():
    func = definition(Case("hurwitz3", 128, 8, 2))
    plain, changed = (attention_prefill_cuda(with_knobs(func, k), target_of("sm_90a")) for k in ({}, {"warps": 2}))
    assert KNOBS["warps"] == (2, 4, 8)
    assert str(plain) != str(changed)
